"""What one observer saw, as a plain value on the CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qwrap.quant.observe.observers import HistogramObserver, MinMaxObserver, Observer

EMPTY = (math.inf, -math.inf)  # ends of a channel without a value
EXPONENTS = range(-60, 129)  # of what a float32 below 2^128 falls under


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorStatistics:
    """What one observer saw, on the CPU.

    A channel that had no usable value has the ends ``inf`` and ``-inf``.

    Attributes:
        axis: what the ``C`` channels run along, None for one range (``C = 1``).
        count: values seen, without those of the next two.
        masked: values of a magnitude that only attention masks have.
        nonfinite: NaN and infinities.
        batches: how often there was a value at all; what the moving averages weigh in a merge.
        extremes: smallest and largest value, float32 ``[2, C]``; ``[2, 0]`` before any batch.
        averages: moving averages of the batches' smallest and largest values, float64 ``[2, C]``.
        bins: of the histogram on each side of zero, None if none was kept.
        counts: int64 ``[C, 2 * bins + 1]``, see ``DyadicHistogram``; None while it is empty.
        exponent: int32 ``[C]``, None while it is empty.
    """

    axis: int | None
    count: int
    masked: int
    nonfinite: int
    batches: int
    extremes: Tensor
    averages: Tensor
    bins: int | None = None
    counts: Tensor | None = None
    exponent: Tensor | None = None

    @property
    def channels(self) -> int:
        """How many ranges there are, 0 before any batch."""
        return self.extremes.shape[1]

    @property
    def low(self) -> Tensor:
        """Smallest value, float32 ``[C]``."""
        return self.extremes[0]

    @property
    def high(self) -> Tensor:
        """Largest value, float32 ``[C]``."""
        return self.extremes[1]

    @classmethod
    def of(cls, observer: Observer) -> TensorStatistics:
        """Return what ``observer`` saw until now."""
        state = observer.get_extra_state()
        left_out = state["left_out"]
        masked, nonfinite = (0, 0) if left_out is None else left_out.tolist()
        extremes, averages = _on_cpu(state["extremes"]), _on_cpu(state["averages"])
        return cls(
            axis=state["axis"],
            count=state["seen"] - masked - nonfinite,
            masked=masked,
            nonfinite=nonfinite,
            batches=state["batches"],
            extremes=torch.zeros(2, 0) if extremes is None else extremes,
            averages=torch.zeros(2, 0, dtype=torch.float64) if averages is None else averages,
            bins=state.get("bins"),
            counts=_on_cpu(state.get("counts")),
            exponent=_on_cpu(state.get("exponent")),
        )

    def observer(self, name: str, ema: float) -> Observer:
        """Return an observer of tensor ``name`` that saw this."""
        left_out = torch.tensor([self.masked, self.nonfinite])
        state = {
            "axis": self.axis,
            "seen": self.count + self.masked + self.nonfinite,
            "batches": self.batches,
            "left_out": left_out if left_out.any() else None,
            "extremes": self.extremes if self.channels else None,
            "averages": self.averages if self.channels else None,
        }
        if self.bins is not None:
            state |= {"bins": self.bins, "counts": self.counts, "exponent": self.exponent}
        result = self.fresh_observer(name, ema)
        result.set_extra_state(state)
        return result

    def fresh_observer(self, name: str, ema: float) -> Observer:
        """Return an observer of the same kind that saw nothing yet."""
        if self.bins is None:
            return MinMaxObserver(name, self.axis, ema)
        return HistogramObserver(name, self.axis, ema, bins=self.bins)

    def problem(self) -> str | None:
        """Say what cannot be in an observer's statistic, None if nothing; for data from outside."""
        seen = self.count + self.masked + self.nonfinite
        checks = {
            f"{self.channels} ranges without a channel axis": self.axis is None
            and self.channels > 1,
            f"{seen} values in {self.batches} batches, and {self.channels} ranges": not (
                bool(seen) == bool(self.batches) == bool(self.channels)
            ),
        }
        found = next((text for text, wrong in checks.items() if wrong), None)
        return found or self._problem_of_ends() or self._problem_of_histogram()

    def _problem_of_ends(self) -> str | None:
        ends = torch.cat((self.extremes.to(torch.float64), self.averages))
        known = ends.isfinite().all(0)
        none = torch.tensor(EMPTY * 2, dtype=torch.float64)[:, None]
        if not (known | (ends == none).all(0)).all():
            return "a range is NaN or infinite"
        if bool(known.any()) != bool(self.count):
            return f"{int(known.sum())} ranges are known of {self.count} values"
        if (self.low > self.high)[known].any():
            return "a range's low end is above its high end"
        return None

    def _problem_of_histogram(self) -> str | None:
        counts, exponent, bins = self.counts, self.exponent, self.bins
        if bins is None or counts is None or exponent is None:
            return None if bins is None or not self.channels else "its histogram is missing"
        if not EXPONENTS.start <= int(exponent.min()) <= int(exponent.max()) < EXPONENTS.stop:
            return "its histogram's exponent is no float32's"
        largest = torch.maximum(-self.low, self.high).clamp(min=0).to(torch.float64)
        if (largest >= torch.pow(2.0, exponent.to(torch.float64))).any():
            return "its histogram does not cover its range"
        if (counts < 0).any() or (counts[:, -1] > counts[:, bins]).any():
            return "its histogram's counts contradict each other"
        if counts.sum(1, dtype=torch.float64).max() > 2.0**62:
            return "its histogram's counts are too large"
        return None


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()
