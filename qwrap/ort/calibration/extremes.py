"""The ends of what a tensor holds, and what in it is no number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwrap.ort.errors import QuantizationError

Array = NDArray[Any]


class Extremes:
    """Smallest and largest finite value of one tensor, of all that was taken since ``clear``.

    Attributes:
        name: of the tensor.
        least: smallest magnitude, if that is wanted.
        dtype: the tensor's type, None before the first value.
        nans: how many values were NaN, ever.
        infinities: how many were infinite, ever.
        found: whether any was finite, ever.
    """

    def __init__(self, name: str, *, per_channel: bool = False, magnitudes: bool = False) -> None:
        self.name, self._per_channel, self._magnitudes = name, per_channel, magnitudes
        self.dtype: np.dtype[Any] | None = None
        self.nans = self.infinities = 0
        self.found = False
        self.clear()

    def clear(self) -> None:
        """Forget the extremes, in place."""
        self._numbers: tuple[float, float] | None = None  # numbers cost a tenth of arrays
        self._channels: tuple[Array, Array] | None = None
        self.least: float = np.inf
        self._taken = False

    @property
    def low(self) -> Array | None:
        """Smallest value, of the tensor: ``[1]``, or ``[C]`` per channel, None before one."""
        return self._end(0)

    @property
    def high(self) -> Array | None:
        """Largest value, likewise."""
        return self._end(1)

    def _end(self, side: int) -> Array | None:
        if self._channels is not None:
            return self._channels[side]
        return None if self._numbers is None else np.array([self._numbers[side]], self.dtype)

    @property
    def largest(self) -> float:
        """Largest magnitude; 0 before one."""
        return 0.0 if self._numbers is None else max(-self._numbers[0], self._numbers[1])

    @property
    def ends(self) -> tuple[Array, Array] | None:
        """Smallest and largest value, without dimensions; 0 if all that was taken was empty.

        None if nothing was taken, or nothing finite.
        """
        low, high = self.low, self.high
        if low is not None and high is not None:
            return low.reshape(()), high.reshape(())
        if self.dtype is None or not self._taken or not self.all_finite:
            return None
        return np.zeros((), self.dtype), np.zeros((), self.dtype)

    @property
    def smallest_magnitude(self) -> float:
        """Smallest magnitude taken; 0 if there was none."""
        return self.least if np.isfinite(self.least) else 0.0

    @property
    def is_empty(self) -> bool:
        """Whether all that was ever taken was empty."""
        return self.dtype is not None and not self.found and self.all_finite

    @property
    def zero(self) -> Array:
        """Zero, of shape ``[1]``, in the tensor's type."""
        return np.zeros(1, self.dtype)

    @property
    def all_finite(self) -> bool:
        """Whether there was neither NaN nor infinity, ever."""
        return not self.nans and not self.infinities

    def take(self, values: Tensor) -> None:
        """Take values in, in place. Empty tensors, NaN and infinity change no extreme."""
        if self.dtype is None:
            self.dtype = torch.empty(0, dtype=values.dtype).numpy().dtype
        self._taken = True
        if not values.numel():
            return
        if self._per_channel and values.dim() > 1:
            self._take_channels(values)
            return
        low, high = (end.item() for end in values.aminmax())
        if not math.isfinite(high - low):  # or too far apart for a double, which none is
            self._count(values)
            values = finite(values)
            if not len(values):
                return
            low, high = (end.item() for end in values.aminmax())
        if self._magnitudes:
            self.least = min(self.least, float(values.abs().amin()))
        self.found = True
        old = self._numbers or (low, high)
        self._numbers = min(old[0], low), max(old[1], high)

    def _take_channels(self, values: Tensor) -> None:
        """Take in the ends for each index of axis 1; those of one without a finite value are 0."""
        rows = values.transpose(0, 1).flatten(1)
        usable = rows.isfinite()
        if not usable.all():
            self._count(values)
        low = rows.masked_fill(~usable, torch.inf).amin(1)
        high = rows.masked_fill(~usable, -torch.inf).amax(1)
        low, high = (torch.where(end.isfinite(), end, 0) for end in (low, high))
        self._join(low.cpu().numpy(), high.cpu().numpy())

    def _count(self, values: Tensor) -> None:
        self.nans += int(values.isnan().sum())
        self.infinities += int(values.isinf().sum())

    def _join(self, low: Array, high: Array) -> None:
        self.found = True
        if self._channels is not None:
            old_low, old_high = self._channels
            check_channels(self.name, old_low, low)
            low, high = np.minimum(old_low, low), np.maximum(old_high, high)
        self._channels = low, high


def check_channels(name: str, old: Array, new: Array) -> None:
    """Refuse ends of other shapes than those before."""
    if old.shape != new.shape:
        raise QuantizationError(
            f"tensor '{name}': {new.size} channels after {old.size}; ranges per channel need a "
            "fixed number of them on axis 1"
        )


def finite(values: Tensor) -> Tensor:
    """Return the finite values, in one dimension."""
    return values[values.isfinite()]
