"""What watches a tensor while data runs through the model: one statistic of fixed size each."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qwrap.errors import ConfigError, NotCalibratedError
from qwrap.quant.histogram import BINS, DyadicHistogram

SENTINEL = 1e30
"""Magnitude from which a value is an attention mask's minus infinity, and no data."""

_SAMPLE = 2**13
_MAX_STRIDE = 64


class Observer(nn.Module):
    """Keeps the range of the tensors it sees, and counts what is in them.

    NaN, infinity and sentinels are counted and otherwise left out: a mask of -3.4e38 must not
    stretch a range. What is kept lives outside the module's buffers, which distributed data
    parallel would overwrite with those of rank 0; it is saved as extra state.

    Attributes:
        name: the observed tensor, for messages.
        count: values seen, without those of the next two.
        masked: values of magnitude ``SENTINEL`` or more.
        nonfinite: NaN and infinities.
    """

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.count = self.masked = self.nonfinite = 0
        self._low, self._high = math.inf, -math.inf

    @property
    def low(self) -> float:
        """Smallest value seen.

        Raises:
            NotCalibratedError: no value was seen yet.
        """
        self._require_data()
        return self._low

    @property
    def high(self) -> float:
        """Largest value seen.

        Raises:
            NotCalibratedError: no value was seen yet.
        """
        self._require_data()
        return self._high

    def _require_data(self) -> None:
        if not self.count:
            raise NotCalibratedError(
                f"tensor {self.name!r} saw no usable value ({self.nonfinite} not finite, "
                f"{self.masked} of magnitude {SENTINEL:g} or more); calibrate with data that "
                "reaches it, or exclude it"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x`` and return it."""
        self.observe(x)
        return x

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take the values of ``x``, of any shape and type, into the statistic."""
        x = x.detach()
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            x = x.to(torch.float32)
        if not x.numel():
            return
        low, high = _extremes(x)
        if not (low > -SENTINEL and high < SENTINEL):  # so written that NaN gets here too
            x = self._usable(x)
            if not x.numel():
                return
            low, high = _extremes(x)
        self.count += x.numel()
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._take(x, max(-low, high))

    def _usable(self, x: Tensor) -> Tensor:
        usable = x[x.to(torch.float32).abs() < SENTINEL]
        nonfinite = x.numel() - int(x.isfinite().sum())
        self.nonfinite += nonfinite
        self.masked += x.numel() - usable.numel() - nonfinite
        return usable

    @abstractmethod
    def _take(self, x: Tensor, largest: float) -> None:
        """Take usable values, at least one, of magnitude up to ``largest``."""

    def merge(self, other: Observer) -> None:
        """Take what ``other`` has seen into the statistic, in place.

        Raises:
            ConfigError: ``other`` keeps another statistic.
        """
        if type(other) is not type(self):
            raise ConfigError(f"cannot merge {type(other).__name__} into {type(self).__name__}")
        self.count += other.count
        self.masked += other.masked
        self.nonfinite += other.nonfinite
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the statistic as numbers and tensors."""
        return {
            "count": self.count,
            "masked": self.masked,
            "nonfinite": self.nonfinite,
            "low": self._low,
            "high": self._high,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Replace the statistic by a saved one."""
        self.count, self.masked = state["count"], state["masked"]
        self.nonfinite = state["nonfinite"]
        self._low, self._high = state["low"], state["high"]


class MinMaxObserver(Observer):
    """Keeps the smallest and the largest value.

    Source: Jacob et al., arXiv:1712.05877, section 3.1.
    """

    def _take(self, x: Tensor, largest: float) -> None:
        """Keep nothing more."""


class HistogramObserver(Observer):
    """Keeps the smallest and the largest value, and a histogram for every other method.

    Of a large tensor the histogram takes every n-th value, each with weight n, starting one
    further each time; n has no divisor in common with the tensor's size, so that no channel layout
    is in step with it. Tensors of up to 8192 values are taken whole.

    Attributes:
        histogram: counts of (a sample of) the values.
    """

    def __init__(self, name: str = "", bins: int = BINS) -> None:
        super().__init__(name)
        self.histogram = DyadicHistogram(bins)
        self._calls = 0

    def _take(self, x: Tensor, largest: float) -> None:
        stride = sample_stride(x.numel())
        sample = x.reshape(-1)[self._calls % stride :: stride]
        self.histogram.add(sample, largest, stride)
        self._calls += 1

    def merge(self, other: Observer) -> None:
        """Take what ``other`` has seen into the statistic, in place.

        Raises:
            ConfigError: ``other`` keeps another statistic or another number of bins.
        """
        if isinstance(other, HistogramObserver):  # first, as it may refuse
            self.histogram.merge(other.histogram)
            self._calls += other._calls
        super().merge(other)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HistogramObserver:
        """Move the counts along with the module, in place."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no stub
        if self.histogram.counts is not None:
            self.histogram.counts = fn(self.histogram.counts)
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """Return the statistic as numbers and tensors."""
        counts = self.histogram.counts
        return super().get_extra_state() | {
            "calls": self._calls,
            "bins": self.histogram.bins,
            "exponent": self.histogram.exponent,
            "counts": None if counts is None else counts.clone(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Replace the statistic by a saved one."""
        super().set_extra_state(state)
        self._calls = state["calls"]
        self.histogram = DyadicHistogram(state["bins"])
        self.histogram.exponent = state["exponent"]
        counts = state["counts"]
        self.histogram.counts = None if counts is None else counts.clone()


def _extremes(x: Tensor) -> tuple[float, float]:
    low, high = torch.stack(torch.aminmax(x)).tolist()  # one wait for the device
    return low, high


@functools.lru_cache(maxsize=4096)
def sample_stride(size: int) -> int:
    """Return the step between sampled values of a tensor of ``size`` values."""
    stride = min(-(-size // _SAMPLE), _MAX_STRIDE)
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride
