"""Round to nearest by Neural Compressor's rules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.nbits.blocks import BlockFormat, Blocks
from qwrap.nbits.rtn import AT_ONCE


@torch.no_grad()
def round_in_range(
    weight: Tensor, form: BlockFormat, _statistics: object = None, *, ratio: float = 1.0
) -> Blocks:
    """Return a matrix as codes that span the range of each block, or a share of it.

    Symmetric: from minus to plus the largest magnitude, so that the highest code is used as well as
    the lowest. Asymmetric: from the smallest to the largest value and 0. What lies half way between
    two codes goes to the even one.

    Args:
        weight: floats ``[N, K]``.
        form: bits, block size, symmetry.
        ratio: the share, above 0; what is beyond is clipped.

    Source: ``quant_tensor`` of Neural Compressor, of which this differs in blocks that lie on one
    side of 0: there the codes do not reach from the smallest value, whose zero point would be out
    of range.
    """
    weight = weight.contiguous()
    rows = max(1, AT_ONCE // max(1, weight.shape[1]))
    parts = [_round(part, form, ratio) for part in torch.split(weight, rows)]
    codes, scale, zero_point = (torch.cat(column) for column in zip(*parts, strict=True))
    return Blocks(codes, scale, None if form.symmetric else zero_point, form)


def _round(weight: Tensor, form: BlockFormat, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    inputs, size = weight.shape[1], form.block_size or weight.shape[1]
    padded = F.pad(weight.float(), (0, -inputs % size))
    blocks = padded.reshape(len(weight), -1, size)
    low, high = blocks.amin(-1, keepdim=True) * ratio, blocks.amax(-1, keepdim=True) * ratio
    top, middle = 2**form.bits - 1, 2 ** (form.bits - 1)
    if form.symmetric:
        high = torch.maximum(low.abs(), high.abs())
        low = -high
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    width = (high.double() - low.double()) / top
    scale = torch.where(width == 0, 1.0, width).to(weight.dtype)
    stored = torch.where(scale == 0, 1.0, scale.double())
    if form.symmetric:
        zero_point = torch.full_like(stored, middle)
    else:
        zero_point = (-low / stored).round_().clamp_(0, top)
    codes = (blocks / stored + zero_point).round_().clamp_(0, top)
    whole = codes.flatten(1)[:, :inputs].to(torch.uint8)
    return whole, scale[..., 0], zero_point[..., 0].to(torch.uint8)
