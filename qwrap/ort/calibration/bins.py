"""Bins of a histogram: where they begin, and how many values lie in each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

BLOCK = 1 << 18  # values at a time: what fits into a cache is three times as fast
_NEVER_FIRST = 0.51  # a position below is taken for this, and then compared with the second border


def even_edges(first: Any, last: Any, bins: int, dtype: np.dtype[Any]) -> Array:
    """Return the borders of equal bins, as ``numpy.histogram`` places them.

    Args:
        first: where they begin; half a unit or more before, if they end there too.
        last: where they end.
        bins: how many, fewer where ``dtype`` cannot tell their borders apart.
        dtype: of the result, float32 or float64.
    """
    first, last = float(first), float(last)
    if first == last:
        most = float(np.finfo(dtype).max)
        beside = max(0.5, abs(first) * float(np.finfo(dtype).eps))
        first, last = max(first - beside, -most), min(last + beside, most)
    with np.errstate(over="ignore", invalid="ignore"):
        edges = np.linspace(dtype.type(first), dtype.type(last), bins + 1, dtype=dtype)
    if not np.isfinite(edges).all():  # the span is too large for the type, not its ends
        edges = (2 * np.linspace(first / 2, last / 2, bins + 1)).astype(dtype)
    return edges if (edges[1:] > edges[:-1]).all() else np.unique(edges)


class BinCounter:
    """Counts values in bins; each holds its lower border, the last one its upper border as well.

    That is what ``numpy.histogram`` counts, but that values beyond the ends count in the bins at
    the ends.

    Args:
        edges: borders, float32 or float64, ascending.
        counts: int64, one less; added to in place.
    """

    def __init__(self, edges: Array, counts: Array) -> None:
        self.counts = counts
        self._edges = torch.from_numpy(edges)
        self._first, bins = float(edges[0]), len(counts)
        self._per_unit = bins / (float(edges[-1]) - self._first)
        with np.errstate(over="ignore"):  # as numpy.linspace computes them, rounding included
            self._width = float((edges[-1:] - edges[:1])[0] / edges.dtype.type(bins))
        self._is_even = self._can_compute()

    def _can_compute(self) -> bool:
        """Whether a value's bin follows from its position, which rounding may shift.

        Rounding never changes the order of two values, so those between two borders are between
        the positions computed for these. Where all of these are right by less than a half, a
        position rounded is the border before or after the value, and one comparison tells.
        """
        steps = torch.arange(len(self._edges), dtype=self._edges.dtype)
        wrong = (self._positions(self._edges) - steps).abs().max()
        inner = slice(1, -1)
        same = torch.equal(self._borders(steps.clone())[inner], self._edges[inner])
        return same and bool(wrong < 1 - _NEVER_FIRST)

    def _positions(self, values: Tensor) -> Tensor:
        return values.sub(self._first).mul_(self._per_unit)

    def _borders(self, steps: Tensor) -> Tensor:
        """Return the borders of these numbers, in place of them."""
        return steps.mul_(self._width).add_(self._first)

    def add(self, values: Tensor) -> None:
        """Count finite values of any floating-point type, in place."""
        for block in torch.split(values.flatten(), BLOCK):
            self._add(block.to(self._edges.dtype))

    def _add(self, values: Tensor) -> None:
        index = self._computed(values) if self._is_even else self._searched(values)
        found = torch.bincount(index, minlength=len(self.counts) + 1).cpu().numpy()
        self.counts += found[:-1]
        self.counts[-1] += found[-1]

    def _computed(self, values: Tensor) -> Tensor:
        """Return the bin of each value, and one more for the last border and what is beyond."""
        nearest = self._positions(values).clamp_(_NEVER_FIRST, len(self.counts)).round_()
        index = nearest.to(torch.int32)
        below = self._borders(nearest).sub_(values)
        if below.dtype != torch.float32:
            return index.sub_((below > 0).view(torch.uint8))
        # A positive float is a positive integer: -1 where the border is above the value, else 0.
        return index.add_(below.view(torch.int32).neg_().bitwise_right_shift_(31))

    def _searched(self, values: Tensor) -> Tensor:
        if self._edges.device != values.device:
            self._edges = self._edges.to(values.device)
        found = torch.bucketize(values, self._edges, right=True).sub_(1)
        return found.clamp_(0, len(self.counts))
