"""A histogram of values whose range is not known before they come."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from qwrap.ort.calibration.bins import BLOCK
from qwrap.ort.calibration.extremes import Extremes, finite
from qwrap.ort.calibration.histogram import RealHistogram, edge_type

_LEAST_EXPONENT = -100  # so that bins in a unit are a number in float32
_TOGETHER = 1 << 15  # values: what is smaller waits, for a count takes as long as so many values


class DoublingHistogram:
    """Counts values over ``[-2^k, 2^k)``; where one lies beyond, k grows, and bins are joined.

    Each bin then is one half, or less, of a new one, so that counts do not depend on the order of
    values.

    Small tensors are kept, up to 128 KiB of them, and counted together.

    Args:
        name: of the tensor.
        bins: how many; one more if odd. Between a half and all of them hold the values.
    """

    def __init__(self, name: str, bins: int) -> None:
        self._extremes = Extremes(name)
        self._waiting: list[Tensor] = []
        self._size = 0
        self._half = -(-bins // 2)
        self._exponent = _LEAST_EXPONENT
        # One more than there are bins: the product below may be rounded up to the end.
        self._counts = torch.zeros(2 * self._half + 1, dtype=torch.int64)

    @property
    def extremes(self) -> Extremes:
        """The ends of all values taken."""
        self._count_waiting()
        return self._extremes

    def take(self, values: Tensor) -> None:
        """Count values, in place; NaN and infinity are left out."""
        if values.numel() >= _TOGETHER:
            self._count(values)
            return
        if self._waiting and not _are_alike(self._waiting[0], values):
            self._count_waiting()
        self._waiting.append(values.detach().flatten().clone())
        self._size += values.numel()
        if self._size >= _TOGETHER or len(self._waiting) >= _TOGETHER >> 9:
            self._count_waiting()

    def _count_waiting(self) -> None:
        if self._waiting:
            values, self._waiting, self._size = torch.cat(self._waiting), [], 0
            self._count(values)

    def _count(self, values: Tensor) -> None:
        extremes = self._extremes
        missing = extremes.nans, extremes.infinities
        extremes.take(values)
        if not extremes.found or not values.numel():
            return
        if missing != (extremes.nans, extremes.infinities):
            values = finite(values)
        self._cover(extremes.largest)
        per_unit = self._half * 2.0**-self._exponent
        for block in torch.split(values.flatten(), BLOCK):
            place = block.to(torch.float32).mul(per_unit).floor_().to(torch.int32).add_(self._half)
            self._counts += torch.bincount(place, minlength=len(self._counts)).cpu()

    def _cover(self, largest: float) -> None:
        exponent = max(math.frexp(largest)[1], _LEAST_EXPONENT)
        doublings = exponent - self._exponent
        if doublings <= 0:
            return
        bins = torch.arange(-self._half, self._half) >> min(doublings, 62)
        joined = torch.zeros_like(self._counts)
        joined.index_add_(0, bins + self._half, self._joined())
        self._counts, self._exponent = joined, exponent

    def _joined(self) -> Tensor:
        """Return the counts of the bins."""
        counts = self._counts[:-1].clone()
        counts[-1] += self._counts[-1]
        return counts

    def result(self) -> RealHistogram | None:
        """Return what was counted, None if nothing that has a range."""
        ends = self.extremes.ends
        if ends is None:
            return None
        dtype = edge_type(ends[0])
        most = float(np.finfo(dtype).max)  # the last power of two is beyond
        steps = np.arange(-self._half, self._half + 1)
        edges = steps * (np.ldexp(1.0, self._exponent) / self._half)
        edges = np.clip(edges, -most, most).astype(dtype)
        return RealHistogram(self._joined().numpy(), edges, *ends, edges[-1])


def _are_alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device
