"""A histogram that grows by powers of two, so that it can be widened and merged without loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwrap.errors import ConfigError

BINS = 2048
CHANNEL_BINS = 256
"""Bins a side where every channel has a histogram of its own: 4 KiB each.

2048 would take 32 KiB for each of some thousand channels of every tensor. A channel's bins span
its own range, so that even these are half as wide as the steps of 8 bits.
"""
_LOWEST_EXPONENT = -60
_MANTISSA_BITS, _EXPONENT_BIAS = 23, 127  # of float32


class DyadicHistogram:
    """Counts of values in ``2 * bins`` equal bins over ``[-2^k, 2^k)``, in one row per channel.

    A value's bin is the floor of its product with a power of two, which float64 computes exactly
    for any float32; doubling the range sums neighbouring bins. So the counts do not depend on the
    order in which values came, nor on the ranges in between. Nothing here waits for a device.

    Attributes:
        bins: bins on each side of zero, a power of two.
        exponent: the ``k`` above, int32 ``[C]``, None while empty.
        counts: int64 ``[C, 2 * bins + 1]``, None while empty. The last entry counts exact zeros,
            which are also in bin ``bins``: they are many after a Relu, and have no rounding error.
    """

    def __init__(self, bins: int = BINS) -> None:
        if bins < 1 or bins & (bins - 1):
            raise ConfigError(f"a histogram's bins must be a power of two; got {bins}")
        self.bins = bins
        self.exponent: Tensor | None = None
        self.counts: Tensor | None = None

    def add(
        self,
        values: Tensor,
        exponent: Tensor | int,
        weight: int = 1,
        *,
        rows: Tensor | None = None,
        usable: Tensor | None = None,
    ) -> None:
        """Count ``values``, each ``weight`` times.

        Args:
            values: floats, 1-D.
            exponent: int32 ``[C]``; the values of row c are below ``2^exponent[c]`` in magnitude.
                A number, for one row on the CPU, is faster.
            weight: how many values each of them stands for.
            rows: int64, the row that each value belongs to; None if there is but one.
            usable: bool, which values to count; None for all. The others may be anything.
        """
        values = values.to(torch.float32)
        if usable is not None:
            values = values.masked_fill(~usable, 0)
        index = self._bins_of(values, self._bins_per_unit(exponent, rows), rows)
        assert self.counts is not None
        width, counts = self.counts.shape[1], self.counts.view(-1)
        if rows is not None:
            index.add_(rows, alpha=width)
        _tally(counts, index, usable, weight)
        if rows is None:
            total = values.numel() if usable is None else usable.sum()
            counts[-1:].add_(total - values.count_nonzero(), alpha=weight)
        else:
            zeros = values == 0 if usable is None else (values == 0) & usable
            _tally(counts, rows * width + (width - 1), zeros, weight)

    def _bins_per_unit(self, exponent: Tensor | int, rows: Tensor | None) -> Tensor | float:
        """Widen to ``exponent``, in place; return how many bins a unit has, at each value."""
        if isinstance(exponent, int):
            if self.exponent is None or exponent > int(self.exponent):
                self.cover(torch.tensor([exponent], dtype=torch.int32))
            assert self.exponent is not None
            return self.bins * 2.0 ** -int(self.exponent)
        self.cover(exponent)
        assert self.exponent is not None
        inverse = _power_of_two(self.bins.bit_length() - 1 - self.exponent)
        return inverse if rows is None else inverse.index_select(0, rows)

    def _bins_of(self, values: Tensor, per_unit: Tensor | float, rows: Tensor | None) -> Tensor:
        # A product with 1 or more does not underflow in float32 either, which is twice as fast.
        exact = isinstance(per_unit, float) and per_unit >= 1
        scaled = values * per_unit if exact else values.to(torch.float64).mul_(per_unit)
        return scaled.floor_().to(torch.int32 if rows is None else torch.int64).add_(self.bins)

    def merge(self, other: DyadicHistogram) -> None:
        """Add the counts of ``other``, in place.

        Raises:
            ConfigError: ``other`` has another number of bins or of rows.
        """
        if self.bins != other.bins:
            raise ConfigError(f"cannot merge histograms of {self.bins} and {other.bins} bins")
        if other.counts is None or other.exponent is None:
            return
        if self.counts is not None and len(self.counts) != len(other.counts):
            raise ConfigError(
                f"cannot merge histograms of {len(self.counts)} and {len(other.counts)} channels"
            )
        device = other.counts.device if self.counts is None else self.counts.device
        theirs = other.exponent.to(device)
        self.cover(theirs)
        assert self.counts is not None
        assert self.exponent is not None
        self.counts = self.counts + widened(other.counts.to(device), self.exponent - theirs)

    @torch.inference_mode(False)  # its tensors could not be added to outside of it
    def cover(self, exponent: Tensor) -> None:
        """Widen the rows to at least ``2^exponent``, int32 ``[C]``, in place."""
        if self.counts is None or self.exponent is None:
            self.exponent = exponent.clone()
            self.counts = torch.zeros(
                len(exponent), 2 * self.bins + 1, dtype=torch.int64, device=exponent.device
            )
            return
        doublings = (exponent - self.exponent).clamp_(min=0)
        if can_be_read(doublings) and not doublings.any():
            return
        self.counts = widened(self.counts, doublings)
        self.exponent = self.exponent + doublings


def can_be_read(x: Tensor) -> bool:
    """Whether looking at the values of ``x`` costs no wait for a device."""
    return x.device.type == "cpu"


def exponent_of(largest: Tensor) -> Tensor:
    """Return the least int32 ``k``, of -60 or more, with ``largest < 2^k``.

    Args:
        largest: float32, finite and not negative.
    """
    field = largest.view(torch.int32) >> _MANTISSA_BITS
    return (field - (_EXPONENT_BIAS - 1)).clamp_(min=_LOWEST_EXPONENT)


def exponent_of_number(largest: float) -> int:
    """Return what ``exponent_of`` does, of a float32 number."""
    return max(math.frexp(largest)[1], _LOWEST_EXPONENT) if largest else _LOWEST_EXPONENT


def widened(counts: Tensor, doublings: Tensor) -> Tensor:
    """Return the counts over a range ``2^doublings`` times as wide.

    Args:
        counts: int64 ``[C, 2 * bins + 1]``.
        doublings: int32 ``[C]``, 0 or more; unknown to the host, so the bins' new places are
            computed rather than the bins reshaped.
    """
    rows, width = counts.shape
    bins = width // 2
    old = torch.arange(-bins, bins, device=counts.device)
    new = old >> doublings.clamp(max=62).to(torch.int64)[:, None]  # rounds down
    new += bins + width * torch.arange(rows, device=counts.device)[:, None]
    result = torch.zeros_like(counts)
    result[:, -1] = counts[:, -1]
    result.view(-1).index_add_(0, new.view(-1), counts[:, :-1].reshape(-1))
    return result


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return ``2^exponent`` in float64, exactly, which a device's pow() does not promise."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _tally(counts: Tensor, index: Tensor, which: Tensor | None, weight: int) -> None:
    """Add ``weight`` to the counts at ``index``, where ``which`` says so, in place."""
    if which is None:
        source = torch.ones(1, dtype=torch.int64, device=counts.device).expand(index.shape)
    else:
        source = which.to(torch.int64)
    counts.index_add_(0, index, source, alpha=weight)
