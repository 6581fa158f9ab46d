"""Ranges from histograms: by entropy, percentile or distribution."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from qwrap.ort.calibration.by_outputs import by_name
from qwrap.ort.calibration.calibrator import CalibraterBase, ModelSource, batches_of
from qwrap.ort.calibration.collector import HistogramCollector
from qwrap.ort.calibration.data_reader import CalibrationDataReader
from qwrap.ort.calibration.doubling import DoublingHistogram
from qwrap.ort.calibration.float_model import FloatModel
from qwrap.ort.calibration.spool import Spool
from qwrap.ort.calibration.tensor_data import TensorsData
from qwrap.ort.enums import CalibrationMethod
from qwrap.ort.errors import QuantizationError


class HistogramCalibrater(CalibraterBase):
    """Counts the values of every tensor in bins.

    For percentile and distribution, bins are fixed by the extremes of all batches of one
    ``collect_data``, as onnxruntime's are, so that each batch runs twice; in between it is in a
    temporary file. For entropy, ranges grow while batches come.

    Attributes:
        collector: holds the histograms, None before there are any.
        method: "entropy", "percentile" or "distribution".
        num_bins: bins of a tensor's first histogram.
        num_quantized_bins: levels of a range, for entropy.
        percentile: share of the values that a range is to hold.
        scenario: "same" or "p3", for distribution.
        clamped: whether symmetric ranges end where the values do, on each side.
    """

    calibration_method: CalibrationMethod | None = None

    def __init__(
        self,
        model_path: ModelSource,
        op_types_to_calibrate: Sequence[str] | None = None,
        augmented_model_path: str | os.PathLike[str] = "augmented_model.onnx",
        use_external_data_format: bool = False,
        method: str = "percentile",
        symmetric: bool = False,
        num_bins: int = 128,
        num_quantized_bins: int = 2048,
        percentile: float = 99.999,
        scenario: str = "same",
    ) -> None:
        """Read a model.

        Args:
            model_path: see ``CalibraterBase``.
            op_types_to_calibrate: see ``CalibraterBase``.
            augmented_model_path: see ``CalibraterBase``.
            use_external_data_format: see ``CalibraterBase``.
            method: "entropy", "percentile" or "distribution".
            symmetric: let ranges end equally far from 0.
            num_bins: bins of a tensor's first histogram.
            num_quantized_bins: levels of a range, for entropy.
            percentile: 0 to 100, how much of the values a range is to hold.
            scenario: "same" or "p3", for distribution: of the values or of their cube roots.

        Raises:
            QuantizationError: the model is neither a path nor a model (a ``ValueError``).
        """
        super().__init__(
            model_path,
            op_types_to_calibrate,
            augmented_model_path,
            symmetric,
            use_external_data_format,
        )
        self.calibrate_tensors_range: TensorsData | None = None
        self.collector: HistogramCollector | None = None
        self.method = method
        self.num_bins = num_bins
        self.num_quantized_bins = num_quantized_bins
        self.percentile = percentile
        self.scenario = scenario
        self.clamped = False
        self._chosen: set[str] | None = None
        self._growing: dict[str, DoublingHistogram] = {}

    @property
    def tensors_to_calibrate(self) -> set[str]:
        """Names of the tensors that are watched; may be set."""
        if self._chosen is None:
            return self.select_tensors_to_calibrate(self._source)[0]
        return self._chosen

    @tensors_to_calibrate.setter
    def tensors_to_calibrate(self, names: set[str] | None) -> None:
        self._chosen = names

    def collect_data(self, data_reader: CalibrationDataReader) -> None:
        """Run all batches of a reader, and count values, in place.

        Raises:
            QuantizationError: there is no batch, and was none before, or one does not fit the
                graph inputs (a ``ValueError``).
        """
        collector = self.collector or self._new_collector()
        if type(collector).collect is not HistogramCollector.collect or self._runs_outputs():
            self._collect_outputs(collector, data_reader)
            return
        collect = self._collect_once if self.method == "entropy" else self._collect_twice
        if collect(collector, data_reader):
            self.collector = collector
        elif self.collector is None:
            raise QuantizationError("No data is collected.")

    def _collect_outputs(self, collector: Any, data_reader: CalibrationDataReader) -> None:
        """Give all outputs of all batches to a collector, in place."""
        if isinstance(self._session(), FloatModel) and not self.overrides("augment_graph"):
            self.model = self.get_augment_model()
            self.create_inference_session()
        session = self._session()
        self.intermediate_outputs += [session.run(None, b) for b in batches_of(data_reader)]
        if not self.intermediate_outputs:
            raise QuantizationError("No data is collected.")
        wanted = self.tensors_to_calibrate
        collector.collect(by_name(self._output_names(), self.intermediate_outputs, wanted))
        self.collector = collector
        self.clear_collected_data()

    def _collect_once(self, collector: HistogramCollector, reader: CalibrationDataReader) -> int:
        """Count values in ranges that grow while they come; return how many batches there were.

        The thresholds that entropy chooses from need not be those of onnxruntime.
        """
        if not self._growing:
            bins = self.num_bins
            self._growing = {n: DoublingHistogram(n, bins) for n in self.tensors_to_calibrate}
            self._watched = {name: growing.extremes for name, growing in self._growing.items()}
        watchers = {name: growing.take for name, growing in self._growing.items()}
        batches = sum(1 for _ in self._session().observe(batches_of(reader), watchers))
        made = {name: growing.result() for name, growing in self._growing.items()}
        collector.histogram_dict = {name: h for name, h in made.items() if h is not None}
        return batches

    def _collect_twice(self, collector: HistogramCollector, reader: CalibrationDataReader) -> int:
        """Count values in the bins of onnxruntime; return how many batches there were.

        The first run tells the range of all batches, and the second one counts.
        """
        watched = self._extremes(magnitudes=collector.counts_magnitudes)
        first = {name: extremes.take for name, extremes in watched.items()}
        second = {name: partial(collector.count, name) for name in watched}
        with Spool() as spool:
            passing = spool.passing(batches_of(reader))
            batches = sum(1 for _ in self._session().observe(passing, first))
            for extremes in watched.values():
                collector.cover(extremes)
            for _ in self._session().observe(spool.batches(), second):
                pass
        return batches

    def _new_collector(self) -> HistogramCollector:
        return HistogramCollector(
            method=self.method,
            symmetric=self.symmetric,
            num_bins=self.num_bins,
            num_quantized_bins=self.num_quantized_bins,
            percentile=self.percentile,
            scenario=self.scenario,
            clamped=self.clamped,
        )

    def compute_data(self) -> TensorsData:
        """Return ranges with their histograms; for distribution mean and deviation too.

        Raises:
            QuantizationError: no data was collected, or a setting is wrong (a ``ValueError``).
            TypeError: the class does not say which method it is for.
        """
        if self.collector is None:
            raise QuantizationError("No collector created and can't generate calibration data.")
        if self.calibration_method is None:
            raise TypeError(
                f"Unknown calibrater {type(self)}. This method must be overwritten, or "
                "calibration_method be set."
            )
        self._report()
        self.collector.clamped |= self.clamped  # one made elsewhere does not know
        return TensorsData(self.calibration_method, self.collector.compute_collection_result())


class EntropyCalibrater(HistogramCalibrater):
    """Ranges that lose least of each tensor's distribution; 2048 bins and 256 levels are usual."""

    calibration_method = CalibrationMethod.Entropy

    def __init__(
        self,
        model_path: ModelSource,
        op_types_to_calibrate: Sequence[str] | None = None,
        augmented_model_path: str | os.PathLike[str] = "augmented_model.onnx",
        use_external_data_format: bool = False,
        method: str = "entropy",
        symmetric: bool = False,
        num_bins: int = 128,
        num_quantized_bins: int = 128,
    ) -> None:
        """Read a model; arguments as for ``HistogramCalibrater``."""
        super().__init__(
            model_path,
            op_types_to_calibrate,
            augmented_model_path,
            use_external_data_format,
            method=method,
            symmetric=symmetric,
            num_bins=num_bins,
            num_quantized_bins=num_quantized_bins,
        )


