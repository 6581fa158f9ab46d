"""Arithmetic, element by element."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from qwrap.ops.registry import op

UNARY = (1, 6, 13)

op("Abs", since=UNARY)(torch.abs)
op("Neg", since=UNARY)(torch.neg)
op("Ceil", since=UNARY)(torch.ceil)
op("Floor", since=UNARY)(torch.floor)
op("Round", since=(11, 22))(torch.round)  # half to even, as ONNX says
op("Sign", since=(9, 13))(torch.sign)
op("Sqrt", since=UNARY)(torch.sqrt)
op("Reciprocal", since=UNARY)(torch.reciprocal)
op("Exp", since=UNARY)(torch.exp)
op("Log", since=UNARY)(torch.log)
op("Erf", since=(9, 13))(torch.erf)
op("Sin", since=(7, 22))(torch.sin)
op("Cos", since=(7, 22))(torch.cos)

op("Add", since=(7, 13, 14))(torch.add)
op("Sub", since=(7, 13, 14))(torch.sub)
op("Mul", since=(7, 13, 14))(torch.mul)


@op("Div", since=(7, 13, 14))
def div(a: Tensor, b: Tensor) -> Tensor:
    """Divide; integers round towards zero, as in C."""
    if a.dtype.is_floating_point:
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


@op("Pow", since=(7, 12, 13, 15), literal=(1,))
def power(x: Tensor, y: Tensor | float) -> Tensor:
    """Raise to a power; the result has the type of ``x`` whatever the type of ``y``."""
    if not x.dtype.is_floating_point:
        return _integer_power(x, y)
    return torch.pow(x, y).to(x.dtype) if isinstance(y, Tensor) else torch.pow(x, y)


def _integer_power(x: Tensor, y: Tensor | float) -> Tensor:
    """Raise integers to a power in float64, as onnxruntime; torch has no negative powers of them.

    A single exponent of 2 or 3 it multiplies out, which wraps.
    """
    power = torch.pow(x.double(), y).to(x.dtype)
    if isinstance(y, Tensor) and y.numel() != 1:
        return power
    square = x * x
    if not isinstance(y, Tensor):
        return square if y == 2 else square * x if y == 3 else power
    return torch.where(y == 2, square, torch.where(y == 3, square * x, power))


@op("Mod", since=(10, 13, 28))
def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """Return the remainder, with the sign of ``b`` or, with ``fmod``, of ``a``."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def aligned(a: Tensor, b: Tensor, broadcast: int, axis: int | None) -> Tensor:
    """Return ``b`` shaped so that broadcasting pairs its first axis with ``axis`` of ``a``."""
    if not broadcast or axis is None:
        return b
    after = a.ndim - axis % a.ndim - b.ndim
    return b.reshape(*b.shape, *[1] * after)


def with_legacy_broadcast(
    function: Callable[[Tensor, Tensor], Tensor],
) -> Callable[..., Tensor]:
    """Return ``function`` with the attributes that steered broadcasting before opset 7."""

    def legacy(a: Tensor, b: Tensor, *, broadcast: int = 0, axis: int | None = None) -> Tensor:
        return function(a, aligned(a, b, broadcast, axis))

    return legacy


op("Add", since=(1, 6))(with_legacy_broadcast(torch.add))
op("Sub", since=(1, 6))(with_legacy_broadcast(torch.sub))
op("Mul", since=(1, 6))(with_legacy_broadcast(torch.mul))
op("Div", since=(1, 6))(with_legacy_broadcast(div))
op("Pow", since=(1,))(with_legacy_broadcast(power))


@op("Sum", since=(1, 6, 8, 13))
def sum_of(*inputs: Tensor) -> Tensor:
    """Add up all inputs."""
    return reduce(torch.add, inputs)


@op("Mean", since=(1, 6, 8, 13))
def mean_of(*inputs: Tensor) -> Tensor:
    """Average all inputs."""
    return reduce(torch.add, inputs) / len(inputs)


@op("Max", since=(1, 6, 8, 12, 13))
def max_of(*inputs: Tensor) -> Tensor:
    """Return the largest input, element by element."""
    return reduce(torch.maximum, inputs)


@op("Min", since=(1, 6, 8, 12, 13))
def min_of(*inputs: Tensor) -> Tensor:
    """Return the smallest input, element by element."""
    return reduce(torch.minimum, inputs)


@op("Clip", since=(11, 12, 13), literal=(1, 2))
def clip(x: Tensor, min: Tensor | float | None = None, max: Tensor | float | None = None) -> Tensor:
    """Limit to ``[min, max]``; ``max`` wins where they cross."""
    if min is None and max is None:
        return x
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        return torch.clamp(x, _as_tensor(min, x), _as_tensor(max, x))
    return torch.clamp(x, min, max)


def _as_tensor(limit: Tensor | float | None, x: Tensor) -> Tensor | None:
    """Return a limit as a tensor, because ``torch.clamp`` takes two of a kind."""
    if limit is None or isinstance(limit, Tensor):
        return limit
    return torch.full((), limit, dtype=x.dtype, device=x.device)


@op("Clip", since=(1, 6))
def clip_to_attributes(
    x: Tensor,
    *,
    min: float = torch.finfo(torch.float32).min,
    max: float = torch.finfo(torch.float32).max,
) -> Tensor:
    """Limit to ``[min, max]``, by default to what float32 can hold."""
    limits = torch.finfo(x.dtype)  # a default limit may be more than a narrower type can hold
    low = min if min > limits.min else limits.min
    high = max if max < limits.max else limits.max
    return torch.clamp(x, low, high)


@op("CumSum", since=(11, 14), host=(1,))
def cumsum(x: Tensor, axis: int | list[int], *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Return running sums along ``axis``, without the element itself if ``exclusive``."""

    def scan(x: Tensor, dim: int) -> Tensor:
        return x.cumsum(dim, dtype=x.dtype)

    return _running(scan, 0, x, axis, exclusive, reverse)


@op("CumProd", since=(26,), host=(1,))
def cumprod(x: Tensor, axis: int | list[int], *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Return running products along ``axis``, without the element itself if ``exclusive``."""

    def scan(x: Tensor, dim: int) -> Tensor:
        return x.cumprod(dim, dtype=x.dtype)

    return _running(scan, 1, x, axis, exclusive, reverse)


def _running(
    scan: Callable[[Tensor, int], Tensor],
    empty: int,
    x: Tensor,
    axis: int | list[int],
    exclusive: int,
    reverse: int,
) -> Tensor:
    """Accumulate along ``axis``; ``empty`` is what no elements accumulate to."""
    (dim,) = axis if isinstance(axis, list) else (axis,)
    x = x.flip(dim) if reverse else x
    if exclusive and x.shape[dim] > 0:
        first = torch.full_like(x.narrow(dim, 0, 1), empty)
        x = torch.cat((first, x.narrow(dim, 0, x.shape[dim] - 1)), dim)
    y = scan(x, dim)
    return y.flip(dim) if reverse else y
