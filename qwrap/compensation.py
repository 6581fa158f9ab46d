"""Rounding of a matrix whose errors cancel on correlated inputs: the solver of GPTQ."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Told = Callable[[float], None]
LARGEST = 100.0  # damping that is tried; it outweighs all else
BLOCK = 128  # inputs whose errors are spread over the later ones in one product


def compensate(
    weight: Tensor,
    second: Tensor,
    grid: Callable[[Tensor, Tensor], Tensor],
    damping: float,
    *,
    in_order: bool = False,
    block: int = BLOCK,
    told: Told | None = None,
) -> Tensor:
    """Return ``weight`` on its grid, every rounding error made good by the inputs still to round.

    What is never there is rounded to nearest.

    Args:
        weight: float64 ``[G, K, R]``.
        second: second moments of the inputs, float64 ``[G, K, K]``.
        grid: called with those values of each output that are up to date, ``[G, n, R]``, of one
            input to round and of up to ``block`` ones that follow, and with the numbers ``[G]`` of
            the first; returns the first, rounded, ``[G, R]``.
        damping: share of the mean power that is added to every power; where the moments are not
            positive definite with it, ten times as much, as often as it takes.
        in_order: round inputs as they come, and not in order of falling power. Then ``grid``
            sees all inputs of a block whose number is a multiple of ``block`` at its first.
        block: inputs whose errors are spread over the later ones in one product.
        told: is called with the damping if that had to be raised.

    Source: Frantar et al., arXiv:2210.17323, algorithm 1; the order is their "act_order".
    """
    power = second.diagonal(dim1=1, dim2=2)
    order = torch.argsort(power, dim=1, descending=True, stable=True)
    if in_order:
        order = torch.arange(power.shape[1], device=power.device).expand_as(power)
    weight = weight.gather(1, order[:, :, None].expand_as(weight))
    factor = _inverse_factor(second, order, damping, told)
    inputs = weight.shape[1]
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        errors = torch.empty_like(weight[:, start:end])
        for k in range(start, end):
            rounded = grid(weight[:, k:end], order[:, k])
            error = (weight[:, k] - rounded) / factor[:, k, k, None]
            weight[:, k] = rounded
            weight[:, k + 1 : end] -= factor[:, k, k + 1 : end, None] * error[:, None]
            errors[:, k - start] = error
        weight[:, end:] -= factor[:, start:end, end:].mT @ errors
    return torch.empty_like(weight).scatter_(1, order[:, :, None].expand_as(weight), weight)


def _inverse_factor(
    second: Tensor, order: Tensor, damping: float, told: Told | None = None
) -> Tensor:
    """Return the upper Cholesky factor of the inverse of damped moments, inputs in ``order``."""
    rows = order[:, :, None].expand_as(second)
    second = second.gather(1, rows).gather(2, rows.mT)

    def factored(damped: Tensor) -> tuple[Tensor, Tensor]:
        lower, failed = torch.linalg.cholesky_ex(damped)
        upper, also = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        return upper, failed | also

    return _damped(second, damping, factored, told)


def damped_factor(second: Tensor, damping: float) -> Tensor:
    """Return the lower Cholesky factor of moments ``[G, K, K]``, damped as for ``compensate``."""
    return _damped(second, damping, torch.linalg.cholesky_ex, None)


def _damped(
    second: Tensor,
    damping: float,
    factored: Callable[[Tensor], tuple[Tensor, Tensor]],
    told: Told | None,
) -> Tensor:
    """Return what is made of damped moments with the least damping with which nothing fails.

    Raises:
        ValueError: there is none, as the moments are not finite.
    """
    power = second.diagonal(dim1=1, dim2=2)
    mean = power.mean(1, keepdim=True)
    tried = damping
    while tried <= max(damping, LARGEST):
        added = torch.where(power > 0, tried * mean, 1.0)
        factor, failed = factored(second + torch.diag_embed(added))
        if not failed.any():
            if tried != damping and told is not None:
                told(tried)
            return factor
        tried *= 10
    raise ValueError(f"moments of inputs have no Cholesky factor, up to a damping of {tried:g}")
