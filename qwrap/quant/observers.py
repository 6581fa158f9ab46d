"""What watches a tensor while data runs through the model: one statistic of fixed size each."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qwrap.errors import ConfigError, InputError, NotCalibratedError
from qwrap.quant.histogram import (
    BINS,
    CHANNEL_BINS,
    DyadicHistogram,
    can_be_read,
    exponent_of,
)
from qwrap.quant.sampling import sample

SENTINEL = 1e30
"""Magnitude from which a value is an attention mask's minus infinity, and no data."""
HALF_SENTINEL = 6e4
"""The same in float16, whose lowest number, the mask of such models, is -65504."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Observer(nn.Module):
    """Keeps the range of the tensors it sees, and counts what is in them.

    NaN, infinity and sentinels are counted and otherwise left out: a mask of -3.4e38 must not
    stretch a range. What is kept lives on the device of the tensors, and is never waited for
    there. It lies outside the module's buffers, which distributed data parallel would overwrite
    with those of rank 0; it is saved as extra state.

    Attributes:
        name: the observed tensor, for messages.
        axis: what the channels run along that have a range each, None for one range.
        ema: weight of each new batch in the moving averages.
    """

    def __init__(self, name: str = "", axis: int | None = None, ema: float = 0.01) -> None:
        super().__init__()
        self.name, self.axis, self.ema = name, axis, ema
        self._seen = self._batches = 0
        # Masked and not finite, int64 [2]; low, high and their moving averages, float32 [4, C].
        self._left_out: Tensor | None = None
        self._ends: Tensor | None = None

    @property
    def count(self) -> int:
        """Values seen, without those of the next two."""
        return self._seen - self.masked - self.nonfinite

    @property
    def masked(self) -> int:
        """Finite values of a magnitude of ``SENTINEL`` or more (float16: ``HALF_SENTINEL``)."""
        return 0 if self._left_out is None else int(self._left_out[0])

    @property
    def nonfinite(self) -> int:
        """NaN and infinities."""
        return 0 if self._left_out is None else int(self._left_out[1])

    @property
    def low(self) -> Tensor:
        """Smallest value seen, float32 ``[C]``; 0 for a channel without any usable one.

        Raises:
            NotCalibratedError: no value was seen yet.
        """
        return self._end(0)

    @property
    def high(self) -> Tensor:
        """Largest value seen, float32 ``[C]``; 0 for a channel without any usable one.

        Raises:
            NotCalibratedError: no value was seen yet.
        """
        return self._end(1)

    @property
    def ema_low(self) -> Tensor:
        """Moving average of the batches' smallest values, float32 ``[C]``, as for ``low``.

        Raises:
            NotCalibratedError: no value was seen yet.
        """
        return self._end(2)

    @property
    def ema_high(self) -> Tensor:
        """Moving average of the batches' largest values, float32 ``[C]``, as for ``low``.

        Raises:
            NotCalibratedError: no value was seen yet.
        """
        return self._end(3)

    def _end(self, index: int) -> Tensor:
        if not self.count:
            raise NotCalibratedError(
                f"tensor {self.name!r} saw no usable value ({self.nonfinite} not finite, "
                f"{self.masked} of magnitude {SENTINEL:g} or more); calibrate with data that "
                "reaches it, or exclude it"
            )
        assert self._ends is not None
        end = self._ends[index]
        return torch.where(end.isfinite(), end, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x`` and return it."""
        self.observe(x)
        return x

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take the values of ``x`` into the statistic.

        Args:
            x: of any type and shape, or of the same number of channels along ``axis`` each time.

        Raises:
            InputError: ``x`` has no such axis, or another number of channels than before.
        """
        x = x.detach()
        if x.dtype not in _FLOATS:
            x = x.to(torch.float32)
        self._check_channels(x)
        if not x.numel():
            return
        usable = None
        batch = _extremes(x, self.axis)
        if not (can_be_read(x) and _all_usable(batch, sentinel(x.dtype))):
            usable = x.abs() < sentinel(x.dtype)
            self._count_left_out(x, usable)
            batch = _extremes(x, self.axis, usable)
        self._seen += x.numel()
        self._batches += 1
        self._take_ends(batch)
        self._take(x, batch, usable)

    def _check_channels(self, x: Tensor) -> None:
        if self.axis is None:
            return
        if not -x.ndim <= self.axis < x.ndim:
            raise InputError(
                f"tensor {self.name!r}: shape {tuple(x.shape)} has no axis {self.axis}"
            )
        channels = x.shape[self.axis]
        if self._ends is not None and channels != self._ends.shape[1]:
            raise InputError(
                f"tensor {self.name!r}: {channels} channels along axis {self.axis}, but "
                f"{self._ends.shape[1]} before; a scale per channel needs a fixed number of them"
            )

    def _count_left_out(self, x: Tensor, usable: Tensor) -> None:
        finite = x.isfinite().sum()
        found = torch.stack((finite - usable.sum(), x.numel() - finite))
        self._left_out = found if self._left_out is None else self._left_out + found

    def _take_ends(self, batch: Tensor) -> None:
        if self._ends is None:
            self._ends = torch.cat((batch, batch))
            return
        low, high, ema = self._ends[:1], self._ends[1:2], self._ends[2:]
        self._ends = torch.cat((
            torch.minimum(low, batch[:1]),
            torch.maximum(high, batch[1:]),
            _moved(ema, batch, self.ema),
        ))

    @abstractmethod
    def _take(self, x: Tensor, ends: Tensor, usable: Tensor | None) -> None:
        """Take the usable values, None for all, with the ends ``[2, C]`` of each channel."""

    def merge(self, other: Observer) -> None:
        """Take what ``other`` has seen into the statistic, in place.

        Moving averages are averaged, each with the number of batches behind it.

        Raises:
            ConfigError: ``other`` keeps another statistic.
        """
        if type(other) is not type(self) or other.axis != self.axis:
            raise ConfigError(
                f"tensor {self.name!r}: cannot merge {_kind(other)} into {_kind(self)}"
            )
        if other._ends is not None:
            theirs = other._ends if self._ends is None else other._ends.to(self._ends.device)
            self._ends = theirs.clone() if self._ends is None else self._merged_ends(theirs, other)
        if other._left_out is not None:
            found = other._left_out
            device = found.device if self._left_out is None else self._left_out.device
            self._left_out = found.to(device) + (0 if self._left_out is None else self._left_out)
        self._seen += other._seen
        self._batches += other._batches

    def _merged_ends(self, theirs: Tensor, other: Observer) -> Tensor:
        assert self._ends is not None
        if theirs.shape != self._ends.shape:
            raise ConfigError(
                f"tensor {self.name!r}: cannot merge {theirs.shape[1]} channels into "
                f"{self._ends.shape[1]}"
            )
        ours, share = self._ends, other._batches / (self._batches + other._batches)
        return torch.cat((
            torch.minimum(ours[:1], theirs[:1]),
            torch.maximum(ours[1:2], theirs[1:2]),
            _moved(ours[2:], theirs[2:], share),
        ))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Observer:
        """Move the statistic along with the module, in place."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no stub
        self._map(fn)
        return self

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self._ends is not None:
            # As integers, so that a model made float16 keeps its exact ranges.
            self._ends = fn(self._ends.view(torch.int32)).view(torch.float32)
        if self._left_out is not None:
            self._left_out = fn(self._left_out)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the statistic as numbers and tensors."""
        return {
            "axis": self.axis,
            "seen": self._seen,
            "batches": self._batches,
            "left_out": _copied(self._left_out),
            "ends": _copied(self._ends),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Replace the statistic by a saved one."""
        self.axis = state["axis"]
        self._seen, self._batches = state["seen"], state["batches"]
        self._left_out, self._ends = _copied(state["left_out"]), _copied(state["ends"])


