"""K-quants: scale and smallest value of a block fitted to its weights by least squares."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qwrap.nbits.blocks import BlockFormat, Blocks
from qwrap.nbits.split import codes_of, join, split, stored_scale

STEPS = 20
WIDEST, FINEST = -1.0, 0.1  # steps more or less over a block's range than there are, and how finely
CHUNK = 2**15  # values worked on at once in each of the steps: what a cache holds


@torch.no_grad()
def k_quant(weight: Tensor, form: BlockFormat, _statistics: object = None) -> Blocks:
    """Return a matrix as codes with zero points that minimise weighted squared errors.

    A weight counts by its size and the root of its block's mean square. For each block 20 ranges
    are tried: the codes that come of one are fitted by a straight line, and of its scale and zero
    point, once rounded, the best is kept; rounding to nearest over the whole range is one of those
    to choose from. ``form.symmetric`` means nothing here.

    Args:
        weight: floats ``[N, K]``, outputs and inputs.
        form: bits and block size.

    Source: ``make_qkx2_quants`` of llama.cpp (ggml-quants.c), with whole zero points instead of
    smallest values.
    """
    blocks, present = split(weight.float(), form.block_size)
    count = blocks.shape[1]
    flat, mask = blocks.flatten(0, 1), present.repeat(len(blocks), 1)
    rows = max(CHUNK // flat.shape[1], 1)
    found = [
        _fit(x, m, form.bits, weight.dtype)
        for x, m in zip(torch.split(flat, rows), torch.split(mask, rows), strict=True)
    ]
    codes, scale, zero_point = (
        torch.cat(parts).reshape(len(blocks), count, -1) for parts in zip(*found, strict=True)
    )
    return Blocks(
        join(codes, weight.shape[1]),
        scale[..., 0].to(weight.dtype),
        zero_point[..., 0].to(torch.uint8),
        replace(form, symmetric=False),
    )


def _fit(x: Tensor, present: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return codes ``[B, size]``, scales and zero points ``[B]`` of blocks ``[B, size]``."""
    top = 2**bits - 1
    mean_square = (x.square() * present).sum(1, keepdim=True) / present.sum(1, keepdim=True)
    importance = (mean_square.sqrt() + x.abs()) * present
    scale, zero_point = _candidates(x, importance, top)
    scale = stored_scale(scale, dtype)
    codes = codes_of(x, scale, zero_point, top)  # [S, B, size]
    errors = ((codes - zero_point) * scale - x).square_().mul_(importance).sum(-1)
    best = errors.argmin(0)  # the first of equals, which is rounding to nearest

    def chosen(values: Tensor) -> Tensor:
        return values.gather(0, best[None, :, None].expand(1, -1, values.shape[2]))[0]

    return chosen(codes), chosen(scale)[:, 0], chosen(zero_point)[:, 0]


def _candidates(x: Tensor, importance: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return scales and whole zero points to choose from, ``[S, B, 1]``."""
    low = x.amin(1, keepdim=True).clamp(max=0)
    width = x.amax(1, keepdim=True).clamp(min=0) - low
    nearest = torch.where(width > 0, width / top, 1.0)
    intervals = top + WIDEST + FINEST * torch.arange(STEPS, device=x.device)
    tried = width / intervals[:, None, None]
    codes = codes_of(x - low, torch.where(tried > 0, tried, 1.0), 0.0, top)
    scale, smallest = _line(x, codes, importance)
    usable = (scale > 0) & scale.isfinite() & smallest.isfinite()
    scale = torch.where(usable, scale, nearest)
    smallest = torch.where(usable, smallest, low)
    zero_point = (-smallest / scale).round_().clamp_(0, top)
    # With the zero point a whole number, another scale is best for these codes.
    steps = codes - zero_point
    weighted = importance * steps
    power = (weighted * steps).sum(-1, keepdim=True)
    refitted = (weighted * x).sum(-1, keepdim=True) / power
    scale = torch.where((power > 0) & (refitted > 0), refitted, scale)
    whole = (-low / nearest).round_().clamp_(0, top)
    return torch.cat([nearest[None], scale]), torch.cat([whole[None], zero_point])


def _line(x: Tensor, codes: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Return slope and intercept of ``x`` over codes ``[S, B, size]``, intercepts at most 0."""

    def total(values: Tensor) -> Tensor:
        return values.sum(-1, keepdim=True)

    weighted = importance * codes
    w, wx, wq = total(importance), total(importance * x), total(weighted)
    wqq, wqx = total(weighted * codes), total(weighted * x)
    determinant = w * wqq - wq.square()
    slope = (w * wqx - wx * wq) / determinant
    intercept = (wqq * wx - wq * wqx) / determinant
    through_zero = intercept > 0
    return torch.where(through_zero, wqx / wqq, slope), intercept.clamp(max=0)
