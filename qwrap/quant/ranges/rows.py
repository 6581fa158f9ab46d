"""Histograms of many tensors and channels side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_WIDTH = 2.0**-6  # of a bin that ends where the data does; a lone value is spread over it


@dataclass(frozen=True, slots=True)
class HistogramRows:
    """Histograms of R tensors or channels, of equally many bins, in float64 on the CPU.

    The bins that hold the extremes end there, so that no part of the density lies outside of what
    was seen.

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
            high: ``[R]`` largest value seen; below ``low`` where there was none.
        """
        bins = (counts.shape[1] - 1) // 2
        zeros = counts[:, -1].to(torch.float64)
        inside = counts[:, :-1].to(torch.float64)
        inside[:, bins] -= zeros
        width = torch.ldexp(torch.ones_like(zeros), exponent.to(torch.int32)) / bins
        low, high = low.to(torch.float64), high.to(torch.float64)
        empty = low > high
        low, high = (torch.where(empty, 0.0, end) for end in (low, high))
        lowest = torch.minimum(low, width * (low.div(width).floor_() + 1 - _LEAST_WIDTH))
        highest = torch.maximum(high, width * (high.div(width).floor_() + _LEAST_WIDTH))
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

    def by_side(self) -> Iterator[tuple[Tensor, HistogramRows]]:
        """Yield indices and rows: those without negative values, from 0 on, and the others."""
        positive = self.low >= 0
        for side in (True, False):
            index = (positive == side).nonzero()[:, 0]
            if index.numel():
                yield index, self[index]._above_zero() if side else self[index]

    def _above_zero(self) -> HistogramRows:
        bins = -self.first
        return HistogramRows(
            self.counts[:, bins:],
            self.edges[:, bins:],
            self.zeros,
            self.width,
            self.low,
            self.high,
            0,
        )
