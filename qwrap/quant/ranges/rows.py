"""Histograms of many tensors and channels side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_LEAST_WIDTH = 2.0**-6  # of a bin that ends where the data does; a lone value is spread over it


@dataclass(frozen=True, slots=True)
class HistogramRows:
    """Histograms of R tensors or channels, of equally many bins, in float64 on the CPU.

    The bins that hold the extremes end there, so that no part of the density lies outside of what
    was seen; they hold one value at least, also where the histogram's sample has none of them.

    Attributes:
        counts: ``[R, N]`` values in each bin, without exact zeros, which have no error.
        edges: ``[R, N + 1]``.
        zeros: ``[R]`` exact zeros.
        width: ``[R]`` of a bin that does not hold an extreme; a power of two.
        low: ``[R]`` smallest value.
        high: ``[R]`` largest value.
        first: bins between 0 and the first edge; negative below 0.
    """

    counts: Tensor
    edges: Tensor
    zeros: Tensor
    width: Tensor
    low: Tensor
    high: Tensor
    first: int

    @classmethod
    def of(cls, counts: Tensor, exponent: Tensor, low: Tensor, high: Tensor) -> HistogramRows:
        """Return the rows of dyadic histograms.

        Args:
            counts: integers ``[R, 2 * bins + 1]``, exact zeros last and in bin ``bins`` too.
            exponent: integers ``[R]``; a row covers ``[-2^exponent, 2^exponent)``.
            low: ``[R]`` smallest value seen.
            high: ``[R]`` largest value seen.
        """
        bins = (counts.shape[1] - 1) // 2
        zeros = counts[:, -1].to(torch.float64)
        inside = counts[:, :-1].to(torch.float64)
        inside[:, bins] -= zeros
        width = torch.ldexp(torch.ones_like(zeros), exponent.to(torch.int32)) / bins
        low, high = low.to(torch.float64), high.to(torch.float64)
        bottom, top = low.div(width).floor_(), high.div(width).floor_()
        _count_extremes(inside, torch.stack([low, high], 1), torch.stack([bottom, top], 1) + bins)
        lowest = torch.minimum(low, width * (bottom + 1 - _LEAST_WIDTH))
        highest = torch.maximum(high, width * (top + _LEAST_WIDTH))
        highest = torch.maximum(highest, lowest + width * _LEAST_WIDTH)
        edges = width[:, None] * torch.arange(-bins, bins + 1, dtype=torch.float64)
        edges = torch.minimum(torch.maximum(edges, lowest[:, None]), highest[:, None])
        return cls(inside, edges, zeros, width, low, high, -bins)

    @property
    def total(self) -> Tensor:
        """Values in each row, zeros included, ``[R]``."""
        return self.counts.sum(1) + self.zeros

    @property
    def density(self) -> Tensor:
        """Values per real unit in each bin, ``[R, N]``."""
        widths = self.edges.diff(dim=1)
        return torch.where(widths > 0, self.counts / widths, 0.0)

    def __getitem__(self, index: Tensor | slice) -> HistogramRows:
        """Return some of the rows."""
        return HistogramRows(
            self.counts[index],
            self.edges[index],
            self.zeros[index],
            self.width[index],
            self.low[index],
            self.high[index],
            self.first,
        )

    @property
    def two_sided(self) -> bool:
        """Whether there are bins on both sides of 0."""
        return self.first < 0 < self.first + self.counts.shape[1]

    def by_side(self) -> Iterator[tuple[Tensor, HistogramRows]]:
        """Yield indices and rows with values above 0 alone, below 0 alone, and on both sides.

        The rows of the first two lose the bins on the other side.
        """
        bins, end = -self.first, self.counts.shape[1]
        above = self.low >= 0
        below = ~above & (self.high <= 0)
        sides = (above, bins, end), (below, 0, bins), (~(above | below), 0, end)
        for mask, start, stop in sides:
            index = mask.nonzero()[:, 0]
            if index.numel():
                rows = self[index]
                counts, edges = rows.counts[:, start:stop], rows.edges[:, start : stop + 1]
                yield index, replace(rows, counts=counts, edges=edges, first=start - bins)

    def within(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return ranges cut to what was seen; what ends before the nearer extreme is a point."""
        low, high = torch.maximum(low, self.low), torch.minimum(high, self.high)
        low = torch.minimum(low, high.clamp(min=0))
        return low, torch.maximum(high, low.clamp(max=0))


def _count_extremes(counts: Tensor, ends: Tensor, bins: Tensor) -> None:
    """Count a value in ``bins`` ``[R, 2]`` of the extremes that are empty, in place."""
    index = bins.to(torch.int64).clamp_(0, counts.shape[1] - 1)
    least = (ends != 0).to(counts.dtype)
    counts.scatter_(1, index, torch.maximum(counts.gather(1, index), least))
