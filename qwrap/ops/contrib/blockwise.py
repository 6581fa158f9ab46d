"""Weights in blocks of a few bits, each with a scale of its own; activations stay float."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import UnsupportedOpError
from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.limits import at_least, one_of

BITS = one_of(2, 4, 8)
INT8_STEPS = 127.0  # largest magnitude of the codes of ``accuracy_level=4``


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Return the numbers of 2, 4 or 8 bits that bytes hold along the last axis, lowest first."""
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


@microsoft(
    "MatMulNBits",
    allowed={
        "K": at_least(1),
        "N": at_least(1),
        "bits": BITS,
        "block_size": at_least(1),
        "weight_prepacked": one_of(0),  # the layout of others is a device's own
    },
)
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
    """
    del weight_prepacked
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


FP4_MAGNITUDES = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
"""What the first 8 codes of bitsandbytes' FP4 stand for; the others have the other sign."""


NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""What the codes of NF4 stand for: quantiles of a normal distribution.

Source: Dettmers et al., arXiv:2305.14314, appendix E.
"""


@microsoft("MatMulBnb4", ignored=("training_mode",))
def matmul_bnb_4(
    A: Tensor,
    B: Tensor,
    absmax: Tensor,
    *,
    K: int,
    N: int,
    block_size: int,
    quant_type: int,
    transB: int = 1,
) -> Tensor:
    """Return ``A @ W.T``, or ``A @ W`` without ``transB``, with a weight of bitsandbytes.

    Args:
        A: ``[..., K]``, or ``[..., N]`` without ``transB``.
        B: uint8: two codes of ``W`` ``[N, K]`` a byte, row after row, the high one first.
        absmax: the largest magnitude of each ``block_size`` consecutive numbers.
        K: columns of the weight.
        N: rows of the weight.
        block_size: consecutive numbers with one scale.
        quant_type: 0 for FP4, 1 for NF4.
    """
    fp4 = (*FP4_MAGNITUDES, *(-m for m in FP4_MAGNITUDES))
    values = torch.tensor(NF4_VALUES if quant_type else fp4, device=A.device)
    packed = B.flatten()
    codes = torch.stack((packed >> 4, packed & 15), -1).flatten()[: N * K]
    scales = absmax.flatten().repeat_interleave(block_size)[: N * K]
    weight = (values[codes.long()] * scales).reshape(N, K).to(A.dtype)
    return F.linear(A, weight) if transB else torch.matmul(A, weight)


@microsoft("GatherBlockQuantized", allowed={"bits": BITS})
def gather_block_quantized(
    data: Tensor,
    indices: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
) -> Tensor:
    """Return slices of a quantized table as real numbers.

    Args:
        data: int4 or uint4 codes, one an element; or uint8 that holds ``bits`` each, packed along
            the last axis; or 8-bit floats.
        indices: which slices along ``gather_axis``; those out of range are all zero.
        scales: as ``data``, one per block along ``quantize_axis``; other axes may be 1.
        zero_points: codes as in ``data``; if None 0, for packed ones the middle.
        bits: 2, 4 or 8, of packed codes.
        block_size: consecutive elements with one scale; all if 0.
        gather_axis: the axis that ``indices`` count along.
        quantize_axis: the axis along which blocks lie.

    Raises:
        UnsupportedOpError: shapes do not tell packed codes from others.
    """
    axis, along = gather_axis % data.ndim, quantize_axis % data.ndim
    zero: Tensor | float = 0.0
    if data.dtype == torch.uint8 and _is_packed(data, scales, bits, block_size, along):
        data, zero = unpacked(data, bits), float(2 ** (bits - 1))
        if zero_points is not None:
            zero_points = unpacked(zero_points, bits)[..., : scales.shape[-1]]
    count = data.shape[axis]
    chosen = torch.where(indices < 0, indices + count, indices).long()
    inside = (chosen >= 0) & (chosen < count)
    flat = chosen.clamp(0, count - 1).flatten()

    def gathered(table: Tensor) -> Tensor:
        shared = table.shape[axis] == 1 and count != 1
        return table if shared else table.index_select(axis, flat)

    scale = _spread_blocks(scales, data.shape[along], along, block_size)
    if zero_points is not None:
        zero = gathered(_spread_blocks(zero_points, data.shape[along], along, block_size)).float()
    values = (data.index_select(axis, flat).float() - zero) * gathered(scale).float()
    rest = [1] * (data.ndim - axis - 1)
    values = values * inside.flatten().reshape(-1, *rest)
    shape = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
    return values.reshape(shape).to(scales.dtype)


def _is_packed(data: Tensor, scales: Tensor, bits: int, block_size: int, along: int) -> bool:
    """Tell from the shape of scales whether bytes hold several codes, or one of 4 bits each."""
    last = data.ndim - 1

    def fits(size: int) -> bool:
        wanted = -(-size // block_size) if along == last else size
        return scales.shape[last] == wanted

    packed = fits(data.shape[last] * (8 // bits))
    if packed and fits(data.shape[last]) and bits != 8:
        raise UnsupportedOpError(
            f"GatherBlockQuantized: data {list(data.shape)} and scales {list(scales.shape)} fit "
            "packed codes and codes of one a byte; use a smaller block_size"
        )
    return packed


def _spread_blocks(blocks: Tensor, size: int, axis: int, block_size: int) -> Tensor:
    """Repeat what belongs to blocks along ``axis`` for each of ``size`` elements."""
    if not block_size or blocks.shape[axis] == 1:
        return blocks
    return blocks.repeat_interleave(block_size, axis).narrow(axis, 0, size)
