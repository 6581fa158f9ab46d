"""The search for the range with the least error: coarse steps, then finer ones around the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Cost = Callable[[Tensor, Tensor], Tensor]
"""The errors ``[R]`` of ranges, given low and high as float64 ``[R]``."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Which shares of a range are tried.

    Attributes:
        both: of the whole range, both ends together.
        each: of the whole range, one end after the other.
        fine: of the best so far, both ends together or one after the other, a round each.
    """

    both: Sequence[float]
    each: Sequence[float]
    fine: Sequence[Sequence[float]]


def least_cost(
    cost: Cost, low: Tensor, high: Tensor, steps: Steps, *, symmetric: bool, pinned: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the ranges of least cost, within the given ones and never worse than they are.

    Args:
        cost: sees ranges as they are returned, rounded to float32.
        low: float64 ``[R]``; above 0 it counts as 0.
        high: float64 ``[R]``; below 0 it counts as 0.
        steps: what to try.
        symmetric: whether only the larger end matters, so that both are moved together.
        pinned: which rows keep their range.
    """
    whole = low.clamp(max=0), high.clamp(min=0)
    best = [whole[0], whole[1]]
    least = cost(*whole)

    def attempt(low: Tensor, high: Tensor) -> None:
        low, high = (end.to(torch.float32).to(torch.float64) for end in (low, high))
        low, high = torch.maximum(low, whole[0]), torch.minimum(high, whole[1])
        error = cost(low, high)
        better = (error < least) & ~pinned
        least[better] = error[better]
        best[0] = torch.where(better, low, best[0])
        best[1] = torch.where(better, high, best[1])

    def move(ends: Sequence[int], centre: Sequence[Tensor], ratio: float) -> None:
        attempt(*(centre[e] * ratio if e in ends else best[e] for e in (0, 1)))

    for ratio in steps.both:
        move((0, 1), whole, ratio)
    movable = [(e,) for e in (1, 0) if (whole[e] != 0).any()]
    if symmetric or len(movable) < 2:
        movable = [(0, 1)]
    else:
        for ends in movable:
            for ratio in steps.each:
                move(ends, whole, ratio)
    for ratios in steps.fine:
        for ends in movable:
            centre = list(best)
            for ratio in ratios:
                move(ends, centre, ratio)
    return best[0], best[1]
