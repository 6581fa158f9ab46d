"""Bins of a histogram: where they begin, and how many values lie in each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

_BLOCK = 1 << 17  # values at a time: what fits into a cache is three times as fast


def even_edges(first: Any, last: Any, bins: int, dtype: np.dtype[Any]) -> Array:
    """Return the borders of equal bins, as ``numpy.histogram`` places them.

    Args:
        first: where they begin; half a unit before, if they end there too.
        last: where they end.
        bins: how many, fewer where ``dtype`` cannot tell their borders apart.
        dtype: of the result, float32 or float64.
    """
    if first == last:
        first, last = first - 0.5, last + 0.5
    if np.isfinite(dtype.type(last - first)):
        edges = np.linspace(dtype.type(first), dtype.type(last), bins + 1, dtype=dtype)
    else:  # the span is too large for the type, not its ends
        edges = np.linspace(float(first), float(last), bins + 1).astype(dtype)
    return edges if (edges[1:] > edges[:-1]).all() else np.unique(edges)


class BinCounter:
    """Counts values in bins; each holds its lower border, the last one its upper border as well.

    That is what ``numpy.histogram`` counts, but that values beyond the ends count in the bins at
    the ends. A value's bin is computed and then compared with one border, for bins of equal width
    where rounding cannot mistake it by more than one; it is searched for in others.

    Args:
        edges: borders, float32 or float64, ascending.
        counts: int64, one less; added to in place.
    """

    def __init__(self, edges: Array, counts: Array) -> None:
        self.counts = counts
        self._edges = torch.from_numpy(edges)
        self._first = float(edges[0])
        self._per_unit = len(counts) / (float(edges[-1]) - float(edges[0]))
        steps = torch.arange(len(edges), dtype=torch.float64)
        # Rounding never changes the order of two values, so those between two borders are between
        # the positions computed for them.
        self._is_even = bool((self._positions(self._edges) - steps).abs().max() < 0.49)
        self._borders = self._edges.clone()
        self._borders[0] = -torch.inf

    def _positions(self, values: Tensor) -> Tensor:
        return values.sub(self._first).mul_(self._per_unit)

    def add(self, values: Tensor) -> None:
        """Count finite values of any floating-point type, in place."""
        for block in torch.split(values.flatten(), _BLOCK):
            self._add(block.to(self._edges.dtype))

    def _add(self, values: Tensor) -> None:
        if self._borders.device != values.device:
            self._borders = self._borders.to(values.device)
        last = len(self.counts)
        if self._is_even:
            index = self._positions(values).round_().clamp_(0, last).to(torch.int32)
            index -= (values < self._borders.index_select(0, index)).view(torch.uint8)
        else:
            index = torch.bucketize(values, self._borders, right=True).sub_(1)
        found = torch.bincount(index, minlength=last + 1).cpu().numpy()
        self.counts += found[:-1]
        self.counts[-1] += found[-1]