class MinMaxObserver(Observer):
    """Keeps the smallest and the largest value.

    Source: Jacob et al., arXiv:1712.05877, section 3.1.
    """

    def _take(self, x: Tensor, ends: Tensor, usable: Tensor | None) -> None:
        """Keep nothing more."""


class HistogramObserver(Observer):
    """Keeps the smallest and the largest value, and a histogram for every other method.

    Of a large tensor the histogram takes a sample: see ``qwrap.quant.sampling``.

    Attributes:
        histogram: counts of (a sample of) the values.
    """

    def __init__(
        self,
        name: str = "",
        axis: int | None = None,
        ema: float = 0.01,
        *,
        bins: int | None = None,
    ) -> None:
        super().__init__(name, axis, ema)
        if bins is None:
            bins = BINS if axis is None else CHANNEL_BINS
        self.histogram = DyadicHistogram(bins)

    def _take(self, x: Tensor, ends: Tensor, usable: Tensor | None) -> None:
        # A channel without any usable value has the ends (inf, -inf), and largest 0.
        largest = torch.maximum(-ends[0], ends[1]).clamp_(min=0)
        taken = sample(x, self.axis, usable)
        self.histogram.add(
            taken.values, exponent_of(largest), taken.weight, rows=taken.rows, usable=taken.usable
        )

    def merge(self, other: Observer) -> None:
        """Take what ``other`` has seen into the statistic, in place.

        Raises:
            ConfigError: ``other`` keeps another statistic or another number of bins.
        """
        if isinstance(other, HistogramObserver):  # first, as it may refuse
            self.histogram.merge(other.histogram)
        super().merge(other)

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        super()._map(fn)
        histogram = self.histogram
        if histogram.counts is not None and histogram.exponent is not None:
            histogram.counts, histogram.exponent = fn(histogram.counts), fn(histogram.exponent)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the statistic as numbers and tensors."""
        return super().get_extra_state() | {
            "bins": self.histogram.bins,
            "exponent": _copied(self.histogram.exponent),
            "counts": _copied(self.histogram.counts),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Replace the statistic by a saved one."""
        super().set_extra_state(state)
        self.histogram = DyadicHistogram(state["bins"])
        self.histogram.exponent = _copied(state["exponent"])
        self.histogram.counts = _copied(state["counts"])


