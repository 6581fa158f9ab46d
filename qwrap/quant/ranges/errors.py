"""Ranges of least error on a histogram: squared, absolute, or of the angle."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qwrap.quant.ranges.rounding import rounding_of
from qwrap.quant.ranges.rows import HistogramRows
from qwrap.quant.ranges.scaling import RowScaling
from qwrap.quant.ranges.search import Cost, Steps, least_cost

Error = Literal["mse", "l1", "cosine"]

_STEPS = Steps(
    both=[2 ** (-i / 4) for i in range(1, 34)],
    each=[*(2 ** (-i / 2) for i in range(21)), 0],
    fine=[(0.84, 1.19), (0.92, 1.09), (0.96, 1.04), (0.985, 1.015)],
)


def least_error_range(
    rows: HistogramRows, scaling: RowScaling, error: Error, margin: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the ranges with the least error, or wider ones, never worse than the extremes.

    Args:
        rows: what was seen.
        scaling: how the values will be quantized.
        error: ``"mse"``, the squared error; ``"l1"``, its magnitude; or ``"cosine"``, the angle
            between the values and what becomes of them, which does not mind a common factor.
        margin: further error, as a share of the least, that a wider range may have.
    """
    return least_cost(
        histogram_cost(rows, scaling, error),
        rows.low,
        rows.high,
        _STEPS,
        apart=rows.two_sided and not scaling.spec.symmetric,
        pinned=scaling.pinned(rows.low, rows.high),
        margin=margin,
    )


def histogram_cost(rows: HistogramRows, scaling: RowScaling, error: Error) -> Cost:
    """Return the function that gives the errors of ranges: sums over all values of a row.

    The error ``"cosine"`` is 1 less the cosine of the angle.
    """
    rounding = rounding_of(rows, scaling.spec)

    def cost(low: Tensor, high: Tensor) -> Tensor:
        qparams = scaling.qparams(low, high)
        if error == "cosine":
            squares, moments = rounding.squares(qparams), rounding.moments(qparams)
            return _angle(rounding.power, squares, moments)
        return rounding.squares(qparams) if error == "mse" else rounding.magnitudes(qparams)

    return cost


def _angle(power: Tensor, squares: Tensor, moment: Tensor) -> Tensor:
    """Return 1 less the cosine between values and what they become.

    So written that nothing nearly equal is subtracted where the error is small.

    Args:
        power: sum of the values' squares.
        squares: sum of the squared errors.
        moment: sum of the products of values and their errors.
    """
    excess = 2 * moment - squares  # of the values' power over that of what they become
    lengths = power.sqrt(), (power - excess).clamp(min=0).sqrt()
    longer = excess / (lengths[0] + lengths[1])
    angle = (squares - longer**2) / (2 * lengths[0] * lengths[1])
    return torch.where(lengths[1] > 0, angle, torch.where(power > 0, 1.0, 0.0))
