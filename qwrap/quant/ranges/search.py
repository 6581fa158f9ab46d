"""The search for the range with the least error: coarse steps, then finer ones around the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Cost = Callable[[Tensor, Tensor], Tensor]
"""The errors ``[R]`` of ranges, given low and high as float64 ``[R]``."""


WIDER = (1.03, 1.06, 1.1, 1.15, 1.2, 1.3, 1.4, 1.6, 1.8, 2.2, 3.0)
"""Multiples of the best range that are tried where a margin allows for more cost."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Which shares of a range are tried.

    Attributes:
        both: of the whole range, both ends together, descending.
        each: of the whole range, one end after the other, descending; the other end is that of the
            whole range, then the best so far.
        fine: of the best so far, both ends together, then one after the other; a round each.
    """

    both: Sequence[float]
    each: Sequence[float]
    fine: Sequence[Sequence[float]]


def least_cost(
    cost: Cost,
    low: Tensor,
    high: Tensor,
    steps: Steps,
    *,
    apart: bool,
    pinned: Tensor,
    margin: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the ranges of least cost, within the given ones and never worse than they are.

    No row's result depends on another row.

    Args:
        cost: sees ranges as they are returned, rounded to float32.
        low: float64 ``[R]``; above 0 it counts as 0.
        high: float64 ``[R]``; below 0 it counts as 0.
        steps: what to try.
        apart: whether to move the ends one by one, too; not where only the larger end matters, or
            all rows have but one.
        pinned: which rows keep their range.
        margin: cost, as a share of the least, that may be paid for a wider range.
    """
    search = _Search(cost, low.clamp(max=0), high.clamp(min=0), ~pinned)
    search.shrink((0, 1), steps.both)
    moves: list[tuple[int, ...]] = [(0, 1)]
    if apart:
        moves += [(1,), (0,)]
        for whole in (True, False):
            for ends in moves[1:]:
                search.shrink(ends, steps.each, from_whole=whole)
    for ratios in steps.fine:
        for ends in moves:
            search.scale(ends, ratios)
    if margin:
        search.widen(margin)
    return search.best[0], search.best[1]


class _Search:
    """The best ranges so far.

    Attributes:
        best: low and high.
    """

    def __init__(self, cost: Cost, low: Tensor, high: Tensor, free: Tensor) -> None:
        self._cost, self._free = cost, free
        self._whole = [low, high]
        self._first = cost(low, high)
        self._least = self._first.clone()
        self.best = [low, high]

    def shrink(
        self, ends: Sequence[int], ratios: Sequence[float], *, from_whole: bool = True
    ) -> None:
        """Try descending ``ratios`` of the whole range at ``ends``, as long as that may help.

        A narrower range cuts off more, and rounds what is left no worse. So where the cost has
        grown by more than what rounding cost at first, the ranges within are no better.

        Args:
            ends: 0 for low, 1 for high, or both.
            ratios: what to try.
            from_whole: whether the other end is that of the whole range, or of the best.
        """
        helps = self._free
        other = self._whole if from_whole else self.best
        for ratio in ratios:
            error = self._attempt(ends, self._whole, other, ratio, helps)
            helps = helps & (error < self._least + self._first)
            if not helps.any():
                break

    def scale(self, ends: Sequence[int], ratios: Sequence[float]) -> None:
        """Try ``ratios`` of the best range at ``ends``."""
        centre = self.best
        for ratio in ratios:
            self._attempt(ends, centre, centre, ratio, self._free)

    def widen(self, margin: float) -> None:
        """Take the widest of the multiples of the best range that cost little more.

        None costs more than the whole range does.
        """
        best, limit = self.best, torch.minimum(self._least * (1 + margin), self._first)
        for ratio in WIDER:
            wider = self._scaled((0, 1), best, best, ratio)
            chosen = (self._cost(*wider) <= limit) & self._free
            self.best = [
                torch.where(chosen, new, old) for new, old in zip(wider, self.best, strict=True)
            ]

    def _scaled(
        self,
        ends: Sequence[int],
        centre: Sequence[Tensor],
        other: Sequence[Tensor],
        ratio: float,
    ) -> tuple[Tensor, Tensor]:
        low, high = (
            (centre[end] * ratio).to(torch.float32).to(torch.float64) if end in ends else other[end]
            for end in (0, 1)
        )
        return torch.maximum(low, self._whole[0]), torch.minimum(high, self._whole[1])

    def _attempt(
        self,
        ends: Sequence[int],
        centre: Sequence[Tensor],
        other: Sequence[Tensor],
        ratio: float,
        rows: Tensor,
    ) -> Tensor:
        low, high = self._scaled(ends, centre, other, ratio)
        error = self._cost(low, high)
        better = (error < self._least) & rows
        self._least = torch.where(better, error, self._least)
        self.best = [
            torch.where(better, new, old) for new, old in zip((low, high), self.best, strict=True)
        ]
        return error
