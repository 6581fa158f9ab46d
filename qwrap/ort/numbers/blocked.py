"""Blocks: one scale for every ``block_size`` consecutive elements along an axis, of any rank.

As in ONNX QuantizeLinear-21: scales have the rank of the tensor, with ``ceil(D / block_size)`` in
place of the D elements of the axis. The last block may be shorter.
"""

from __future__ import annotations

import numpy as np

from qwrap.ort.errors import QuantizationError
from qwrap.ort.numbers.code_types import Array, get_qmin_qmax_for_qType
from qwrap.ort.numbers.scales import usable_scales


def compute_scale_zp_blocked(
    weight: Array, quant_type: int, axis: int, block_size: int, symmetric: bool
) -> tuple[Array, Array]:
    """Return zero points and scales of the blocks of a tensor of any rank above 0.

    Blocks of zeros get scale 1, and the middle code or 0 as zero point.

    Args:
        weight: floats, whose type the scales have.
        quant_type: ``TensorProto.DataType`` of the codes.
        axis: along which blocks run; may be negative.
        block_size: elements of a block.
        symmetric: the zero point is the middle code.

    Raises:
        QuantizationError: ``axis`` or ``block_size`` is out of range, or a value is not finite
            (a ``ValueError``).
        NotImplementedError: float 8.

    Source: onnxruntime/quantization/quant_utils.py, 1.31, which has rank 2 only.
    """
    qmin, qmax = get_qmin_qmax_for_qType(quant_type, reduce_range=False, symmetric=symmetric)
    blocks, axis = split_blocks(weight, axis, block_size)
    zero = weight.dtype.type(0)
    low, high = blocks.min(axis + 1, initial=zero), blocks.max(axis + 1, initial=zero)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise QuantizationError("a block holds NaN or infinity and has no scale")
    if symmetric:
        high = np.maximum(np.abs(low), np.abs(high))
        low = -high
    width = _width(low, high)
    raw = (width / (float(qmax) - float(qmin))).astype(weight.dtype)
    exact, degenerate = usable_scales(raw.astype(np.float64), width, weight.dtype)
    if symmetric:
        zeros = np.full(raw.shape, np.round((float(qmin) + float(qmax)) / 2.0))
    else:
        zeros = np.round(float(qmin) - low.astype(np.float64) / exact)
        zeros = np.where(degenerate, 0.0, zeros.clip(float(qmin), float(qmax)))
    return zeros.astype(qmin.dtype), exact.astype(weight.dtype)


def _width(low: Array, high: Array) -> Array:
    """Return ``high - low`` rounded to their own type, or exactly where that overflows."""
    with np.errstate(over="ignore"):
        width = (high - low).astype(np.float64)
    return np.where(np.isinf(width), high.astype(np.float64) - low.astype(np.float64), width)


def split_blocks(values: Array, axis: int, block_size: int) -> tuple[Array, int]:
    """Return ``values`` with ``axis`` split into blocks and their elements, and the axis, positive.

    A view where no block is cut off; else the last one is filled up with zeros.

    Raises:
        QuantizationError: ``axis`` or ``block_size`` is out of range (a ``ValueError``).
    """
    if not -values.ndim <= axis < values.ndim:
        raise QuantizationError(f"blocks along axis {axis} of a tensor of shape {values.shape}")
    if block_size < 1:
        raise QuantizationError(f"a block of {block_size} elements; give 1 or more")
    axis %= values.ndim
    size = values.shape[axis]
    count = -(-size // block_size)
    missing = count * block_size - size
    if missing:
        values = np.pad(values, [(0, missing * (i == axis)) for i in range(values.ndim)])
    shape = (*values.shape[:axis], count, block_size, *values.shape[axis + 1 :])
    return values.reshape(shape), axis


def join_blocks(blocks: Array, axis: int, size: int) -> Array:
    """Return what ``split_blocks`` split, ``size`` elements along ``axis``."""
    shape = (*blocks.shape[:axis], -1, *blocks.shape[axis + 2 :])
    joined = blocks.reshape(shape)
    return joined if joined.shape[axis] == size else joined.take(range(size), axis)
