"""The rows of a matrix cut into blocks, and the numbers that codes of a block stand for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.nbits.blocks import Blocks


def split(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the blocks of a matrix and which of their values it has.

    Args:
        weight: ``[N, K]``.
        block_size: 0 for one block a row.

    Returns:
        Blocks ``[N, ceil(K / block_size), block_size]``, the last filled up with its last value,
        which changes no extreme; and 1.0 or 0.0, ``[ceil(K / block_size), block_size]``.
    """
    inputs = weight.shape[1]
    size = block_size or inputs
    rest = -inputs % size
    filled = torch.cat([weight, weight[:, -1:].expand(-1, rest)], 1) if rest else weight
    present = F.pad(torch.ones(inputs, device=weight.device), (0, rest))
    return filled.reshape(len(weight), -1, size), present.reshape(-1, size)


def join(codes: Tensor, inputs: int) -> Tensor:
    """Return the codes of blocks as a matrix uint8 ``[N, K]``."""
    return codes.flatten(1)[:, :inputs].to(torch.uint8).contiguous()


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales as they will be stored, in float32; 0 becomes 1, and none underflows to 0."""
    scale = torch.where(scale == 0, 1.0, scale)
    tiny = torch.finfo(dtype).tiny
    return torch.where(scale < 0, scale.clamp(max=-tiny), scale.clamp(min=tiny)).to(dtype).float()


def codes_of(values: Tensor, scale: Tensor, zero_point: Tensor | float, top: int) -> Tensor:
    """Return codes from 0 to ``top``, as floats."""
    return (values / scale + zero_point).round_().clamp_(0, top)


def dequantize(blocks: Blocks) -> Tensor:
    """Return the matrix ``[N, K]`` that codes stand for, in the dtype of the scale."""
    inputs = blocks.codes.shape[1]
    size = blocks.format.block_size or inputs

    def spread(values: Tensor) -> Tensor:
        return values.float().repeat_interleave(size, 1)[:, :inputs]

    middle = 2 ** (blocks.format.bits - 1)
    zero_point = middle if blocks.zero_point is None else spread(blocks.zero_point)
    return ((blocks.codes.float() - zero_point) * spread(blocks.scale)).to(blocks.scale.dtype)
