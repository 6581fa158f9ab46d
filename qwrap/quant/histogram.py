"""A histogram that grows by powers of two, so that it can be widened and merged without loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwrap.errors import ConfigError

BINS = 2048
_LOWEST_EXPONENT = -60


class DyadicHistogram:
    """Counts of values in ``2 * bins`` equal bins over ``[-2^k, 2^k)``.

    A value's bin is the floor of its product with a power of two, which float32 computes exactly
    (only a product that underflows may land on the other side of zero); doubling the range sums
    neighbouring bins. So the counts do not depend on the order in which values came, nor on the
    ranges in between.

    Attributes:
        bins: bins on each side of zero, a power of two.
        exponent: the ``k`` above, None while empty.
        counts: int64 ``[2 * bins + 1]``, None while empty. The last entry counts exact zeros, which
            are also in bin ``bins``: they are many after a Relu, and have no rounding error.
    """

    def __init__(self, bins: int = BINS) -> None:
        if bins < 1 or bins & (bins - 1):
            raise ConfigError(f"a histogram's bins must be a power of two; got {bins}")
        self.bins = bins
        self.exponent: int | None = None
        self.counts: Tensor | None = None

    def add(self, values: Tensor, largest: float, weight: int = 1) -> None:
        """Count flat, finite ``values``, each ``weight`` times.

        Args:
            values: floats, 1-D.
            largest: their largest magnitude or more, below ``2^128``.
            weight: how many values each of them stands for.
        """
        exponent = math.frexp(largest)[1] if largest else _LOWEST_EXPONENT
        counts = self._cover(max(exponent, _LOWEST_EXPONENT), values.device)
        assert self.exponent is not None
        values = values.contiguous()  # a strided sample is slow to read, so it is read once
        scaled = values.to(torch.float32) * (self.bins * 2.0**-self.exponent)
        index = scaled.floor_().to(torch.int32).add_(self.bins)
        one = torch.ones(1, dtype=torch.int64, device=values.device)
        counts.index_add_(0, index, one.expand(index.shape), alpha=weight)
        counts[-1].add_(values.numel() - values.count_nonzero(), alpha=weight)

    def merge(self, other: DyadicHistogram) -> None:
        """Add the counts of ``other``, in place."""
        if self.bins != other.bins:
            raise ConfigError(f"cannot merge histograms of {self.bins} and {other.bins} bins")
        if other.counts is None or other.exponent is None:
            return
        counts = self._cover(other.exponent, other.counts.device)
        assert self.exponent is not None
        counts.add_(_widened(other.counts, self.exponent - other.exponent).to(counts.device))

    def _cover(self, exponent: int, device: torch.device) -> Tensor:
        """Widen to at least ``2^exponent``; return the counts."""
        if self.counts is None or self.exponent is None:
            self.counts = torch.zeros(2 * self.bins + 1, dtype=torch.int64, device=device)
            self.exponent = exponent
        elif exponent > self.exponent:
            self.counts = _widened(self.counts, exponent - self.exponent)
            self.exponent = exponent
        return self.counts


def _widened(counts: Tensor, doublings: int) -> Tensor:
    """Return the counts over a range ``2^doublings`` times as wide."""
    side = (counts.numel() - 1) // 2
    # After log2(side) doublings all that is left is one bin on each side of zero.
    merged = min(1 << doublings, side)
    result = torch.zeros_like(counts)
    half = side // merged
    result[side - half : side + half] = counts[:-1].reshape(-1, merged).sum(1)
    result[-1] = counts[-1]
    return result
