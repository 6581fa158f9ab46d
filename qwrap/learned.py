"""Fake quantization with the gradients of its scale and zero point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwrap import fused
from qwrap.config import QuantSpec
from qwrap.rounding import round_steps


@dataclass(frozen=True, slots=True)
class Sums:
    """What one backward pass tells of scale and zero point, float32 of the shape of the scale.

    With ``t = x / scale`` and the gradient ``g`` of the loss by the rounded value of each element:

    Attributes:
        inside: sum of ``g * (round(t) - t)`` where no code was clamped.
        below: sum of ``g`` where the code was clamped at its smallest.
        above: sum of ``g`` where it was clamped at its largest.
        count: elements that share a scale: of weights all, of activations those of one sample.
    """

    inside: Tensor
    below: Tensor
    above: Tensor
    count: int


@dataclass(slots=True, eq=False)
class Known:
    """A result that was computed before.

    Attributes:
        value: the rounded tensor.
        passes: how many backward passes went through it.
    """

    value: Tensor
    passes: int = 0
    _last: int = -1

    def count(self) -> None:
        """Count the backward pass that runs now, once for all uses of the value."""
        task = torch._C._current_graph_task_id()
        self.passes, self._last = self.passes + (task != self._last), task


Rule = Callable[[Sums], Sequence[Tensor]]
"""From the sums to a gradient for each trained parameter."""


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """What values are rounded to.

    Attributes:
        scale: float32, of the shape that ``spec`` gives it.
        zero_point: int32 of the same shape.
        spec: type, axis and blocks; not a type that is a function.
        is_alive: whether the values live on anyway, as those of a weight do: then they are kept for
            the backward pass, and otherwise one byte for each.
    """

    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec
    is_alive: bool = False


def learned_fake_quantize(
    x: Tensor,
    grid: Grid,
    parameters: Sequence[Tensor] = (),
    rule: Rule | None = None,
    known: Known | None = None,
) -> Tensor:
    """Return ``x`` rounded to ``grid``, with gradients for ``x`` and for ``parameters``.

    The value is that of ``numerics.fake_quantize``, bit for bit. The gradient of ``x`` passes where
    no code was clamped. That of the parameters comes from ``rule``; what it sums over is exact for
    ``grid.is_alive``, and else has each ``round(t) - t`` to the nearest 1/252.

    Args:
        x: floats of any shape.
        grid: what to round to; its tensors get no gradient themselves.
        parameters: what ``rule`` gives gradients for.
        rule: turns the sums of the backward pass into gradients; None makes them 0.
        known: the result, if it is; backward passes are counted there.

    Source: Esser et al., arXiv:1902.08153, section 2.1.
    """
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))):
        return (rounded(x, grid, keep=False)[0] if known is None else known.value).detach()
    result: Tensor = _Learned.apply(x, grid, rule, known, *parameters)  # type: ignore[no-untyped-call]  # torch has no stub
    return result


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, grid: Grid, rule: Rule | None, known: Known | None, *own: Tensor
    ) -> Tensor:
        ctx.grid, ctx.rule, ctx.zeros = grid, rule, [torch.zeros_like(p) for p in own]
        rows = ctx.rows = _Rows(x, grid.spec)
        ctx.known = known
        if known is not None:
            ctx.save_for_backward(x)
            return known.value.detach()
        result, kept = rounded(x, grid, rows, keep=not grid.is_alive)
        ctx.save_for_backward(x if kept is None else kept)
        return result.detach()  # no view of the rows, so that users may change it in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (saved,) = ctx.saved_tensors
        if ctx.known is not None:
            ctx.known.count()
        needs = fused.Needs(
            ctx.needs_input_grad[0], ctx.rule is not None and any(ctx.needs_input_grad[4:])
        )
        found = _backward(gradients[0], saved, ctx.grid, ctx.rows, needs)
        grad_x = None if found.x is None else ctx.rows.back(found.x)
        if not needs.sums:
            return (grad_x, None, None, None, *ctx.zeros)
        inside, below, above = map(ctx.rows.shaped, (found.inside, found.below, found.above))
        count = ctx.rows.count(is_weight=ctx.grid.is_alive)
        own = ctx.rule(Sums(inside, below, above, count))
        return (grad_x, None, None, None, *own)


def rounded(
    x: Tensor, grid: Grid, rows: _Rows | None = None, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Return ``x`` rounded to ``grid`` and, with ``keep``, what a backward pass needs of it."""
    rows = rows or _Rows(x, grid.spec)
    values, scale = rows.of(x), rows.flat(grid.scale)
    if grid.spec.dtype.levels is not None:
        return rows.back(_to_levels(values, scale, grid.spec)), None
    zero_point, ends = rows.flat(grid.zero_point), (grid.spec.qmin, grid.spec.qmax)
    result, kept = fused.forward(values, scale, zero_point, *ends, keep=keep)
    return rows.back(result), kept


def _backward(
    gradient: Tensor, saved: Tensor, grid: Grid, rows: _Rows, needs: fused.Needs
) -> fused.Gradients:
    gradient, scale, spec = rows.of(gradient), rows.flat(grid.scale), grid.spec
    if spec.dtype.levels is not None:
        return _levels_backward(gradient, rows.of(saved), scale, spec)
    if not grid.is_alive:
        return fused.backward_kept(gradient, saved, needs=needs)
    zero_point, ends = rows.flat(grid.zero_point), (spec.qmin, spec.qmax)
    return fused.backward_recomputed(
        gradient, rows.of(saved), scale, zero_point, *ends, needs=needs
    )


