"""Ranges from the smallest to the largest value, or their moving averages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from qwrap.ort.calibration.by_outputs import ranges_of_rows, with_extremes
from qwrap.ort.calibration.calibrator import CalibraterBase, ModelSource, batches_of
from qwrap.ort.calibration.data_reader import CalibrationDataReader
from qwrap.ort.calibration.extremes import check_channels
from qwrap.ort.calibration.tensor_data import TensorData, TensorsData
from qwrap.ort.enums import CalibrationMethod
from qwrap.ort.errors import QuantizationError

Array = NDArray[Any]
Range = tuple[Array, Array]


class MinMaxCalibrater(CalibraterBase):
    """Ranges that hold all values seen, or averages of the ranges of batches.

    Attributes:
        calibrate_tensors_range: the ranges so far, None before there are any.
        moving_average: whether ranges are moving averages over batches.
        averaging_constant: share of a batch in these.
        max_intermediate_outputs: without effect: nothing is kept of a batch but its ranges.
    """

    def __init__(
        self,
        model_path: ModelSource,
        op_types_to_calibrate: Sequence[str] | None = None,
        augmented_model_path: str | os.PathLike[str] = "augmented_model.onnx",
        symmetric: bool = False,
        use_external_data_format: bool = False,
        moving_average: bool = False,
        averaging_constant: float = 0.01,
        max_intermediate_outputs: int | None = None,
        per_channel: bool = False,
    ) -> None:
        """Read a model.

        Args:
            model_path: see ``CalibraterBase``.
            op_types_to_calibrate: see ``CalibraterBase``.
            augmented_model_path: see ``CalibraterBase``.
            symmetric: let ranges end equally far from 0.
            use_external_data_format: see ``CalibraterBase``.
            moving_average: ``old + averaging_constant * (new - old)``, batch by batch, instead of
                the smallest and the largest value of all.
            averaging_constant: 0 to 1.
            max_intermediate_outputs: accepted; the result does not depend on it.
            per_channel: a range for each index of axis 1, of tensors that have one.

        Raises:
            QuantizationError: a moving average with a constant outside of 0 to 1, or the model is
                neither a path nor a model (a ``ValueError``).
        """
        super().__init__(
            model_path,
            op_types_to_calibrate,
            augmented_model_path,
            symmetric,
            use_external_data_format,
            per_channel,
        )
        if moving_average and not 0 <= averaging_constant <= 1:
            raise QuantizationError(
                "Invalid averaging constant, which should not be < 0 or > 1."
                f" It is {averaging_constant}."
            )
        self.calibrate_tensors_range: TensorsData | None = None
        self.moving_average = moving_average
        self.averaging_constant = averaging_constant
        self.max_intermediate_outputs = max_intermediate_outputs

    def collect_data(self, data_reader: CalibrationDataReader) -> None:
        """Run all batches of a reader, and widen or average ranges, in place.

        Raises:
            QuantizationError: there is no batch, and was none before, or one does not fit the
                graph inputs (a ``ValueError``).
        """
        if self._runs_outputs():
            self._collect_outputs(data_reader)
            return
        watchers = {name: extremes.take for name, extremes in self._extremes().items()}
        batches = 0
        for _ in self._session().observe(batches_of(data_reader), watchers):
            batches += 1
            if self.moving_average:
                self._take_ranges()
        if batches:
            self._take_ranges()
        elif self.calibrate_tensors_range is None:
            raise QuantizationError("No data is collected.")

    def _collect_outputs(self, data_reader: CalibrationDataReader) -> None:
        session, names = self._session(), self._output_names()
        own, most = self.model_original_outputs, self.max_intermediate_outputs
        for batch in batches_of(data_reader):
            values = zip(names, session.run(None, batch), strict=True)
            self.intermediate_outputs.append([None if n in own else value for n, value in values])
            if most is not None and len(self.intermediate_outputs) >= most:
                self.compute_data()
                self.clear_collected_data()
        if not self.intermediate_outputs and self.calibrate_tensors_range is None:
            raise QuantizationError("No data is collected.")
        ranges = self.compute_data()
        if not isinstance(ranges, TensorsData):
            raise TypeError(f"compute_data must return a TensorsData not {type(ranges)}.")
        self.clear_collected_data()

    def _take_outputs(self) -> None:
        """Merge the ranges that ``intermediate_outputs`` tell into the others, in place."""
        own = self.num_model_outputs
        rows = [row[own:] for row in self.intermediate_outputs]
        found = ranges_of_rows(self._output_names()[own:], rows, self.moving_average)
        new = {name: self._range(low, high) for name, (low, high) in found.items()}
        self.calibrate_tensors_range = self.merge_range(
            self.calibrate_tensors_range, TensorsData(CalibrationMethod.MinMax, new)
        )

    def _augmented(self, names: set[str]) -> ModelProto:
        return with_extremes(self._source, names, self.per_channel)

    def _take_ranges(self) -> None:
        """Merge what was seen since the last time into the ranges, in place."""
        found: dict[str, Range] = {}
        for name, extremes in self._watched.items():
            low, high = extremes.low, extremes.high
            if low is not None and high is not None:
                found[name] = self._range(low, high)
            extremes.clear()
        new = TensorsData(CalibrationMethod.MinMax, found)
        self.calibrate_tensors_range = self.merge_range(self.calibrate_tensors_range, new)

    def _range(self, low: Array, high: Array) -> Range:
        if self.symmetric:
            high = np.maximum(np.abs(low), np.abs(high))
            low = -high
        return low, high

    def merge_range(self, old_range: TensorsData | None, new_range: TensorsData) -> TensorsData:
        """Return the ranges that follow when ``new_range`` comes after ``old_range``.

        Tensors that only one of them has keep their range; neither is modified.
        """
        if not old_range:
            return new_range
        merged: dict[str, TensorData | tuple[Any, ...]] = {**dict(old_range.items())}
        for name, new in new_range.items():
            old = old_range.data.get(name)
            merged[name] = new if old is None else self._merged(name, old, new)
        return TensorsData(CalibrationMethod.MinMax, merged)

    def _merged(self, name: str, old: TensorData, new: TensorData) -> Range:
        check_channels(name, old.lowest, new.lowest)
        if not self.moving_average:
            return np.minimum(old.lowest, new.lowest), np.maximum(old.highest, new.highest)
        share = self.averaging_constant
        low, high = old.lowest, old.highest
        return low + share * (new.lowest - low), high + share * (new.highest - high)

    def compute_data(self) -> TensorsData:
        """Return the ranges: lowest and highest, ``[1]``, or ``[C]`` per channel.

        Tensors that were always empty have 0 for both, those without a finite value have no range.

        Raises:
            QuantizationError: no data was collected (a ``ValueError``).
        """
        if self.intermediate_outputs:
            self._take_outputs()
        if self.calibrate_tensors_range is None:
            raise QuantizationError("No data is collected.")
        self._report()
        empty = {n: (e.zero, e.zero) for n, e in self._watched.items() if e.is_empty}
        known = dict(self.calibrate_tensors_range.items())
        return TensorsData(CalibrationMethod.MinMax, {**empty, **known})
