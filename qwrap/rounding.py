"""Fake quantization of one tensor: rounded to the numbers of a type, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwrap.codebook import as_tensor, nearest
from qwrap.dtypes import QuantType
from qwrap.minifloat import saturate_to


def to_integers(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: float, qmax: float) -> Tensor:
    """Return ``x`` rounded to integer codes; see ``numerics.fake_quantize``.

    The gradient of ``x`` passes where no code was clamped.

    Args:
        x: floats of any shape.
        scale: float32, broadcasts against ``x``.
        zero_point: integers that broadcast against ``x``.
        qmin: smallest code.
        qmax: largest code.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _ToIntegers.apply(x, scale, zero_point, qmin, qmax)  # type: ignore[no-untyped-call]  # torch has no stub
        return result
    codes = _codes(x, scale, zero_point).clamp_(qmin, qmax)
    return codes.sub_(zero_point).mul_(scale).to(x.dtype)


def to_levels(x: Tensor, scale: Tensor, dtype: QuantType) -> Tensor:
    """Return ``x`` rounded to the numbers of a float type or code book.

    The gradient of ``x`` passes from the smallest number to the largest, both included.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _ToLevels.apply(x, scale, dtype)  # type: ignore[no-untyped-call]  # torch has no stub
        return result
    return round_steps(x.to(torch.float32) / scale, dtype).mul_(scale).to(x.dtype)


def by_function(x: Tensor, scale: Tensor, zero_point: Tensor, dtype: QuantType) -> Tensor:
    """Return what the function of ``dtype`` makes of ``x``.

    The gradient is the function's own, or that of ``x`` passes from ``qmin`` to ``qmax``.

    Args:
        x: floats of any shape.
        scale: float32, a scalar or of the rank of ``x``.
        zero_point: integers of the shape of ``scale``.
        dtype: has a function.
    """
    function = dtype.function
    assert function is not None
    inputs = [scale, zero_point.to(torch.float32)] if function.has_zero_point else [scale]
    if function.own_gradient:
        return function.compute(x.to(torch.float32), *inputs).to(x.dtype)
    with torch.no_grad():
        rounded = function.compute(x.to(torch.float32), *inputs).to(x.dtype)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded
    steps = x.detach().to(torch.float32) / scale
    if function.has_zero_point:
        steps += zero_point
    inside = steps.ge(dtype.qmin) & steps.le(dtype.qmax)
    result: Tensor = _PassThrough.apply(x, rounded, inside)  # type: ignore[no-untyped-call]  # torch has no stub
    return result


def through_half(x: Tensor) -> Tensor:
    """Return ``x`` rounded to float16, in its own type; what is too large becomes infinite.

    The gradient passes as it is, in the type of ``x``: small ones do not become 0.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _ThroughHalf.apply(x)  # type: ignore[no-untyped-call]  # torch has no stub
        return result
    return x.to(torch.float16).to(x.dtype)


def round_steps(steps: Tensor, dtype: QuantType) -> Tensor:
    """Return float32 steps rounded to the numbers of a float type or code book, clamped."""
    if dtype.codebook:
        assert dtype.levels is not None
        nearest_level = as_tensor(dtype.levels, steps.device)[nearest(steps, dtype.middles)]
    else:
        nearest_level = saturate_to(steps, dtype.onnx_type)
    return torch.where(steps.isnan(), steps, nearest_level)


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return unclamped codes in a new float32 tensor, which the caller may overwrite."""
    return (x.to(torch.float32) / scale).round_().add_(zero_point)


class _ToIntegers(torch.autograd.Function):
    """Keeps one bool per element for its backward.

    Works in place on one temporary: above some 100 k elements fresh memory costs more than the
    arithmetic, so that the mask of two comparisons beats comparing with a clamped copy.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: float, qmax: float
    ) -> Tensor:
        codes = _codes(x, scale, zero_point)
        inside = codes.ge(qmin)
        inside &= codes.le(qmax)
        ctx.save_for_backward(inside)
        return codes.clamp_(qmin, qmax).sub_(zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None, None


class _ToLevels(torch.autograd.Function):
    """Rounds to the numbers of a type without zero point."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, dtype: QuantType) -> Tensor:
        steps = x.to(torch.float32) / scale
        inside = steps.ge(dtype.qmin)
        inside &= steps.le(dtype.qmax)
        ctx.save_for_backward(inside)
        return round_steps(steps, dtype).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


class _PassThrough(torch.autograd.Function):
    """Returns ``rounded``, with the gradient of ``x`` where ``inside``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, inside: Tensor) -> Tensor:  # noqa: ARG004 -- x gives the gradient
        ctx.save_for_backward(inside)
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


class _ThroughHalf(torch.autograd.Function):
    """Rounds to float16; the gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004 -- nothing is kept
        return x.to(torch.float16).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004 -- nothing was kept
        return gradients[0]
