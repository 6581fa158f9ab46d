"""Codes of a few bits as the bytes of a file, and back."""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
from torch import Tensor

from qwrap.errors import ConfigError
from qwrap.model.tensors import to_numpy
from qwrap.nbits.blocks import Blocks

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


def pack(codes: Bytes, bits: int, fill: int = 0) -> Bytes:
    """Return codes as bytes, packed along the last axis, the first code in the lowest bits.

    Args:
        codes: uint8, each below ``2**bits``.
        bits: 1, 2, 4 or 8.
        fill: the code that completes the last byte.
    """
    if bits == 8:
        return np.ascontiguousarray(codes)
    count = 8 // bits
    if rest := -codes.shape[-1] % count:
        widths = [(0, 0)] * (codes.ndim - 1) + [(0, rest)]
        codes = np.pad(codes, widths, constant_values=fill)
    packed: Bytes = codes[..., ::count].copy()
    for i in range(1, count):
        packed |= codes[..., i::count] << np.uint8(bits * i)
    return packed


def unpack(packed: Bytes, bits: int, size: int | None = None) -> Bytes:
    """Return the codes that bytes hold along the last axis, the first ``size`` of them if given."""
    if bits == 8:
        return packed[..., :size]
    count = 8 // bits
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * count), np.uint8)
    for i in range(count):
        np.right_shift(packed, np.uint8(bits * i), out=codes[..., i::count])
    codes &= np.uint8(2**bits - 1)
    return codes[..., :size]


# --- MatMulNBits ---------------------------------------------------------------------------------


def operator_arrays(blocks: Blocks) -> dict[Literal["codes", "scale", "zero_point"], Array]:
    """Return what MatMulNBits reads.

    Returns:
        ``codes`` uint8 ``[N, ceil(K / block), block * bits / 8]``, where what is beyond K is 0;
        ``scale`` ``[N, ceil(K / block)]``; and, of a matrix that has them, ``zero_point``, packed
        uint8 ``[N, ceil(ceil(K / block) * bits / 8)]``, the last byte completed with the middle
        code, or floats like ``scale`` but flat.
    """
    blocks = blocks.stored()
    bits, (outputs, inputs) = blocks.format.bits, blocks.codes.shape
    count = blocks.scale.shape[1]
    size = blocks.format.block_size or inputs
    codes = to_numpy(blocks.codes)
    if padding := count * size - inputs:
        codes = np.pad(codes, ((0, 0), (0, padding)))
    arrays: dict[Literal["codes", "scale", "zero_point"], Array] = {
        "codes": pack(codes, bits).reshape(outputs, count, -1),
        "scale": np.ascontiguousarray(to_numpy(blocks.scale)),
    }
    if blocks.zero_point is not None:
        zero_point = to_numpy(blocks.zero_point)
        if blocks.zero_point.is_floating_point():
            arrays["zero_point"] = zero_point.reshape(-1)
        else:
            arrays["zero_point"] = pack(zero_point, bits, fill=2 ** (bits - 1))
    return arrays


# --- DequantizeLinear ----------------------------------------------------------------------------

INTEGERS = {
    (2, True): ml_dtypes.int2,
    (2, False): ml_dtypes.uint2,
    (4, True): ml_dtypes.int4,
    (4, False): ml_dtypes.uint4,
    (8, True): np.int8,
    (8, False): np.uint8,
}
"""Element types of ONNX by bits and sign."""


def integers(codes: Tensor, bits: int, *, signed: bool) -> Array:
    """Return codes in the element type of ONNX: 0 is then the middle code if it is signed."""
    array = to_numpy(codes)
    if signed:
        array = (array ^ np.uint8(2 ** (bits - 1))).astype(np.uint8)
        shift = 8 - bits  # the sign bit of few bits becomes that of a byte, and spreads
        array = (array << np.uint8(shift)).view(np.int8) >> np.int8(shift)
    return array.astype(INTEGERS[bits, signed])


def pair_arrays(
    blocks: Blocks, *, transposed: bool = False
) -> dict[Literal["codes", "scale", "zero_point"], Array]:
    """Return what a blocked DequantizeLinear reads.

    Args:
        blocks: the matrix.
        transposed: leave it ``[N, K]``, which is read with ``axis=1``; else with ``axis=0``.

    Returns:
        ``codes`` ``[K, N]``, signed if there are no zero points; ``scale``
        ``[ceil(K / block), N]``; ``zero_point`` like ``scale``, if the matrix has them.

    Raises:
        ConfigError: zero points are floats.
    """
    blocks = blocks.stored()
    bits, signed = blocks.format.bits, blocks.zero_point is None

    def turned(matrix: Tensor) -> Tensor:
        return matrix if transposed else matrix.T.contiguous()

    arrays: dict[Literal["codes", "scale", "zero_point"], Array] = {
        "codes": integers(turned(blocks.codes), bits, signed=signed),
        "scale": to_numpy(turned(blocks.scale)),
    }
    if blocks.zero_point is not None:
        if blocks.zero_point.is_floating_point():
            raise ConfigError(
                "DequantizeLinear takes integer zero points, and this method's are floats; "
                'use form="operator", or another method'
            )
        arrays["zero_point"] = integers(turned(blocks.zero_point), bits, signed=False)
    return arrays
