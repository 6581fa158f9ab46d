"""Quantization-aware training of an ONNX file, under the name that older documentation promises."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

import qwrap
from qwrap.ort.calibrate import CalibrationDataReader
from qwrap.ort.entry.static import quantize_static
from qwrap.ort.enums import CalibrationMethod, QuantFormat, QuantType
from qwrap.ort.errors import QuantizationError
from qwrap.ort.files.model_io import read_model
from qwrap.ort.report import Report


def quantize_qat(
    model_input: str | Path | ModelProto,
    model_output: str | Path | None = None,
    op_types_to_quantize: Sequence[str] | None = None,
    per_channel: bool = False,
    reduce_range: bool = False,
    activation_type: QuantType = QuantType.QUInt8,
    weight_type: QuantType = QuantType.QInt8,
    nodes_to_quantize: Sequence[str] | None = None,
    nodes_to_exclude: Sequence[str] | None = None,
    use_external_data_format: bool = False,
    *,
    train: Callable[[qwrap.WrappedModel], Any] | None = None,
    steps: int | None = None,
    calibration_data_reader: CalibrationDataReader | None = None,
    calibrate_method: CalibrationMethod = CalibrationMethod.MinMax,
    extra_options: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> ModelProto | None:
    """Quantize a model in QDQ form and train it in that form, in one call.

    A float model is first quantized as by ``quantize_static``. A model that has pairs of
    QuantizeLinear and DequantizeLinear already, as quantization-aware training elsewhere leaves
    it, is taken with its scales. ``train`` then gets it as a ``torch.nn.Module``, which computes
    what onnxruntime will compute, and what was learned goes back into the file: weights, scales
    and zero points, in the same graph.

    Args:
        model_input: path or model; neither is modified.
        model_output: file to make or replace; None to get the model itself.
        op_types_to_quantize: as in ``quantize_static``.
        per_channel: as in ``quantize_static``.
        reduce_range: as in ``quantize_static``.
        activation_type: as in ``quantize_static``.
        weight_type: as in ``quantize_static``.
        nodes_to_quantize: as in ``quantize_static``.
        nodes_to_exclude: as in ``quantize_static``.
        use_external_data_format: keep tensors in ``<name>.data`` beside the output.
        train: trains the module in place, with whatever data, labels, loss and loop; None brings it
            closer to the float model on the calibration data, without labels (``qwrap.finetune``),
            and needs a reader.
        steps: of the training without labels, None for what ``qwrap.finetune`` does.
        calibration_data_reader: batches for the ranges of a float model.
        calibrate_method: how a range is chosen.
        extra_options: see ``qwrap.ort.OPTIONS``.
        report: filled with what became of each node of a float model.

    Returns:
        The trained and quantized model where ``model_output`` is None, else None.

    Raises:
        QuantizationError: nothing says how to train, or an argument is wrong as in
            ``quantize_static``.
    """
    if train is None and calibration_data_reader is None:
        raise QuantizationError(
            "quantize_qat has nothing to train with: give train=, a function of the module, or "
            "calibration_data_reader= for training without labels"
        )
    model = read_model(model_input)
    teacher: qwrap.WrappedModel | None = None
    batches = list(calibration_data_reader) if calibration_data_reader is not None else []
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        quantized = quantize_static(
            model,
            None,
            _Again(batches),
            QuantFormat.QDQ,
            op_types_to_quantize,
            per_channel,
            reduce_range,
            activation_type,
            weight_type,
            nodes_to_quantize,
            nodes_to_exclude,
            calibrate_method=calibrate_method,
            extra_options=extra_options,
            report=report,
        )
        assert quantized is not None
        teacher, model = qwrap.load(model), quantized
    module = qwrap.load(model)
    if train is not None:
        train(module)
    else:
        loss = qwrap.Distillation(module, teacher=teacher)
        qwrap.finetune(module, batches, steps=steps, loss=loss)
    return _exported(module, model_output, use_external_data_format)


class _Again(CalibrationDataReader):
    """Batches that are in memory, for one more reading."""

    def __init__(self, batches: list[Any]) -> None:
        self.rest = iter(batches)

    def get_next(self) -> Any:
        return next(self.rest, None)


def _exported(
    module: qwrap.WrappedModel, path: str | Path | None, external: bool
) -> ModelProto | None:
    if path is not None:
        qwrap.export(module, path, external_data=external or None)
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trained.onnx"
        qwrap.export(module, file)
        return onnx.load_model(str(file))
