"""The passes in plain torch operations: what is compiled, traced, and run on other devices.

One tensor is seen as ``[outer, C, inner]``: C scales, ``[1, 1, N]`` for one scale. With
``u = x / scale`` and ``code = rint(u) + zero_point``, the derivative of the fake-quantized value to
the scale is ``rint(u) - u`` (the residual) where the code lies in ``[qmin, qmax]``, and
``qmin - zero_point`` or ``qmax - zero_point`` where it was clamped. So three sums over the gradient
are all that the formulas of learned scales and zero points need: that with the residual inside,
that below and that above.

Source: Esser et al., arXiv:1902.08153 (LSQ), equation 3; Bhalgat et al., arXiv:2004.09576 (LSQ+).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BELOW, ABOVE, NEITHER = -128.0, 127.0, -127.0
"""What is kept of an element that was clamped to ``qmin``, to ``qmax``, or is NaN."""

RESIDUAL_STEPS = 252
"""What is kept of the others: the residual in 1/252 of a step, from -126 to 126."""

LARGEST = 126.0


class Needs(NamedTuple):
    """Which gradients are wanted.

    Attributes:
        x: that of the tensor itself.
        sums: those of scale and zero point.
    """

    x: bool = True
    sums: bool = True


class Gradients(NamedTuple):
    """What a backward pass gives; None where it was not wanted.

    Attributes:
        x: the gradient times 1 where the code was not clamped, else times 0; of its dtype.
        inside: float32 ``[C]``, sum of gradient times residual over what was not clamped.
        below: float32 ``[C]``, sum of the gradient over what was clamped to ``qmin``.
        above: float32 ``[C]``, sum of the gradient over what was clamped to ``qmax``.
    """

    x: Tensor | None
    inside: Tensor | None
    below: Tensor | None
    above: Tensor | None


def forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, ends: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the fake-quantized values and, with ``keep``, one int8 per element.

    Args:
        x: floats ``[outer, C, inner]``.
        scale: float32 ``[C]``.
        zero_point: int32 ``[C]``.
        ends: float32 ``[2]``, smallest and largest code.
        keep: whether to keep anything.
    """
    spread_scale, spread_zero_point = _spread(scale), _spread(zero_point.to(torch.float32))
    steps = x.to(torch.float32) / spread_scale
    rounded = steps.round()
    codes = rounded + spread_zero_point
    clamped = torch.minimum(torch.maximum(codes, ends[0]), ends[1])
    values = ((clamped - spread_zero_point) * spread_scale).to(x.dtype)
    if not keep:
        return values, None
    kept = ((rounded - steps) * RESIDUAL_STEPS).round()
    kept = torch.where(codes < ends[0], BELOW, torch.where(codes > ends[1], ABOVE, kept))
    # Compared with itself, because inductor calls isnan element by element.
    return values, torch.where(kept == kept, kept, NEITHER).to(torch.int8)


def backward_kept(gradient: Tensor, kept: Tensor, *, needs: Needs) -> Gradients:
    """Return the gradients from what ``forward`` kept.

    Args:
        gradient: floats ``[outer, C, inner]``.
        kept: int8 of that shape.
        needs: which gradients are wanted.
    """
    codes = kept.to(torch.float32)  # int8 has no fast comparisons
    through = gradient * (codes.abs() <= LARGEST)
    if not needs.sums:
        return Gradients(through, None, None, None)
    inside = _sum(through * codes)
    inside = inside / torch.full_like(inside, RESIDUAL_STEPS)
    below, above = (_sum(gradient * (codes == end)) for end in (BELOW, ABOVE))
    return Gradients(through if needs.x else None, inside, below, above)


def backward_recomputed(
    gradient: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, ends: Tensor, *, needs: Needs
) -> Gradients:
    """Return the gradients with the exact residual.

    Args:
        gradient: floats ``[outer, C, inner]``.
        x: what was quantized, of that shape.
        scale: float32 ``[C]``.
        zero_point: int32 ``[C]``.
        ends: float32 ``[2]``, smallest and largest code.
        needs: which gradients are wanted.
    """
    steps = x.to(torch.float32) / _spread(scale)
    rounded = steps.round()
    codes = rounded + _spread(zero_point.to(torch.float32))
    within = (codes >= ends[0]) & (codes <= ends[1])
    through = gradient * within
    if not needs.sums:
        return Gradients(through, None, None, None)
    residual = torch.where(within, rounded - steps, 0.0)  # infinity has none
    below, above = _sum(gradient * (codes < ends[0])), _sum(gradient * (codes > ends[1]))
    return Gradients(through if needs.x else None, _sum(gradient * residual), below, above)


def _spread(values: Tensor) -> Tensor:
    """Return ``[C]`` values as they broadcast against ``[outer, C, inner]``."""
    return values.reshape(-1, 1)


def _sum(values: Tensor) -> Tensor:
    """Return the sums ``[C]``; torch and inductor add pairwise, the error grows as log N."""
    return values.to(torch.float32).sum((-3, -1))
