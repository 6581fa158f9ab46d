"""The elementwise passes and sums behind learned fake-quantization.

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

BELOW, ABOVE, NEITHER = -128, 127, -127
RESIDUAL_STEPS = 252
"""``kept`` counts the residual in 1/252 of a step: -126 is half a step down, 126 half a step up."""


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
        x: the gradient where the code was not clamped, else 0, of its dtype and shape.
        inside: float32 ``[C]``, sum of gradient times residual over what was not clamped.
        below: float32 ``[C]``, sum of the gradient over what was clamped to ``qmin``.
        above: float32 ``[C]``, sum of the gradient over what was clamped to ``qmax``.
    """

    x: Tensor | None
    inside: Tensor | None
    below: Tensor | None
    above: Tensor | None


def forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: float, qmax: float, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Return ``x`` fake-quantized, and what its backward needs.

    The value is that of ``numerics.fake_quantize`` bit for bit: a float32 division, rounded half to
    even. Inside is decided on the rounded code, as for fixed scales: half a step beyond ``qmin``
    or ``qmax`` is still inside, so that no element is called clamped that was only rounded.

    Args:
        x: floats ``[outer, C, inner]`` with any strides.
        scale: float32 ``[C]``.
        zero_point: int32 ``[C]``.
        qmin: smallest code.
        qmax: largest code.
        keep: whether to keep one int8 per element: -128 where the code was clamped to ``qmin``, 127
            where to ``qmax``, -127 where ``x`` is NaN, else the residual in 1/252 of a step.

    Returns:
        Values of the dtype and shape of ``x``; int8 of its shape, None without ``keep``.
    """
    spread_scale, spread_zero_point = _spread(scale), _spread(zero_point.to(torch.float32))
    steps = x.to(torch.float32) / spread_scale
    rounded = steps.round()
    codes = rounded + spread_zero_point
    values = ((codes.clamp(qmin, qmax) - spread_zero_point) * spread_scale).to(x.dtype)
    if not keep:
        return values, None
    kept = ((rounded - steps) * RESIDUAL_STEPS).round()
    kept = torch.where(codes < qmin, BELOW, torch.where(codes > qmax, ABOVE, kept))
    return values, torch.where(kept.isnan(), NEITHER, kept).to(torch.int8)


def backward_kept(gradient: Tensor, kept: Tensor, scale: Tensor, *, needs: Needs) -> Gradients:
    """Return the gradients from what ``forward`` kept; the residual is right to 1/504 of a step.

    Args:
        gradient: floats ``[outer, C, inner]``, of the fake-quantized values.
        kept: int8 of that shape.
        scale: float32 ``[C]``.
        needs: which gradients are wanted.
    """
    inside = (kept >= -RESIDUAL_STEPS // 2) & (kept <= RESIDUAL_STEPS // 2)
    through = torch.where(inside, gradient, 0)
    if not needs.sums:
        return Gradients(through, None, None, None)
    residual_sum = _sum(through.to(torch.float32) * kept) / torch.full_like(scale, RESIDUAL_STEPS)
    below, above = (_sum(torch.where(kept == end, gradient, 0)) for end in (BELOW, ABOVE))
    return Gradients(through if needs.x else None, residual_sum, below, above)


def backward_recomputed(
    gradient: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: float,
    qmax: float,
    *,
    needs: Needs,
) -> Gradients:
    """Return the gradients with the exact residual; for an ``x`` that lives on anyway.

    Args:
        gradient: floats ``[outer, C, inner]``, of the fake-quantized values.
        x: what was quantized, of that shape.
        scale: float32 ``[C]``.
        zero_point: int32 ``[C]``.
        qmin: smallest code.
        qmax: largest code.
        needs: which gradients are wanted.
    """
    steps = x.to(torch.float32) / _spread(scale)
    rounded = steps.round()
    codes = rounded + _spread(zero_point.to(torch.float32))
    inside = (codes >= qmin) & (codes <= qmax)
    through = torch.where(inside, gradient, 0)
    if not needs.sums:
        return Gradients(through, None, None, None)
    residual = torch.where(inside, rounded - steps, 0.0)
    below, above = (_sum(torch.where(o, gradient, 0)) for o in (codes < qmin, codes > qmax))
    return Gradients(
        through if needs.x else None, _sum(through.to(torch.float32) * residual), below, above
    )


def _spread(values: Tensor) -> Tensor:
    """Return ``[C]`` values as they broadcast against ``[outer, C, inner]``."""
    return values.reshape(1, -1, 1)


def _sum(values: Tensor) -> Tensor:
    """Return the float32 sums ``[C]``; torch adds pairwise, so the error grows as log N."""
    return values.to(torch.float32).sum((0, 2))
