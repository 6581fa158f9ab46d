"""Scales and zero points from ranges and from data.

onnxruntime's formulas in numpy, in its dtypes and its order of operations, over arrays of ranges at
once: what it computes channel by channel is computed here for all, with the same bits. (qwrap's own
``numerics.choose_qparams`` agrees but for scales below ``MIN_SCALE``, and is float32 only.)

Source: onnxruntime/quantization/quant_utils.py, 1.31.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto

from qwrap.ort.errors import InvalidModelError, QuantizationError
from qwrap.ort.numbers.code_types import Array, data_type_name, get_qmin_qmax_for_qType


def compute_scale_zp(
    rmin: Any,
    rmax: Any,
    qmin: Any,
    qmax: Any,
    symmetric: bool = False,
    min_real_range: float | None = None,
) -> list[Array]:
    """Return ``[zero_point, scale]`` that spread the codes over ``[rmin, rmax]``.

    The range is widened to hold 0. A range of no width gets scale 1 and zero point 0, and so does
    one whose scale is below the smallest normal number of its type; of float16, where weights can
    be that small, the scale is that number instead.

    Args:
        rmin: smallest values: a number, or an array of one for each scale.
        rmax: largest values, of the same shape. The scales have the type of ``rmin`` and ``rmax``;
            float32 where both are Python numbers.
        qmin: smallest code, whose type zero points have.
        qmax: largest code.
        symmetric: reach as far on both sides, with the zero point in the middle of the codes.
        min_real_range: smallest width of a range; its upper end gives way.

    Raises:
        QuantizationError: 0 is no code, or an end is not finite (a ``ValueError``).
    """
    if qmin > 0 or qmax < 0:
        raise QuantizationError(
            f"qmin and qmax must meet requirement: qmin <= 0 <= qmax while qmin:{qmin}, qmax:{qmax}"
        )
    rmin, rmax = _ends(rmin, rmax)
    rmin, rmax = np.minimum(rmin, rmin.dtype.type(0)), np.maximum(rmax, rmax.dtype.type(0))
    if min_real_range is not None:
        rmax = np.maximum(rmax, rmin + np.asarray(min_real_range, rmin.dtype))
    if symmetric:
        rmax = np.maximum(np.abs(rmin), np.abs(rmax))
        rmin = -rmax
    low, high = float(qmin), float(qmax)
    # float64: the width of a range can overflow the type of its ends
    width = rmax.astype(np.float64) - rmin.astype(np.float64)
    exact, degenerate = usable_scales(width / (high - low), width, rmax.dtype)
    zeros = np.round((low + high) / 2.0) if symmetric else np.round(low - rmin / exact)
    zero_point = np.where(degenerate, 0.0, zeros).astype(np.asarray(qmin).dtype)
    return [np.asarray(zero_point), np.asarray(exact.astype(rmax.dtype))]


def _ends(rmin: Any, rmax: Any) -> tuple[Array, Array]:
    """Return both ends of ranges as arrays of the type that scales will have."""
    known = [end.dtype for end in (rmin, rmax) if isinstance(end, (np.ndarray, np.generic))]
    default = known[0] if known and known[0].kind in "fV" else np.dtype(np.float32)
    ends = [e if hasattr(e, "dtype") else np.asarray(e, default) for e in (rmin, rmax)]
    low, high = (np.asarray(e) if e.dtype.kind in "fV" else np.asarray(e, np.float32) for e in ends)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise QuantizationError(
            f"the range [{np.min(low)}, {np.max(high)}] is not finite; "
            "look for NaN or infinity in the data"
        )
    return low, high


def usable_scales(scale: Array, width: Array, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Return float64 scales that can be divided by, and which of them belong to no range.

    Args:
        scale: float64.
        width: of the ranges.
        dtype: that scales are stored in.
    """
    tiny = float(np.finfo(dtype).tiny)
    small = np.asarray(scale < tiny)
    if dtype == np.float16:  # 6e-5 is no scale of nothing
        degenerate = np.asarray(width == 0)
        scale = np.where(small, tiny, scale)
    else:
        degenerate = small
    return np.where(degenerate, 1.0, scale), degenerate


