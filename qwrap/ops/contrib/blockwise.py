"""Weights in blocks of a few bits, each with a scale of its own; activations stay float."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import UnsupportedOpError
from qwrap.ops.contrib.domain import microsoft

INT8_STEPS = 127.0  # largest magnitude of the codes of ``accuracy_level=4``


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Return the numbers that bytes hold along the last axis, the lowest bits first.

    Raises:
        UnsupportedOpError: ``bits`` is not 2, 4 or 8.
    """
    if bits not in (2, 4, 8):
        raise UnsupportedOpError(f"weights of {bits} bits; 2, 4 and 8 are supported")
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    parts: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return parts.flatten(-2)


def _zero_points(zero_points: Tensor | None, scales: Tensor, bits: int) -> Tensor | float:
    """Return zero points of the shape of ``scales``; without any, the middle of the codes."""
    if zero_points is None:
        return float(2 ** (bits - 1))
    if zero_points.dtype != torch.uint8:
        return zero_points.reshape(scales.shape).to(scales.dtype)
    rows = zero_points.reshape(scales.shape[0], -1)
    return unpacked(rows, bits)[:, : scales.shape[1]].to(scales.dtype)


def _as_int8_blocks(A: Tensor, block_size: int) -> Tensor:
    """Return ``A`` rounded to 255 steps in each block of its last axis; gradients pass through."""
    size = A.shape[-1]
    padded = F.pad(A.detach().float(), (0, -size % block_size))
    blocks = padded.reshape(*A.shape[:-1], -1, block_size)
    scale = blocks.abs().amax(-1, keepdim=True) / INT8_STEPS
    steps = (blocks / torch.where(scale > 0, scale, 1.0)).round()
    rounded = (steps * scale).flatten(-2)[..., :size]
    change: Tensor = rounded.to(A.dtype) - A.detach()
    return A + change


@microsoft("MatMulNBits")
def matmul_n_bits(
    A: Tensor,
    B: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    block_size: int,
    accuracy_level: int = 0,
    bits: int = 4,
    weight_prepacked: int = 0,
) -> Tensor:
    """Return ``A @ W.T + bias``, where ``W`` ``[N, K]`` is kept as codes of few bits.

    Args:
        A: ``[..., K]``.
        B: uint8 ``[N, blocks, block_size * bits / 8]``.
        scales: ``[N, blocks]``, or flat.
        zero_points: uint8, packed like the codes, or floats ``[N, blocks]``; the middle if None.
        g_idx: the block whose scale and zero point each of the K columns has.
        bias: ``[N]``.
        K: columns of the weight.
        N: rows of the weight.
        block_size: consecutive columns with one scale.
        accuracy_level: 4 rounds ``A`` to int8 in blocks, as onnxruntime's kernel then does; other
            levels allow a kernel to compute in fewer bits than float32, which this does not.
        bits: 2, 4 or 8.
        weight_prepacked: must be 0: the codes lie as described.

    Raises:
        UnsupportedOpError: another number of bits, or prepacked weights.
    """
    if weight_prepacked:
        raise UnsupportedOpError("MatMulNBits with prepacked weights: the layout is a device's own")
    scales = scales.reshape(N, -1)
    codes = unpacked(B.reshape(N, scales.shape[1], -1), bits).to(scales.dtype)
    zero = _zero_points(zero_points, scales, bits)
    if g_idx is None:
        zero = zero.unsqueeze(-1) if isinstance(zero, Tensor) else zero
        weight = ((codes - zero) * scales.unsqueeze(-1)).flatten(1)[:, :K]
    else:
        blocks = g_idx.long()
        zero = zero[:, blocks] if isinstance(zero, Tensor) else zero
        weight = (codes.flatten(1)[:, :K] - zero) * scales[:, blocks]
    packed_zero = zero_points is None or zero_points.dtype == torch.uint8
    if accuracy_level == 4 and g_idx is None and packed_zero and (bits, block_size) != (2, 16):
        return F.linear(_as_int8_blocks(A, block_size), weight.to(A.dtype), bias)
    return F.linear(A, weight.to(A.dtype), bias)