def keep_in_graph(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return ``x``, with a gradient of 0 for ``parameters``.

    DistributedDataParallel waits for a gradient of every parameter.
    """
    result: Tensor = _InGraph.apply(x, *parameters)  # type: ignore[no-untyped-call]  # torch has no stub
    return result


class _InGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.zeros = [torch.zeros_like(p) for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return (gradients[0], *ctx.zeros)


class _Rows:
    """A tensor as ``[outer, C, inner]`` with one scale for each index of C, and back.

    One scale for all is ``[1, 1, N]`` over the memory as it lies, whatever the order of the axes.
    Blocks become rows, the last one filled up with zeros, whose codes lie inside and are exact.
    """

    def __init__(self, x: Tensor, spec: QuantSpec) -> None:
        self.spec, self.shape, self.dtype = spec, x.shape, x.dtype
        # A compiler may lay out a tensor otherwise than it was when it was traced.
        as_it_lies = spec.axis is None and not torch.compiler.is_compiling() and _is_dense(x)
        self.strides = x.stride() if as_it_lies else None
        self.scale_shape: tuple[int, ...] = (1,)
        if spec.axis is not None:
            axis, step = spec.axis % x.dim(), spec.block_size
            blocks = -(-x.shape[axis] // step) if step else x.shape[axis]
            rest = (x.shape[:axis], x.shape[axis + 1 :]) if step else ((), ())
            self.scale_shape = (*rest[0], blocks, *rest[1])

    def of(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape in rows; its memory if it lies as the first one's."""
        spec = self.spec
        if self.strides is not None:
            if x.stride() != self.strides:
                x = torch.empty_strided(
                    self.shape, self.strides, dtype=x.dtype, device=x.device
                ).copy_(x)
            return x.as_strided((1, 1, x.numel()), (x.numel(), x.numel(), 1))
        if spec.axis is None:
            return x.reshape(1, 1, -1)
        axis = spec.axis % x.dim()
        if spec.block_size is None:
            outer = math.prod(self.shape[:axis])
            return x.reshape(outer, self.shape[axis], math.prod(self.shape[axis + 1 :]))
        last = x.movedim(axis, -1)
        fill = -self.shape[axis] % spec.block_size
        return torch.nn.functional.pad(last, (0, fill)).reshape(1, -1, spec.block_size)

    def back(self, rows: Tensor) -> Tensor:
        """Return rows in the shape of the tensor."""
        spec = self.spec
        if self.strides is not None:
            return rows.as_strided(self.shape, self.strides)
        if spec.axis is None or spec.block_size is None:
            return rows.reshape(self.shape)
        axis = spec.axis % len(self.shape)
        lead = (*self.shape[:axis], *self.shape[axis + 1 :])
        return rows.reshape(*lead, -1)[..., : self.shape[axis]].movedim(-1, axis).contiguous()

    def flat(self, values: Tensor) -> Tensor:
        """Return scales or zero points in the order of the rows."""
        spec = self.spec
        if spec.block_size is None or spec.axis is None:
            return values
        return values.movedim(spec.axis % values.dim(), -1).reshape(-1)

    def shaped(self, values: Tensor) -> Tensor:
        """Return what is one for each row in the shape of the scale."""
        spec = self.spec
        if spec.block_size is None or spec.axis is None:
            return values.reshape(self.scale_shape)
        axis = spec.axis % len(self.scale_shape)
        lead = (*self.scale_shape[:axis], *self.scale_shape[axis + 1 :])
        return values.reshape(*lead, -1).movedim(-1, axis).contiguous()

    def count(self, is_weight: bool) -> int:
        """Return how many elements share a scale, of activations in one sample."""
        size = math.prod(self.shape) // max(math.prod(self.scale_shape), 1)
        if is_weight or len(self.shape) < 2 or not self.shape[0]:
            return max(size, 1)
        return max(size // self.shape[0], 1)


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gaps, in some order of the axes."""
    if x.is_contiguous():
        return True
    order = sorted(range(x.dim()), key=lambda axis: x.stride(axis), reverse=True)
    return x.permute(order).is_contiguous()


# --- types without codes -------------------------------------------------------------------------


def _to_levels(x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    scale = scale.reshape(1, -1, 1)
    return round_steps(x.to(torch.float32) / scale, spec.dtype).mul_(scale).to(x.dtype)


def _levels_backward(
    gradient: Tensor, x: Tensor, scale: Tensor, spec: QuantSpec
) -> fused.Gradients:
    steps = x.to(torch.float32) / scale.reshape(1, -1, 1)
    low, high = steps < spec.dtype.qmin, steps > spec.dtype.qmax
    inside = ~(low | high)
    wide = gradient.to(torch.float32)
    residual = (round_steps(steps, spec.dtype) - steps) * wide
    parts = ((inside, residual), (low, wide), (high, wide))
    sums = [torch.where(mask, values, 0).sum((0, 2)) for mask, values in parts]
    return fused.Gradients(gradient * inside, *sums)