def snap_zero_point_to_uint8(
    rmin: Any,
    rmax: Any,
    qmin: int = 0,
    qmax: int = 255,
    min_real_range: float | None = None,
) -> tuple[Array, Array]:
    """Return a uint8 zero point at the lowest or the middle code, and a scale for all of a range.

    Args:
        rmin: smallest value, or one for each scale; below 0 the zero point is the middle code.
        rmax: largest value, of the same shape; its type is that of the scale, if it is a float16,
            else the scale is a float32.
        qmin: smallest code.
        qmax: largest code.
        min_real_range: smallest width of the range; its upper end gives way.

    Raises:
        QuantizationError: an end is not finite (a ``ValueError``).
    """
    start, end = _ends(rmin, rmax)
    dtype = end.dtype if end.dtype == np.float16 else np.dtype(np.float32)
    low, high = float(qmin), float(qmax)
    middle = float((int(qmin) + int(qmax) + 1) // 2)
    below = np.minimum(start.astype(np.float64).squeeze(), 0.0)
    above = np.maximum(end.astype(np.float64).squeeze(), 0.0)
    least = 0.0 if min_real_range is None else float(min_real_range)
    if least > 0:
        above = np.maximum(above, below + least)
    both_sides = np.maximum(-below / max(1.0, middle - low), above / (high - middle))
    scale = np.where(below < 0, both_sides, above / (high - low))
    # no range at all: one step of a range of width 1
    scale = np.where(above > below, scale, 1.0 / (high - low))
    stored = np.maximum(scale, least / (high - low)).astype(dtype)
    if dtype == np.float16:
        stored = np.maximum(stored, np.finfo(dtype).tiny)
    return np.where(below < 0, middle, low).astype(np.uint8), np.asarray(stored)


@lru_cache(maxsize=1)
def _float8_spread() -> np.float32:
    """Return the standard deviation of all finite numbers of float8 e4m3fn."""
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    spread: np.float32 = np.std(numbers[np.isfinite(numbers)])
    return spread


def compute_scale_zp_float8(element_type: int, std: Any) -> list[Array]:
    """Return ``[0, scale]``, the scale that gives data the spread of all float8 numbers.

    Args:
        element_type: ``TensorProto.FLOAT8E4M3FN``.
        std: standard deviation of the data, whose type the scale has; 0 gives scale 1.

    Raises:
        QuantizationError: another type (a ``ValueError``).
        InvalidModelError: ``std`` is not finite (a ``RuntimeError``).
    """
    if element_type != TensorProto.FLOAT8E4M3FN:
        raise QuantizationError(
            f"Quantization to element_type={data_type_name(element_type)} not implemented."
        )
    spread = std if hasattr(std, "dtype") else np.float32(std)
    if not np.isfinite(spread).all():
        raise InvalidModelError(
            f"a standard deviation of {spread} gives no scale; look for NaN or infinity in the data"
        )
    scale = np.asarray(spread / _float8_spread(), spread.dtype)
    tiny = np.finfo(scale.dtype).tiny if scale.dtype == np.float16 else 0
    scale = np.where(spread > 0, np.maximum(scale, tiny), 1).astype(spread.dtype)
    return [np.array(0, ml_dtypes.float8_e4m3fn), np.asarray(scale)]


def compute_data_quant_params(
    data: Array,
    quant_type: int,
    symmetric: bool,
    reduce_range: bool = False,
    min_real_range: float | None = None,
    rmin_override: float | None = None,
    rmax_override: float | None = None,
) -> tuple[Array, Array]:
    """Return zero point and scale, 0-d, of all of ``data``; the scale has its type.

    Args:
        data: floats of any shape. Without elements they get zero point 0 and scale 1.
        quant_type: ``TensorProto.DataType`` of the codes.
        symmetric: the zero point is the middle code.
        reduce_range: use half of the codes.
        min_real_range: smallest width of the range.
        rmin_override: taken for the smallest value.
        rmax_override: taken for the largest value.

    Raises:
        TypeError: ``data`` is no array.
        QuantizationError: no type of codes, or data that is not finite (a ``ValueError``).
        InvalidModelError: float 8 with ``reduce_range``, or of such data (a ``RuntimeError``).
    """
    if not isinstance(data, np.ndarray):
        raise TypeError(f"Weight must be given as an array not {type(data)}.")
    if quant_type == TensorProto.FLOAT8E4M3FN:
        return float8_params(data.reshape(1, -1), reduce_range)
    qmin, qmax = get_qmin_qmax_for_qType(quant_type, reduce_range, symmetric=symmetric)
    if not data.size:
        return np.array(0, qmin.dtype), np.array(1.0, data.dtype)
    rmin = data.min() if rmin_override is None else np.asarray(rmin_override, data.dtype)
    rmax = data.max() if rmax_override is None else np.asarray(rmax_override, data.dtype)
    zero_point, scale = compute_scale_zp(
        rmin.reshape(()), rmax.reshape(()), qmin, qmax, symmetric, min_real_range
    )
    return zero_point, scale


def float8_params(rows: Array, reduce_range: bool) -> tuple[Array, Array]:
    """Return zero points and scales of float8 codes, one for each of ``rows`` ``[C, N]``.

    Rows that hold one number only get a scale that makes it the code of 1; they have no spread.
    A single row gets 0-d arrays.

    Raises:
        InvalidModelError: ``reduce_range``, which float 8 has not (a ``RuntimeError``).
    """
    if reduce_range:
        raise InvalidModelError("Unsupported option reduce_range=True for float 8.")
    if not rows.size:
        ones = np.ones(rows.shape[0], rows.dtype)
        return _alone(ones.astype(ml_dtypes.float8_e4m3fn) * 0), _alone(ones)
    _, scale = compute_scale_zp_float8(TensorProto.FLOAT8E4M3FN, np.std(rows, axis=1))
    largest = np.abs(rows).max(axis=1)
    constant = (rows == rows[:, :1]).all(axis=1) & (largest > 0)
    scale = np.where(constant, largest, scale)
    return _alone(np.zeros(scale.shape, ml_dtypes.float8_e4m3fn)), _alone(scale)


def _alone(values: Array) -> Array:
    return values.reshape(()) if values.size == 1 else values
