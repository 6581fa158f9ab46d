"""Integrals of what rounding to integers does, in closed form.

Rounding errors of a uniform grid are a sawtooth within its range and grow linearly beyond, so that
their integrals from 0 to x are polynomials of the nearest code and the distance to it. Differences
over the bins of a histogram are its exact error under a flat density within each bin.

In steps of the scale, with ``c`` the code less the zero point and ``d = x - c``: whole cells give
1/12 to the square, 1/4 to the magnitude and -1/24 to ``t * (t - c)``; the rest is integrated from
the code on, within its cell or, at the ends, beyond it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwrap.config import QuantSpec


def squared_error_integral(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return the integral of ``(t - fake_quantize(t))^2`` over t from 0 to ``x``, in float64.

    Args:
        x: upper ends.
        scale: broadcasts against ``x``.
        zero_point: of the shape of ``scale``.
        spec: gives the range of the codes; an integer type.
    """
    code, rest, scale = _nearest(x, scale, zero_point, spec)
    cubes = (rest * rest).mul_(rest)
    return cubes.mul_(4).add_(code).mul_(scale**3 / 12)


def absolute_error_integral(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec
) -> Tensor:
    """Return the integral of ``abs(t - fake_quantize(t))`` over t from 0 to ``x``, in float64.

    Args:
        x: upper ends.
        scale: broadcasts against ``x``.
        zero_point: of the shape of ``scale``.
        spec: gives the range of the codes; an integer type.
    """
    code, rest, scale = _nearest(x, scale, zero_point, spec)
    squares = rest.abs().mul_(rest)
    return squares.mul_(2).add_(code).mul_(scale**2 / 4)


def error_moment_integral(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return the integral of ``t * (t - fake_quantize(t))`` over t from 0 to ``x``, in float64.

    Args:
        x: upper ends.
        scale: broadcasts against ``x``.
        zero_point: of the shape of ``scale``.
        spec: gives the range of the codes; an integer type.
    """
    code, rest, scale = _nearest(x, scale, zero_point, spec)
    squares = rest * rest
    return squares.mul_(12 * code + 8 * rest).sub_(code).mul_(scale**3 / 24)


def _nearest(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the code less zero point, the distance to it in steps, and the scale, in float64."""
    scale = scale.to(torch.float64)
    steps = x / scale
    codes = steps.round().clamp_min_(spec.qmin - zero_point).clamp_max_(spec.qmax - zero_point)
    return codes, steps.sub_(codes), scale
