"""Which values of a tensor go into a histogram: a choice that each sample makes by itself."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_STRIDE = 64
_LEAST_PER_CHANNEL = 16
_KEYS = 16  # values of a row that decide where its sample starts
_COARSE = 0x7FFF0000  # exponent and 7 bits of the mantissa, not the sign, which zeros have too
# Odd numbers with bits all over, of which even the last is below 2^63.
_FIRST_FACTOR, _FACTOR_STEP = 0x2545F4914F6CDD1D, 0x04C957F2D5A3B1E6


@dataclass(frozen=True, slots=True)
class Sample:
    """Some values of a tensor.

    Attributes:
        values: 1-D, in the type of the tensor.
        weight: how many values each of them stands for.
        rows: int64, the channel that each belongs to; None without ``axis``.
        usable: which of them to count, None for all.
    """

    values: Tensor
    weight: int
    rows: Tensor | None
    usable: Tensor | None


def sample(x: Tensor, axis: int | None = None, usable: Tensor | None = None) -> Sample:
    """Return every n-th value of each row of ``x``, a row being what one index of axis 0 holds.

    Axis 0 is what batches are laid along. What is taken of a row depends on nothing but the row:
    n on its length, and where it starts on the upper bits of some of its values, which another
    batch size, and so another order of summation, hardly ever moves. So a histogram does not
    depend on how samples were put into batches, nor on who saw which. The starts differ from row
    to row, so that all positions come up; and n has no divisor in common with the row's length,
    so that no channel layout is in step with it. Rows of up to 255 values are taken whole; whole
    rows are never left out, since equal ones would all go or all stay.

    Args:
        x: any shape, at least one value.
        axis: the channel axis, None without.
        usable: bool, of the shape of ``x``; handed on.
    """
    rows = x.reshape(x.shape[0] if x.ndim else 1, -1)
    channels = 1 if axis is None else x.shape[axis]
    stride = sample_stride(rows.shape[1], channels)
    if stride == 1:
        flat = None if usable is None else usable.reshape(-1)
        return Sample(rows.reshape(-1), 1, _all_channels(x, axis), flat)
    index = _positions(rows, stride)
    return Sample(
        rows.reshape(-1).index_select(0, index),
        stride,
        _channels_at(index, x, axis),
        None if usable is None else usable.reshape(-1).index_select(0, index),
    )


@functools.lru_cache(maxsize=4096)
def sample_stride(size: int, channels: int = 1) -> int:
    """Return the step between sampled values of a row of ``size`` values.

    It grows with the square root, so that short rows, of which many come in a tensor of tokens,
    are thinned out too, and of long ones more is taken, one in 64 at the least.
    """
    stride = min(math.isqrt(size) // 8, size // (channels * _LEAST_PER_CHANNEL), _MAX_STRIDE)
    stride = max(stride, 1)
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride


def _positions(rows: Tensor, stride: int) -> Tensor:
    """Return the flat indices of the sampled values, 1-D.

    Every row gets as many, from a start within the first step or, so that the last positions come
    up too, within what a row is longer than a number of steps.
    """
    count, size = rows.shape
    rest = size % stride
    start = _hash(rows).remainder_(stride + rest)
    if count > 1:
        start += torch.arange(0, count * size, size, device=rows.device)
    return (start[:, None] + torch.arange(0, size - rest, stride, device=rows.device)).view(-1)


def _hash(rows: Tensor) -> Tensor:
    """Return a number of 32 bits for each row, from the upper bits of some of its values.

    Source: multiply-shift hashing, Dietzfelbinger et al., "A reliable randomized algorithm for the
    closest-pair problem", Journal of Algorithms 25, 1997.
    """
    step = rows.shape[1] // _KEYS
    keys = rows[:, step // 2 : step * _KEYS : step].to(torch.float32)
    end = _FIRST_FACTOR + _KEYS * _FACTOR_STEP
    factors = torch.arange(_FIRST_FACTOR, end, _FACTOR_STEP, device=rows.device)
    return ((keys.view(torch.int32) & _COARSE) * factors).sum(1) >> 32


def _all_channels(x: Tensor, axis: int | None) -> Tensor | None:
    if axis is None:
        return None
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return torch.arange(x.shape[axis], device=x.device).view(shape).expand(x.shape).reshape(-1)


def _channels_at(index: Tensor, x: Tensor, axis: int | None) -> Tensor | None:
    if axis is None:
        return None
    inner = math.prod(x.shape[axis:][1:])
    return (index // inner).remainder_(x.shape[axis])
