"""Collects histograms of tensors, and chooses ranges from them."""

from __future__ import annotations

import abc
import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwrap.ort.calibration.bins import BinCounter
from qwrap.ort.calibration.extremes import Extremes, finite
from qwrap.ort.calibration.histogram import (
    AbsoluteHistogram,
    Histogram,
    RealHistogram,
    covering,
    reaching,
)
from qwrap.ort.calibration.plot import apply_plot
from qwrap.ort.calibration.tensor_data import TensorData
from qwrap.ort.calibration.thresholds import (
    LEAST_BINS,
    entropy_ranges,
    mean_and_deviation,
    percentile_ends,
    within,
)
from qwrap.ort.errors import QuantizationError

_LOG = logging.getLogger(__name__)

Array = NDArray[Any]
Arrays = Mapping[str, "Array | list[Array]"]
Chosen = dict[str, "tuple[Any, ...] | TensorData"]

METHODS = ("entropy", "percentile", "distribution")
SCENARIOS = {"same": 1.0, "p3": 1 / 3}


class CalibrationDataCollector(metaclass=abc.ABCMeta):
    """Takes in tensors, and tells what calibration wants to know of them."""

    @abc.abstractmethod
    def collect(self, name_to_arr: Arrays) -> None:
        """Take in arrays by the name of their tensor."""
        raise NotImplementedError

    @abc.abstractmethod
    def compute_collection_result(self) -> Any:
        """Return the result of all that was taken in."""
        raise NotImplementedError


