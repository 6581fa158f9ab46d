"""What watches a tensor while data runs through the model: one statistic of fixed size each."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qwrap.errors import ConfigError, InputError, NotCalibratedError
from qwrap.quant.observe.ends import Ends
from qwrap.quant.observe.histogram import (
    BINS,
    CHANNEL_BINS,
    DyadicHistogram,
    can_be_read,
    exponent_of,
    exponent_of_number,
)
from qwrap.quant.observe.sampling import sample

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
        seen: values seen, those left out too.
        left_out: how many of them were masked and how many not finite, int64 ``[2]``; None before
            there were any.
        ends: the ranges, and how many batches there were.
    """

    def __init__(self, name: str = "", axis: int | None = None, ema: float = 0.01) -> None:
        super().__init__()
        self.name, self.axis = name, axis
        self.seen = 0
        self.ends = Ends(ema)
        self.left_out: Tensor | None = None

    @property
    def count(self) -> int:
        """Values seen, without those of the next two."""
        return self.seen - self.masked - self.nonfinite

    @property
    def masked(self) -> int:
        """Finite values of a magnitude of ``SENTINEL`` or more (float16: ``HALF_SENTINEL``)."""
        return 0 if self.left_out is None else int(self.left_out[0])

    @property
    def nonfinite(self) -> int:
        """NaN and infinities."""
        return 0 if self.left_out is None else int(self.left_out[1])

    @property
    def low(self) -> Tensor:
        """Smallest value seen, float32 ``[C]``; 0 for a channel without any usable one.

        Raises:
            NotCalibratedError: no value was seen yet.
        """
        return self._end(0, 0)

    @property
    def high(self) -> Tensor:
        """Largest value seen, float32 ``[C]``; 0 for a channel without any usable one.

        Raises:
            NotCalibratedError: no value was seen yet.
        """
        return self._end(0, 1)

    @property
    def ema_low(self) -> Tensor:
        """Moving average of the batches' smallest values, float32 ``[C]``, as for ``low``.

        Raises:
            NotCalibratedError: no value was seen yet.
        """
        return self._end(1, 0)

    @property
    def ema_high(self) -> Tensor:
        """Moving average of the batches' largest values, float32 ``[C]``, as for ``low``.

        Raises:
            NotCalibratedError: no value was seen yet.
        """
        return self._end(1, 1)

    def _end(self, kind: int, side: int) -> Tensor:
        ends = self.ends.tensors()
        if ends is None or not self.count:
            raise NotCalibratedError(
                f"tensor {self.name!r} saw no usable value ({self.nonfinite} not finite, "
                f"{self.masked} of magnitude {SENTINEL:g} or more); calibrate with data that "
                "reaches it, or exclude it"
            )
        end = ends[kind][side].to(torch.float32)
        return torch.where(end.isfinite(), end, 0.0) + 0.0  # makes -0 a 0

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
        if self.ends.device not in (None, x.device):  # of a loaded state, for one
            self._map(lambda tensor: tensor.to(x.device))
        self.seen += x.numel()
        if self.axis is None and can_be_read(x) and self._take_numbers(x):
            return
        ends, usable = self._usable_ends(x)
        self.ends.take(ends)
        # A channel without any usable value has the ends (inf, -inf), and no magnitude.
        largest = torch.maximum(-ends[0], ends[1]).clamp_(min=0)
        self._take(x, exponent_of(largest), usable)

    def _usable_ends(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return each channel's ends, and which values are usable, None for all; count the rest.

        Whether there is a rest is asked only where the answer costs no wait.
        """
        limit = sentinel(x.dtype)
        if can_be_read(x):
            ends = _extremes(x, self.axis)
            if bool((ends.abs() < limit).all()):  # not so with a NaN
                return ends, None
        magnitude = x.abs()
        usable = magnitude < limit
        finite = (magnitude < math.inf).sum()
        found = torch.stack((finite - usable.sum(), x.numel() - finite))
        self.left_out = found if self.left_out is None else self.left_out + found
        return _extremes(x, self.axis, usable), usable

    def _take_numbers(self, x: Tensor) -> bool:
        """Do the same with one range on the CPU, at less cost; return whether all was usable."""
        low, high = (end.to(torch.float32).item() for end in torch.aminmax(x))
        limit = sentinel(x.dtype)
        if not (low > -limit and high < limit):  # so written that NaN ends here too
            return False
        self.ends.take_numbers(low, high)
        self._take(x, exponent_of_number(max(-low, high)), None)
        return True

    def _check_channels(self, x: Tensor) -> None:
        if self.axis is None:
            return
        if not -x.ndim <= self.axis < x.ndim:
            raise InputError(
                f"tensor {self.name!r}: shape {tuple(x.shape)} has no axis {self.axis}"
            )
        channels, before = x.shape[self.axis], self.ends.channels
        if before is not None and channels != before:
            raise InputError(
                f"tensor {self.name!r}: {channels} channels along axis {self.axis}, but {before} "
                "before; a scale per channel needs a fixed number of them"
            )

    def reserve(self, channels: int, device: torch.device) -> None:
        """Give an observer that saw nothing yet its channels, in place."""
        if self.ends.channels is None:
            ends = torch.tensor([[math.inf], [-math.inf]]).expand(2, channels).to(device)
            self.ends.replace(ends.clone(), ends.to(torch.float64), 0)

    @abstractmethod
    def _take(self, x: Tensor, exponent: Tensor | int, usable: Tensor | None) -> None:
        """Take in the usable values, None for all, below ``2^exponent`` in each channel."""

    def take_ends(self, batch: Observer) -> None:
        """Take in the ends of one batch and how many values it had, and no more, in place."""
        ends = batch.ends.tensors()
        if ends is not None:
            self.ends.take(ends[0])
        self._count(batch)

    def merge(self, other: Observer) -> None:
        """Take what ``other`` has seen into the statistic, in place.

        Moving averages are averaged, each with the number of batches behind it.

        Raises:
            ConfigError: ``other`` keeps another statistic, or saw another number of channels.
        """
        self._check_mergeable(other)
        self.ends.merge(other.ends)
        self._count(other)

    def _count(self, other: Observer) -> None:
        self.seen += other.seen
        if other.left_out is not None:
            found = other.left_out
            known = torch.zeros_like(found) if self.left_out is None else self.left_out
            self.left_out = known + found.to(known.device)

    def _check_mergeable(self, other: Observer) -> None:
        if type(other) is not type(self) or other.axis != self.axis:
            kinds = f"{_kind(other)} into {_kind(self)}"
            raise ConfigError(f"tensor {self.name!r}: cannot merge {kinds}")
        ours, theirs = self.ends.channels, other.ends.channels
        if ours and theirs and ours != theirs:
            raise ConfigError(f"tensor {self.name!r}: cannot merge {theirs} channels into {ours}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Observer:
        """Move the statistic along with the module, in place."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no stub
        self._map(fn)
        return self

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.ends.apply(fn)
        if self.left_out is not None:
            self.left_out = fn(self.left_out)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the statistic as numbers and tensors."""
        extremes, averages = self.ends.tensors() or (None, None)
        return {
            "axis": self.axis,
            "seen": self.seen,
            "batches": self.ends.batches,
            "left_out": _copied(self.left_out),
            # Of two zeros either may be the least; a sum with 0 makes both the same one.
            "extremes": None if extremes is None else extremes + 0.0,
            "averages": None if averages is None else averages + 0.0,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Replace the statistic by a saved one."""
        self.axis, self.seen = state["axis"], state["seen"]
        self.left_out = _copied(state["left_out"])
        self.ends = Ends(self.ends.share)
        extremes, averages = _copied(state["extremes"]), _copied(state["averages"])
        if extremes is not None and averages is not None:
            self.ends.replace(extremes, averages, state["batches"])


class MinMaxObserver(Observer):
    """Keeps the smallest and the largest value.

    Source: Jacob et al., arXiv:1712.05877, section 3.1.
    """

    def _take(self, x: Tensor, exponent: Tensor | int, usable: Tensor | None) -> None:
        """Keep nothing more."""


class HistogramObserver(Observer):
    """Keeps the smallest and the largest value, and a histogram for every other method.

    Of a large tensor the histogram takes a sample: see ``qwrap.quant.observe.sampling``.

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

    def _take(self, x: Tensor, exponent: Tensor | int, usable: Tensor | None) -> None:
        taken = sample(x, self.axis, usable)
        self.histogram.add(
            taken.values, exponent, taken.weight, rows=taken.rows, usable=taken.usable
        )

    def reserve(self, channels: int, device: torch.device) -> None:
        """Give an observer that saw nothing yet its channels, in place."""
        super().reserve(channels, device)
        if self.histogram.counts is None:
            self.histogram.cover(exponent_of(torch.zeros(channels, device=device)))

    def merge(self, other: Observer) -> None:
        """Take what ``other`` has seen into the statistic, in place.

        Raises:
            ConfigError: ``other`` keeps another statistic or another number of bins.
        """
        self._check_mergeable(other)
        assert isinstance(other, HistogramObserver)
        self.histogram.merge(other.histogram)  # first, as it may refuse
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


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _kind(observer: Observer) -> str:
    axis = "" if observer.axis is None else f" along axis {observer.axis}"
    return type(observer).__name__ + axis