class PercentileCalibrater(HistogramCalibrater):
    """Ranges that hold a share of each tensor's values."""

    calibration_method = CalibrationMethod.Percentile

    def __init__(
        self,
        model_path: ModelSource,
        op_types_to_calibrate: Sequence[str] | None = None,
        augmented_model_path: str | os.PathLike[str] = "augmented_model.onnx",
        use_external_data_format: bool = False,
        method: str = "percentile",
        symmetric: bool = False,
        num_bins: int = 2048,
        percentile: float = 99.999,
    ) -> None:
        """Read a model; arguments as for ``HistogramCalibrater``."""
        super().__init__(
            model_path,
            op_types_to_calibrate,
            augmented_model_path,
            use_external_data_format,
            method=method,
            symmetric=symmetric,
            num_bins=num_bins,
            percentile=percentile,
        )


class DistributionCalibrater(HistogramCalibrater):
    """Means and deviations of tensors, from which float8 takes its scales; needs 512 bins."""

    calibration_method = CalibrationMethod.Distribution

    def __init__(
        self,
        model_path: ModelSource,
        op_types_to_calibrate: Sequence[str] | None = None,
        augmented_model_path: str | os.PathLike[str] = "augmented_model.onnx",
        use_external_data_format: bool = False,
        method: str = "distribution",
        num_bins: int = 128,
        scenario: str = "same",
    ) -> None:
        """Read a model; arguments as for ``HistogramCalibrater``."""
        super().__init__(
            model_path,
            op_types_to_calibrate,
            augmented_model_path,
            use_external_data_format,
            method=method,
            num_bins=num_bins,
            scenario=scenario,
        )
