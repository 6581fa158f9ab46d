"""Zero points and scales of constants, by their values and what overrides say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from qwrap.ort.errors import QuantizationError
from qwrap.ort.numbers.code_types import ONNX_TYPE_TO_NP_TYPE, Array, get_qmin_qmax_for_qType
from qwrap.ort.numbers.scales import compute_data_quant_params, compute_scale_zp, float8_params

Entry = Mapping[str, Any]


def given_params(
    entries: Sequence[Entry], quant_type: int, dtype: Any, count: int | None = None
) -> tuple[Array, Array] | None:
    """Return the zero points and scales that overrides give, None if they give none.

    Args:
        entries: the dictionaries of one tensor: one, or one for each channel. Python numbers and
            arrays alike.
        quant_type: ``TensorProto.DataType`` of the codes.
        dtype: of the tensor, and so of its scale.
        count: of channels, which a single entry holds for all; None for 0-d results.

    Raises:
        QuantizationError: there are too many or too few (a ``ValueError``), or a zero point is no
            code of the type.
    """
    if not entries or "scale" not in entries[0] or "zero_point" not in entries[0]:
        return None
    zeros = _numbers(entries, "zero_point", np.float64, count)
    zero_point = zeros.astype(ONNX_TYPE_TO_NP_TYPE[quant_type])
    if (zero_point.astype(np.float64) != zeros).any():
        raise QuantizationError(
            f"'zero_point' {zeros} of TensorQuantOverrides is no code of {zero_point.dtype}"
        )
    return zero_point, _numbers(entries, "scale", dtype, count)


def _numbers(entries: Sequence[Entry], key: str, dtype: Any, count: int | None) -> Array:
    """Return what entries say, 0-d or one for each of ``count`` channels."""
    values = np.concatenate([np.asarray(entry[key]).reshape(-1) for entry in entries])
    wanted = 1 if count is None else count
    if values.size not in (1, wanted):
        raise QuantizationError(
            f"TensorQuantOverrides have {values.size} times '{key}', for {wanted} channels"
        )
    shape = () if count is None else (count,)
    values = values.reshape(() if values.size == 1 else shape)
    return np.array(np.broadcast_to(values, shape), dtype)


def tensor_params(
    data: Array,
    quant_type: int,
    entry: Entry,
    *,
    symmetric: bool,
    reduce_range: bool = False,
    min_real_range: float | None = None,
) -> tuple[Array, Array]:
    """Return zero point and scale, 0-d, of a constant with one scale.

    Args:
        data: its values; the scale has their type.
        quant_type: ``TensorProto.DataType`` of the codes, the entry's already if it has one.
        entry: what overrides say of it, the rest of the arguments is what they do not say.
        symmetric: the zero point is the middle code.
        reduce_range: use half of the codes.
        min_real_range: smallest width of the range.

    Raises:
        QuantizationError: data that is not finite (a ``ValueError``).
    """
    given = given_params([entry], quant_type, data.dtype)
    if given is not None:
        return given
    return compute_data_quant_params(
        data,
        quant_type,
        entry.get("symmetric", symmetric),
        entry.get("reduce_range", reduce_range),
        min_real_range,
        entry.get("rmin"),
        entry.get("rmax"),
    )


def channel_params(
    data: Array,
    quant_type: int,
    axis: int,
    entries: Sequence[Entry],
    *,
    symmetric: bool,
    reduce_range: bool = False,
    min_real_range: float | None = None,
) -> tuple[Array, Array]:
    """Return zero points and scales ``[C]`` of a constant with one scale for each index of an axis.

    Where the range is symmetric all zero points are equal, also those of channels of zeros, as
    onnxruntime's tool means them to be for kernels that take one value.

    Args:
        data: its values; scales have their type.
        quant_type: as in ``tensor_params``.
        axis: along which channels run, not negative.
        entries: what overrides say, one for all channels or one for each; ``symmetric`` and
            ``reduce_range`` of the first hold for all.
        symmetric: as in ``tensor_params``.
        reduce_range: as in ``tensor_params``.
        min_real_range: as in ``tensor_params``.

    Raises:
        QuantizationError: entries for another number of channels, or data that is not finite (a
            ``ValueError``).
    """
    count = data.shape[axis]
    given = given_params(entries, quant_type, data.dtype, count)
    if given is not None:
        return given
    first = entries[0] if entries else {}
    symmetric = bool(first.get("symmetric", symmetric))
    reduced = bool(first.get("reduce_range", reduce_range))
    if quant_type == TensorProto.FLOAT8E4M3FN:
        rows = np.moveaxis(data, axis, 0).reshape(count, -1)
        zero_point, scale = float8_params(np.ascontiguousarray(rows), reduced)
        return zero_point.reshape(count), scale.reshape(count)
    qmin, qmax = get_qmin_qmax_for_qType(quant_type, reduced, symmetric=symmetric)
    rmin, rmax = _channel_ends(data, axis, entries)
    zero_point, scale = compute_scale_zp(rmin, rmax, qmin, qmax, symmetric, min_real_range)
    if symmetric:
        middle = np.round((float(qmin) + float(qmax)) / 2.0)
        zero_point = np.full(count, middle).astype(zero_point.dtype)
    return zero_point, scale


def _channel_ends(data: Array, axis: int, entries: Sequence[Entry]) -> tuple[Array, Array]:
    """Return the smallest and largest value of each channel, or what entries say they are."""
    others = tuple(i for i in range(data.ndim) if i != axis)
    zero = data.dtype.type(0)  # which every range is widened to; it gives empty channels one
    low, high = data.min(others, initial=zero), data.max(others, initial=zero)
    ends = []
    for key, found in (("rmin", low), ("rmax", high)):
        said = bool(entries) and all(entry.get(key) is not None for entry in entries)
        ends.append(_numbers(entries, key, data.dtype, len(found)) if said else found)
    return ends[0], ends[1]
