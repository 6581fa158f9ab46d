"""AIMET's and QNN's way to say where zero is: an offset on a grid that counts from 0.

A code ``u`` of ``0 … 2^bits - 1`` stands for ``(u + offset) * scale``, so that the offset is minus
the zero point of the unsigned type. What is symmetric has signed codes ``u - 2^(bits-1)``, and its
offset is ``-2^(bits-1)``; "strictly symmetric", where the smallest code is unused, it is one more.

Source: AIMET, encoding specification 0.4.0 to 1.0.0; QAIRT, Quantization Specification.
"""

from __future__ import annotations

import numpy as np
import torch

from qwrap.config import QuantSpec
from qwrap.dtypes import INT32, QuantType, integer_type
from qwrap.errors import TableError
from qwrap.numerics import QParams
from qwrap.quant.tables.document import Array
from qwrap.quant.tables.tensor_range import Lpbq, TensorRange


def codes(bits: int, symmetric: bool) -> QuantType:
    """Return the type of the codes of an integer encoding.

    Raises:
        TableError: there is none of so many bits.
    """
    if 2 <= bits <= 16:
        return integer_type(bits, signed=symmetric)
    if bits == INT32.bits and symmetric:
        return INT32
    kind = "symmetric" if symmetric else "asymmetric"
    raise TableError(f"{bits} bits, {kind}: expected 2 to 16, or 32 symmetric ones")


def is_symmetric(entry: TensorRange) -> bool:
    """Return whether an encoding calls these codes symmetric: signed, with 0 for zero."""
    assert entry.dtype is not None
    return entry.dtype.signed and bool(entry.symmetric)


def offsets(entry: TensorRange) -> Array:
    """Return the offsets of an integer range, int64, in the shape of its scale."""
    assert entry.dtype is not None
    assert entry.zero_point is not None
    return int(entry.dtype.qmin) - entry.zero_point.astype(np.int64)


def on_grid(
    scale: Array,
    offset: Array,
    bits: int,
    symmetric: bool,
    *,
    block_size: int | None = None,
    stored: bool = False,
    lpbq: Lpbq | None = None,
) -> TensorRange:
    """Return the range of an encoding.

    Args:
        scale: one without dimensions, or one after the other.
        offset: of the shape of ``scale``.
        bits: of a code.
        symmetric: whether the codes are signed.
        block_size: values that share a scale.
        stored: whether the tensor is a weight.
        lpbq: how the scales are made.

    Raises:
        TableError: the numbers make no range.
    """
    if scale.shape != offset.shape:
        raise TableError(
            f"has {scale.size} scales and {offset.size} offsets; expected as many of both"
        )
    dtype = codes(bits, symmetric)
    if symmetric and (offset == 1 - 2 ** (bits - 1)).all():
        spec = QuantSpec(dtype=dtype, narrow_range=True)
        zero_point = np.zeros(scale.shape)
    else:
        spec = QuantSpec(dtype=dtype)
        zero_point = dtype.qmin - offset
    return encoded(scale, zero_point, spec, block_size=block_size, stored=stored, lpbq=lpbq)


def encoded(
    scale: Array,
    zero_point: Array,
    spec: QuantSpec,
    *,
    axis: int | None = None,
    block_size: int | None = None,
    stored: bool = False,
    lpbq: Lpbq | None = None,
) -> TensorRange:
    """Return the range of scales and zero points as a file says them, after checking them.

    Args:
        scale: float64 of any shape.
        zero_point: float64 of the same shape.
        spec: gives type and codes.
        axis: of channels or blocks.
        block_size: values that share a scale.
        stored: whether the tensor is a weight.
        lpbq: how the scales are made.

    Raises:
        TableError: the numbers make no scale or zero point.
    """
    # Refuses what is no scale or zero point, with a range that is none of its concern.
    checked = TensorRange(
        np.zeros(scale.shape),
        np.zeros(scale.shape),
        scale=scale,
        zero_point=zero_point,
        dtype=spec.dtype,
        axis=axis,
        block_size=block_size,
    )
    assert checked.scale is not None
    assert checked.zero_point is not None
    qparams = QParams(
        torch.from_numpy(checked.scale), torch.from_numpy(checked.zero_point), axis, block_size
    )
    return TensorRange.from_qparams(qparams, spec, stored=stored, lpbq=lpbq)


def require_scale(entry: TensorRange, form: str) -> QuantType:
    """Return the type of the codes of a range that ``form`` can hold.

    Raises:
        TableError: it has no scale, or the type has no place in the form.
    """
    if entry.scale is None or entry.dtype is None:
        raise TableError(
            f"has a range but no scale, which {form} needs; give it one: table.with_scales(spec)"
        )
    if entry.dtype.codebook or not (entry.dtype.is_integer or entry.dtype.is_standard):
        raise TableError(f"{form} cannot hold codes of type {entry.dtype}")
    return entry.dtype


def require_integers(entry: TensorRange, form: str) -> QuantType:
    """Return the type of the codes of a range that ``form``, which has integers alone, can hold.

    Raises:
        TableError: it has no scale, or the type has no place in the form.
    """
    dtype = require_scale(entry, form)
    if not dtype.is_integer:
        raise TableError(f"{form} cannot hold codes of type {dtype}; write aimet-2.0.0")
    return dtype
