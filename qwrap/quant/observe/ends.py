"""The smallest and the largest value seen, and their moving averages over batches."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Ends:
    """Running ends of each channel's range.

    Attributes:
        share: weight of a new batch in the moving averages; the first one is taken as it is.
        batches: how many were taken.
    """

    def __init__(self, share: float) -> None:
        self.share, self.batches = share, 0
        # Extremes, float32 [2, C], and averages, float64 [2, C]; or else, while only the CPU and
        # one range are concerned, the same four as numbers: a tensor of one value costs as much
        # there as one of thousands.
        self._tensors: tuple[Tensor, Tensor] | None = None
        self._numbers: list[float] | None = None

    @property
    def channels(self) -> int | None:
        """How many ranges there are, None before the first batch."""
        tensors = self.tensors()
        return None if tensors is None else tensors[0].shape[1]

    @property
    def device(self) -> torch.device | None:
        """Where they are, None before the first batch."""
        if self._tensors is not None:
            return self._tensors[0].device
        return None if self._numbers is None else torch.device("cpu")

    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """Return lowest and highest, float32 ``[2, C]``, and the averages, float64 ``[2, C]``.

        A channel without a usable value has ``inf`` and ``-inf``. None before the first batch.
        """
        if self._numbers is not None:
            ends = torch.tensor(self._numbers, dtype=torch.float64).view(2, 2, 1)
            self.replace(ends[0].to(torch.float32), ends[1].clone(), self.batches)
        return self._tensors

    def replace(self, extremes: Tensor, averages: Tensor, batches: int) -> None:
        """Set everything, in place: tensors as ``tensors`` returns them."""
        self._tensors, self._numbers, self.batches = (extremes, averages), None, batches

    def take_numbers(self, low: float, high: float) -> None:
        """Take in a batch with one range, whose ends are float32 numbers, in place."""
        if self._tensors is not None:
            self._numbers = torch.cat(self._tensors).view(-1).tolist()
            self._tensors = None
        lowest, highest, *averages = self._numbers or (math.inf, -math.inf, math.inf, -math.inf)
        if math.isfinite(averages[0]):
            kept, share = 1 - self.share, self.share
            averages = [averages[0] * kept + low * share, averages[1] * kept + high * share]
        else:
            averages = [low, high]
        self._numbers = [min(lowest, low), max(highest, high), *averages]
        self.batches += 1

    def take(self, ends: Tensor) -> None:
        """Take in a batch's ends, float32 ``[2, C]``, in place."""
        self._join(ends, ends.to(torch.float64), self.share, 1)

    def merge(self, other: Ends) -> None:
        """Take in what another saw, in place; averages count with the batches behind them."""
        theirs = other.tensors()
        if theirs is not None:
            share = other.batches / (self.batches + other.batches)
            self._join(*theirs, share, other.batches)

    def _join(self, ends: Tensor, averages: Tensor, share: float, batches: int) -> None:
        ours = self.tensors()
        if ours is None:
            self.replace(ends.clone(), averages.clone(), batches)
            return
        if ours[0].device != ends.device:
            ends, averages = ends.to(ours[0].device), averages.to(ours[0].device)
        extremes = torch.stack((
            torch.minimum(ours[0][0], ends[0]),
            torch.maximum(ours[0][1], ends[1]),
        ))
        mixed = ours[1] * (1 - share) + averages * share
        mixed = torch.where(ours[1].isfinite(), mixed, averages)
        mixed = torch.where(averages.isfinite(), mixed, ours[1])
        self.replace(extremes, mixed, self.batches + batches)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move with ``fn``, in place; as integers, so that nothing is rounded to another type."""
        tensors = self.tensors()
        if tensors is not None:
            self._tensors = (
                fn(tensors[0].view(torch.int32)).view(torch.float32),
                fn(tensors[1].view(torch.int64)).view(torch.float64),
            )
