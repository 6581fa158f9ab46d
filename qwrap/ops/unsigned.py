"""Arithmetic of uint64 on int64 tensors of the same bits, where that of int64 would differ.

Sums, differences and products of both have the same bits; quotients and right shifts have not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwrap.ops.bitwise import bit_shift

LOWEST = -(2**63)


def is_less(a: Tensor, b: Tensor) -> Tensor:
    """Return where ``a`` is less than ``b``: flipping the highest bit orders them as signed."""
    return a ^ LOWEST < b ^ LOWEST


def _half(x: Tensor) -> Tensor:
    return x >> 1 & ~LOWEST


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a / b`` rounded down.

    Half of ``a`` is positive as int64 and gives a quotient that is at most one too small when
    doubled; a divisor from 2^63 on fits once or not at all. Source: Warren, Hacker's Delight, 2nd
    edition, section 9-3.
    """
    large = b < 0
    positive = torch.where(large, 1, b)
    estimate = torch.div(_half(a), positive, rounding_mode="trunc") << 1
    quotient = estimate + ~is_less(a - estimate * positive, positive)
    return torch.where(large, (~is_less(a, b)).to(torch.int64), quotient)


def remainder(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:  # alike here
    """Return ``a`` modulo ``b``; there are no signs that ``fmod`` could tell apart."""
    return a - divide(a, b) * b


def shift(X: Tensor, Y: Tensor, *, direction: str) -> Tensor:
    """Shift ``X`` by ``Y`` bits, filling with zeros; 64 and more leave nothing."""
    if direction != "RIGHT":
        return bit_shift(X, Y, direction=direction)
    inside = (Y >= 0) & torch.lt(Y, 64)
    by = torch.where(inside, Y, 0)
    shifted = torch.where(by == 0, X, _half(X) >> (by - 1).clamp(min=0))
    return torch.where(inside, shifted, 0)


def unchanged(x: Tensor, *_: Tensor) -> Tensor:
    """Return ``x``: no element is negative, so that Abs and PRelu change none."""
    return x


def reduce_sum(
    data: Tensor,
    axes: Sequence[int] | None = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Tensor:
    """Return the sum over ``axes``, which of unsigned integers is ReduceL1."""
    if not axes and noop_with_empty_axes:
        return data
    return data.sum(tuple(axes or range(data.ndim)), keepdim=bool(keepdims))


def sign(x: Tensor) -> Tensor:
    """Return 1 where ``x`` is not 0."""
    return (x != 0).to(torch.int64)
