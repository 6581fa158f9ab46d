"""What all calibrators share: the model, the tensors to look at, and the batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto, ValueInfoProto

from qwrap.ort.calibration.data_reader import CalibrationDataReader
from qwrap.ort.calibration.extremes import Extremes
from qwrap.ort.calibration.float_model import CPU, FloatModel
from qwrap.ort.calibration.selection import observed_tensors, with_outputs
from qwrap.ort.calibration.tensor_data import TensorsData
from qwrap.ort.errors import QuantizationError
from qwrap.ort.files.model_io import HeldModel, read_model, write_model

_LOG = logging.getLogger(__name__)
_PACKAGE = "qwrap.ort."

ModelSource = str | Path | ModelProto | HeldModel


class CalibraterBase:
    """Runs data through a float model and watches tensors.

    Each tensor is looked at when it has been computed, and then freed. Nothing is kept of a batch
    but statistics of fixed size.

    A subclass may do as those of onnxruntime's classes do: choose other tensors, override
    ``augment_graph``, ``create_inference_session`` or ``collect_data``, and read the outputs of
    ``infer_session``. Where it augments the graph or makes the session, or computes ranges from
    ``intermediate_outputs``, batches are run through that session, and what it returns is kept.

    Attributes:
        model: the model, with declared types; after ``augment_graph``, with outputs for the watched
            tensors.
        infer_session: what runs it, None before it is made; see ``FloatModel``.
        num_model_outputs: how many outputs the model has of its own.
        model_original_outputs: their names.
        execution_providers: onnxruntime's names of what it is to run on.
        op_types_to_calibrate: types of the nodes whose tensors are watched; None for all.
        augmented_model_path: where ``augment_graph`` writes; nothing else does.
        use_external_data_format: whether it keeps tensors in a file beside.
        symmetric: whether ranges are to end equally far from 0.
        per_channel: whether there is a range for each index of axis 1.
        custom_ops: shared libraries with operators for onnxruntime.
    """

    def __init__(
        self,
        model_path: ModelSource,
        op_types_to_calibrate: Sequence[str] | None = None,
        augmented_model_path: str | os.PathLike[str] = "augmented_model.onnx",
        symmetric: bool = False,
        use_external_data_format: bool = False,
        per_channel: bool = False,
    ) -> None:
        """Read a model.

        Args:
            model_path: path of a float model, or the model itself; a ``HeldModel`` is not copied.
            op_types_to_calibrate: types of the nodes whose inputs and outputs are watched; all
                nodes if None or empty.
            augmented_model_path: where ``augment_graph`` writes, which need not be called.
            symmetric: let ranges end equally far from 0.
            use_external_data_format: let it keep tensors in a file beside.
            per_channel: a range for each index of axis 1.

        Raises:
            QuantizationError: the model is neither a path nor a model (a ``ValueError``).
        """
        if not isinstance(model_path, str | os.PathLike | ModelProto | HeldModel):
            raise QuantizationError("model_path should be model path.")
        held = model_path
        if not isinstance(held, HeldModel):
            held = HeldModel(read_model(held))
        self.model = self._source = held.message
        self._folder = held.folder
        self.augment_model: ModelProto | None = None
        self.num_model_outputs = len(self.model.graph.output)
        self.model_original_outputs = {output.name for output in self.model.graph.output}
        self.intermediate_outputs: list[Any] = []
        self.op_types_to_calibrate = op_types_to_calibrate
        self.augmented_model_path = augmented_model_path
        self.symmetric = symmetric
        self.use_external_data_format = use_external_data_format
        self.per_channel = per_channel
        self.custom_ops: Sequence[str | os.PathLike[str]] = ()
        self.infer_session: Any = None
        self.execution_providers: Sequence[Any] = [CPU]
        self._watched: dict[str, Extremes] = {}

    def set_execution_providers(self, execution_providers: Sequence[Any] = (CPU,)) -> None:
        """Let the model run elsewhere, in place; it is loaded anew.

        Args:
            execution_providers: onnxruntime's names, or pairs of name and options. The first that
                torch has a device for is used.

        Raises:
            UnknownNameError: onnxruntime knows no such provider (a ``ValueError``).
        """
        self.execution_providers = list(execution_providers)
        self.create_inference_session()

    def create_inference_session(self) -> None:
        """Load the model, in place; it is done at the first ``collect_data`` otherwise."""
        model, folder = self.model, self._folder
        if self.overrides("augment_graph"):  # what such a method makes is in its file
            model, folder = read_model(self.augmented_model_path), None
        self.infer_session = FloatModel(model, self.execution_providers, self.custom_ops, folder)

    def select_tensors_to_calibrate(
        self, model: ModelProto
    ) -> tuple[set[str], dict[str, ValueInfoProto]]:
        """Return the names of the tensors to watch, and the types of all tensors by name.

        They are the float32 and float16 inputs and outputs of nodes of the types to calibrate,
        those in bodies of If, Loop and Scan included, but no initialisers.
        """
        return observed_tensors(model, self.op_types_to_calibrate)

    def get_augment_model(self) -> ModelProto:
        """Return the model with outputs for the watched tensors of its main graph."""
        if self.model is not self._source or self.overrides("augment_graph"):
            return self.model
        return self._augmented(self.select_tensors_to_calibrate(self._source)[0])

    def augment_graph(self) -> None:
        """Let ``model`` have outputs for the watched tensors, in place, and write it to its file.

        Calibration does not need that; those who look at the file, or run it, do.
        """
        if self.model is self._source:
            self.model = self._augmented(self.select_tensors_to_calibrate(self._source)[0])
        self.infer_session = None
        write_model(self.model, self.augmented_model_path, self.use_external_data_format)

    def _augmented(self, names: set[str]) -> ModelProto:
        return with_outputs(self._source, names)

    def collect_data(self, data_reader: CalibrationDataReader) -> None:
        """Run all batches of a reader, and keep statistics, in place; may be called again."""
        raise NotImplementedError

    def compute_data(self) -> TensorsData:
        """Return the ranges that all data collected so far leads to."""
        raise NotImplementedError

    def clear_collected_data(self) -> None:
        """Forget outputs that were kept, in place."""
        self.intermediate_outputs = []

    def overrides(self, *names: str) -> bool:
        """Whether a method is a user's own, by subclass or by assignment to the class."""
        return any(is_replaced(type(self), name) for name in names)

    # --- for calibrators -------------------------------------------------------------------------

    def _session(self) -> Any:
        if self.infer_session is None:
            self.create_inference_session()
        return self.infer_session

    def _runs_outputs(self) -> bool:
        """Whether the graph or the session is a user's own, so that only its outputs are known."""
        return self.overrides("augment_graph") or not isinstance(self._session(), FloatModel)

    def _show_outputs(self) -> Any:
        """Return a session with outputs for the watched tensors, made now if there is none."""
        is_mine = isinstance(self._session(), FloatModel) and not self.overrides("augment_graph")
        if is_mine and self.model is self._source:
            self.model = self.get_augment_model()
            self.create_inference_session()
        return self._session()

    def _output_names(self) -> list[str]:
        return [output.name for output in self._session().get_outputs()]

    def _extremes(self, *, magnitudes: bool = False) -> dict[str, Extremes]:
        """Return what watches the extremes of each tensor, always the same, now without any."""
        if not self._watched:
            for name in sorted(self.select_tensors_to_calibrate(self._source)[0]):
                made = Extremes(name, per_channel=self.per_channel, magnitudes=magnitudes)
                self._watched[name] = made
        for extremes in self._watched.values():
            extremes.clear()
        return self._watched

    def _report(self) -> None:
        """Log which tensors held what is no number."""
        for extremes in self._watched.values():
            if extremes.nans or extremes.infinities:
                what = "its range is that of the others" if extremes.found else "it has no range"
                _LOG.warning(
                    "tensor '%s': %d values are NaN and %d infinite in the calibration data; %s. "
                    "Exclude the nodes that make and read it, or repair the data",
                    extremes.name,
                    extremes.nans,
                    extremes.infinities,
                    what,
                )


def is_replaced(kind: type, name: str) -> bool:
    """Whether a method of a class was not written here."""
    return not str(getattr(getattr(kind, name), "__module__", "")).startswith(_PACKAGE)


def batches_of(data_reader: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the batches of a reader, up to the first that is None or empty, or StopIteration."""
    try:
        while batch := data_reader.get_next():
            yield batch
    except StopIteration:  # of ``next`` without a default; here it would be a RuntimeError
        return