def sentinel(dtype: torch.dtype) -> float:
    """Return the magnitude from which a value of ``dtype`` is a mask's."""
    return HALF_SENTINEL if dtype == torch.float16 else SENTINEL


def _extremes(x: Tensor, axis: int | None, usable: Tensor | None = None) -> Tensor:
    """Return the least and the greatest usable value of each channel, float32 ``[2, C]``.

    They are ``inf`` and ``-inf`` for a channel without any. Rounding to float32 keeps the order,
    so that these are the extremes of the values as float32 too.
    """
    if usable is None and axis is None:
        return torch.stack(torch.aminmax(x)).to(torch.float32)[:, None]
    left_out = None if usable is None else ~usable
    low = x if left_out is None else x.masked_fill(left_out, math.inf)
    high = x if left_out is None else x.masked_fill(left_out, -math.inf)
    if axis is None:
        return torch.stack((low.amin(), high.amax())).to(torch.float32)[:, None]
    others = [i for i in range(x.ndim) if i != axis % x.ndim]
    if others:  # an empty list would stand for all
        low, high = low.amin(others), high.amax(others)
    return torch.stack((low, high)).to(torch.float32)


def _all_usable(ends: Tensor, limit: float) -> bool:
    return bool((ends.abs() < limit).all())  # not so with a NaN


def _moved(average: Tensor, new: Tensor, share: float) -> Tensor:
    """Return the average moved towards ``new``; where one of the two is unknown, the other."""
    mixed = average * (1 - share) + new * share
    return torch.where(new.isfinite(), torch.where(average.isfinite(), mixed, new), average)


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _kind(observer: Observer) -> str:
    axis = "" if observer.axis is None else f" along axis {observer.axis}"
    return type(observer).__name__ + axis