class HistogramCollector(CalibrationDataCollector):
    """Counts values in bins, and chooses ranges by entropy, percentile or distribution.

    ``collect`` takes all there is at once. What comes piece by piece goes through ``cover``, with
    the extremes of all pieces, and then ``count``, with each; the bins are the same.

    Attributes:
        clamped: whether symmetric ranges end where the values do.
        histogram_dict: tensor -> counts, borders, smallest and largest value, and, unless
            magnitudes are counted, the half of the range.
    """

    def __init__(
        self,
        method: str,
        symmetric: bool,
        num_bins: int,
        num_quantized_bins: int,
        percentile: float,
        scenario: str,
        *,
        clamped: bool = False,
    ) -> None:
        """Start with nothing.

        Args:
            method: "entropy", "percentile" or "distribution".
            symmetric: whether ranges are to end equally far from 0.
            num_bins: bins of a tensor's first histogram.
            num_quantized_bins: for entropy, how many levels a range has.
            percentile: which share of the values a range is to hold.
            scenario: for distribution, "same" or "p3": of the values or of their cube roots.
            clamped: end symmetric ranges where the values do, on each side, so that those of
                values without a sign begin at 0.
        """
        self.histogram_dict: dict[str, Any] = {}
        self.method = method
        self.symmetric = symmetric
        self.num_bins = num_bins
        self.num_quantized_bins = num_quantized_bins
        self.percentile = percentile
        self.scenario = scenario
        self.clamped = clamped
        self._counters: dict[str, BinCounter] = {}
        self._all_finite: set[str] = set()

    def _ends_alike(self) -> bool:
        return self.symmetric and not self.clamped

    @property
    def counts_magnitudes(self) -> bool:
        """Whether histograms are of magnitudes."""
        return self.method == "percentile" and self.symmetric

    def get_histogram_dict(self) -> dict[str, Any]:
        """Return ``histogram_dict``."""
        return self.histogram_dict

    # --- counting --------------------------------------------------------------------------------

    def collect(self, name_to_arr: Arrays) -> None:
        """Count arrays, or lists of arrays of any shapes, by the name of their tensor.

        Raises:
            QuantizationError: an array is none of floats, those of one tensor are of several
                types, or ``method`` is unknown (a ``ValueError``).
        """
        self._check_method()
        if self.counts_magnitudes:
            self.collect_absolute_value(name_to_arr)
        else:
            self.collect_value(name_to_arr)

    def collect_value(self, name_to_arr: Arrays) -> None:
        """Count values; as ``collect``, whatever the method."""
        self._collect(name_to_arr, magnitudes=False)

    def collect_absolute_value(self, name_to_arr: Arrays) -> None:
        """Count magnitudes; as ``collect``, whatever the method."""
        self._collect(name_to_arr, magnitudes=True)

    def _collect(self, name_to_arr: Arrays, *, magnitudes: bool) -> None:
        for name, given in name_to_arr.items():
            arrays = _tensors(name, given, magnitudes=magnitudes)
            extremes = Extremes(name, magnitudes=magnitudes)
            for array in arrays:
                extremes.take(array)
            self.cover(extremes, magnitudes=magnitudes)
            for array in arrays:
                self.count(name, array)

    def cover(self, extremes: Extremes, *, magnitudes: bool | None = None) -> None:
        """Make room, in place, for values that are to be counted.

        Args:
            extremes: of all of them. A tensor without finite values counts as 0 where it is empty,
                and is left out where it is not.
            magnitudes: whether to count these; None for what the method wants.
        """
        name, ends = extremes.name, extremes.ends
        if ends is None:
            return
        old = self.histogram_dict.get(name)
        made: Histogram
        if self.counts_magnitudes if magnitudes is None else magnitudes:
            old = None if old is None else AbsoluteHistogram(*old)
            made = reaching(old, *ends, extremes.smallest_magnitude, self.num_bins)
        else:
            old = None if old is None else RealHistogram(*old)
            made = covering(old, *ends, self.num_bins)
        self.histogram_dict[name] = made
        self._counters[name] = BinCounter(made.edges, made.hist)
        if extremes.all_finite:
            self._all_finite.add(name)
        else:
            self._all_finite.discard(name)

    def count(self, name: str, values: Tensor) -> None:
        """Count values of a tensor that was covered, in place; those not finite are left out."""
        if name not in self._counters or not values.numel():
            return
        if name not in self._all_finite:
            values = finite(values)
        is_absolute = isinstance(self.histogram_dict[name], AbsoluteHistogram)
        self._counters[name].add(values.abs() if is_absolute else values)

    def merge_histogram(
        self,
        old_histogram: Any,
        data_arr: Array,
        new_min: Any,
        new_max: Any,
        new_threshold: Any,  # noqa: ARG002  # follows from the two before it
    ) -> RealHistogram:
        """Return a histogram with more values in it, grown by whole bins if need be.

        Args:
            old_histogram: what it was; not modified.
            data_arr: the values.
            new_min: the smallest of them.
            new_max: the largest.
            new_threshold: the larger of their magnitudes.
        """
        made = covering(RealHistogram(*old_histogram), new_min, new_max, self.num_bins)
        BinCounter(made.edges, made.hist).add(torch.from_numpy(np.asarray(data_arr)))
        return made

    # --- choosing --------------------------------------------------------------------------------

    def compute_collection_result(self) -> Chosen:
        """Return, by tensor, lowest, highest, counts and borders; statistics for distribution.

        Raises:
            QuantizationError: nothing was collected, or a setting is wrong (a ``ValueError``).
        """
        if not self.histogram_dict:
            raise QuantizationError("Histogram has not been collected. Please run collect() first.")
        self._check_method()
        if self.method == "entropy":
            return self.compute_entropy()
        if self.method == "percentile":
            return self.compute_percentile()
        return self.compute_distribution()

    def _check_method(self) -> None:
        if self.method not in METHODS:
            raise QuantizationError(
                f"Only 'entropy', 'percentile' or 'distribution' methods are supported, not "
                f"{self.method!r}"
            )

    def compute_percentile(self) -> Chosen:
        """Return lowest, highest, counts and borders by tensor, chosen by percentile.

        Raises:
            QuantizationError: the percentile is not within 0 and 100 (a ``ValueError``).
        """
        if not 0 <= self.percentile <= 100:
            raise QuantizationError(
                "Invalid percentile. Must be in range 0 <= percentile <= 100, not "
                f"{self.percentile}."
            )
        chosen: Chosen = {}
        for name, kept in self.histogram_dict.items():
            histogram = _named(kept)
            left, right = percentile_ends(histogram, self.percentile, symmetric=self.symmetric)
            ends = within(histogram, left, right, symmetric=self._ends_alike())
            chosen[name] = (*ends, histogram.hist, histogram.edges)
        self._plot()
        return chosen

    def compute_entropy(self) -> Chosen:
        """Return lowest, highest, counts and borders by tensor, chosen by entropy."""
        histograms = {name: RealHistogram(*h) for name, h in self.histogram_dict.items()}
        if self.num_bins <= self.num_quantized_bins:
            _LOG.warning(
                "num_bins=%d for num_quantized_bins=%d leave one threshold to choose from: ranges "
                "are those of MinMax; 2048 and 256 are usual",
                self.num_bins,
                self.num_quantized_bins,
            )
        ranges = entropy_ranges(
            [*histograms.values()], self.num_quantized_bins, symmetric=self._ends_alike()
        )
        self._plot()
        return {
            name: (*ends, histogram.hist, histogram.edges)
            for (name, histogram), ends in zip(histograms.items(), ranges, strict=True)
        }

    def compute_distribution(self) -> Chosen:
        """Return mean, deviation and histogram by tensor.

        Raises:
            QuantizationError: there are too few bins, or the scenario is unknown (a
                ``ValueError``).
        """
        if self.num_bins < LEAST_BINS:
            raise QuantizationError(
                f"Invalid num_bins. Must be in range 512 <= num_bins, not {self.num_bins}."
            )
        if self.scenario not in SCENARIOS:
            raise QuantizationError(
                f"Invalid scenario. Must be in {{'same', 'p3'}}, not {self.scenario!r}."
            )
        self._plot()
        return {name: self._statistics(_named(h)) for name, h in self.histogram_dict.items()}

    def _statistics(self, histogram: Histogram) -> TensorData:
        hist, edges, dtype = histogram.hist, histogram.edges, histogram.high.dtype
        mean, deviation = mean_and_deviation(hist, edges, SCENARIOS[self.scenario])
        return TensorData(
            avg=mean.astype(dtype),
            std=deviation.astype(dtype),
            hist=hist,
            hist_edges=edges,
            lowest=edges.min().astype(dtype),
            highest=edges.max().astype(dtype),
        )

    def get_entropy_threshold(self, histogram: Any, num_quantized_bins: int) -> tuple[Any, Any]:
        """Return lowest and highest of the range that keeps most of one histogram."""
        made = RealHistogram(*histogram)
        return entropy_ranges([made], num_quantized_bins, symmetric=self._ends_alike())[0]

    def _plot(self) -> None:
        if os.environ.get("QUANTIZATION_DEBUG", "0") == "1":
            for histogram in self.histogram_dict.values():
                apply_plot(*histogram[:2])


def _named(histogram: Any) -> Histogram:
    if len(histogram) == len(AbsoluteHistogram._fields):
        return AbsoluteHistogram(*histogram)
    return RealHistogram(*histogram)


def _tensors(name: str, given: Any, *, magnitudes: bool) -> list[Tensor]:
    """Return arrays as tensors, after a look at their types."""
    arrays = given if isinstance(given, list | tuple) else [given]
    for array in arrays:
        if not isinstance(array, np.ndarray | np.floating):
            raise QuantizationError(f"Unexpected type {type(array)} for tensor={name!r}")
    types = {array.dtype for array in arrays}
    if len(types) != 1:
        raise QuantizationError(
            f"The calibration expects only one element type but got {types} for tensor={name!r}"
        )
    allowed = [np.float16, np.float32] if magnitudes else [np.float16, np.float32, np.float64]
    if not types <= {np.dtype(kind) for kind in allowed}:
        raise QuantizationError(
            f"tensor={name!r}: only float32 or float16 is supported, every constant must be "
            f"explicitly typed; got {types.pop()}"
        )
    return [torch.from_numpy(np.array(array, copy=None)) for array in arrays]
