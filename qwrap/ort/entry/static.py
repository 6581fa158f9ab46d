"""Static quantization: calibrate, then write scales into the graph."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto

from qwrap import smooth_quant
from qwrap.ort.calibrate import (
    CalibraterBase,
    CalibrationDataReader,
    TensorsData,
    cached_ranges,
    create_calibrator,
    save_tensors_data,
)
from qwrap.ort.calibration.spool import Spool
from qwrap.ort.entry.arguments import (
    check_method,
    check_names,
    check_receivers,
    check_static_quant_arguments,
    every_node,
)
from qwrap.ort.entry.options import calibration_options, check_options
from qwrap.ort.enums import CalibrationMethod, QuantFormat, QuantizationMode, QuantType
from qwrap.ort.errors import QuantizationError
from qwrap.ort.files.model_io import HeldModel, hold_model, read_model, write_model
from qwrap.ort.files.opset import raised_for_pairs
from qwrap.ort.onnx_quantizer import ONNXQuantizer
from qwrap.ort.qdq_quantizer import QDQQuantizer
from qwrap.ort.quant_utils import model_has_pre_process_metadata, update_opset_version
from qwrap.ort.registry import QDQRegistry, QLinearOpsRegistry
from qwrap.ort.report import Report
from qwrap.ort.tensor_quant_overrides import TensorQuantOverridesHelper, normalized_overrides

logger = logging.getLogger(__name__)


def quantize_static(
    model_input: str | Path | ModelProto,
    model_output: str | Path | None = None,
    calibration_data_reader: CalibrationDataReader | None = None,
    quant_format: QuantFormat = QuantFormat.QDQ,
    op_types_to_quantize: Sequence[str] | None = None,
    per_channel: bool = False,
    reduce_range: bool = False,
    activation_type: QuantType = QuantType.QInt8,
    weight_type: QuantType = QuantType.QInt8,
    nodes_to_quantize: Sequence[str] | None = None,
    nodes_to_exclude: Sequence[str] | None = None,
    use_external_data_format: bool = False,
    calibrate_method: CalibrationMethod = CalibrationMethod.MinMax,
    calibration_providers: Sequence[str] | None = None,
    extra_options: Mapping[str, Any] | None = None,
    calibration_cache_path: str | Path | None = None,
    report: Report | None = None,
) -> ModelProto | None:
    """Quantize weights and activations, with ranges from calibration data.

    Everything is checked before calibration starts. Memory does not grow with the data.

    Args:
        model_input: path or model; neither is modified, and nothing is written beside it.
        model_output: file to make or replace; None to get the model itself.
        calibration_data_reader: ``get_next()`` gives the inputs of one batch by name, None at the
            end; may be None where ``calibration_cache_path`` exists.
        quant_format: float operators between pairs (QDQ), or operators on codes (QOperator).
        op_types_to_quantize: operator types; None for all that either form supports.
        per_channel: one scale per output channel of a weight.
        reduce_range: weights in 7 bits, for processors without VNNI.
        activation_type: type of activations.
        weight_type: type of weights.
        nodes_to_quantize: only these nodes; None for all.
        nodes_to_exclude: not these nodes. They read and write float tensors.
        use_external_data_format: keep tensors in ``<name>.data`` beside the output; from 2 GB on
            it is done without asking.
        calibrate_method: how a range is chosen from what was observed.
        calibration_providers: where the float model runs; None for the CPU.
        extra_options: see ``qwrap.ort.OPTIONS``.
        calibration_cache_path: file with ranges. It is used if it exists, else made.
        report: filled with what became of each node.

    Returns:
        The quantized model where ``model_output`` is None, else None.

    Raises:
        QuantizationError: an argument contradicts itself, another or the model (``ValueError``).
        UnknownNameError: a node, an operator type or a tensor does not exist.
    """
    options = own_options(extra_options)
    check_method(calibrate_method, _float8_first(activation_type, weight_type))
    check_static_quant_arguments(quant_format, activation_type, weight_type)
    in_pairs = quant_format is QuantFormat.QDQ
    check_options(options, "QDQ" if in_pairs else "QOperator", calibrate_method)
    smooth, cache, lifted = bool(options.get("SmoothQuant")), calibration_cache_path, set[str]()
    held = hold_model(model_input, lifted, in_files=not smooth and not cache)
    source = held.message
    check_names(source, nodes_to_quantize, nodes_to_exclude, op_types_to_quantize, lifted)
    excluded, chosen = list(nodes_to_exclude or ()), list(nodes_to_quantize or ())
    check_overrides(source, options, activation_type)
    ranges = cache and cached_ranges(cache, calibrate_method, smooth_quant=smooth, model=source)
    _check_reader(calibration_data_reader, bool(ranges), options)
    warn_if_raw(source)

    op_types = list(op_types_to_quantize or {**QLinearOpsRegistry, **QDQRegistry})
    with Spool() as spool:
        model, reader = source, calibration_data_reader
        if smooth:
            model, reader = _smoothed(source, calibration_data_reader, options, spool, excluded)
        model = update_opset_version(
            model,
            weight_type,
            activation_type,
            tensor_quant_overrides=options.get("TensorQuantOverrides"),
            block_size=options.get("BlockSize", 0),
        )
        if in_pairs:
            model, options = raised_for_pairs(model, per_channel, options)
        if not ranges:
            held = HeldModel(model, held.path)
            ranges = _calibrated(
                held, reader, op_types, calibrate_method, calibration_providers, options
            )
            model = held.take_in()
    if cache:
        save_tensors_data(ranges, cache, smooth_quant=smooth, model=source)
    del source, held  # where the opset was raised, their weights are others
    shared = (weight_type, activation_type, ranges, chosen, excluded, op_types, options)
    quantizer: ONNXQuantizer | QDQQuantizer
    if in_pairs:
        quantizer = QDQQuantizer(model, per_channel, reduce_range, *shared, in_place=True)
    else:
        mode = QuantizationMode.QLinearOps
        quantizer = ONNXQuantizer(
            model, per_channel, reduce_range, mode, True, *shared, in_place=True
        )
    return finish(quantizer, model_output, use_external_data_format, report)


class _Spooled(CalibrationDataReader):
    """Batches that were read once, for one more reading."""

    def __init__(self, spool: Spool) -> None:
        self.rest = spool.batches()

    def get_next(self) -> Any:
        return next(self.rest, None)


def _smoothed(
    model: ModelProto,
    reader: Any,
    options: Mapping[str, Any],
    spool: Spool,
    excluded: list[str],
) -> tuple[ModelProto, CalibrationDataReader]:
    """Return the smoothed model and its reader; what was inserted is excluded too."""
    smoothed = smooth_quant(
        model,
        spool.passing(iter(reader.get_next, None)),
        alpha=options.get("SmoothQuantAlpha", 0.5),
        fold=options.get("SmoothQuantFolding", True),
    )
    excluded += smoothed.inserted
    return read_model(smoothed.model), _Spooled(spool)


def _float8_first(activation_type: QuantType, weight_type: QuantType) -> QuantType:
    float8 = QuantType.QFLOAT8E4M3FN
    return float8 if float8 in (activation_type, weight_type) else activation_type


def _check_reader(
    reader: CalibrationDataReader | None, cached: bool, options: Mapping[str, Any]
) -> None:
    if reader is None and options.get("SmoothQuant"):
        raise QuantizationError(
            "SmoothQuant requires a non-None calibration_data_reader; the calibration cache "
            "stores per-tensor ranges only and cannot drive the SmoothQuant transform."
        )
    if reader is None and not cached:
        raise QuantizationError(
            "Either calibration_data_reader or an existing calibration_cache_path must be provided."
        )
    if reader is not None and not callable(getattr(reader, "get_next", None)):
        raise QuantizationError(
            "calibration_data_reader needs a method get_next() that returns the inputs of one "
            f"batch by name, and None at the end; {type(reader).__name__} has none"
        )
    stride = options.get("CalibStridedMinMax")
    if stride and not cached:
        total = len(reader)  # type: ignore[arg-type]  # that is what a stride asks for
        if total % stride:
            raise QuantizationError(
                f"Total data size ({total}) is not divisible by stride size ({stride})."
            )


def _calibrated(
    model: HeldModel,
    reader: Any,
    op_types: Sequence[str],
    method: CalibrationMethod,
    providers: Sequence[str] | None,
    options: Mapping[str, Any],
) -> TensorsData:
    """Return the ranges that the batches lead to, in strides where the reader is to be told."""
    with tempfile.TemporaryDirectory(prefix="qwrap") as folder:
        calibrator = create_calibrator(
            model,
            op_types,
            str(Path(folder, "augmented_model.onnx")),
            calibrate_method=method,
            providers=providers,
            extra_options=calibration_options(options),
        )
        _collect(calibrator, reader, options.get("CalibStridedMinMax"))
        return calibrator.compute_data()


def _collect(calibrator: CalibraterBase, reader: Any, stride: int | None) -> None:
    if not stride:
        calibrator.collect_data(reader)
        return
    for start in range(0, len(reader), stride):
        reader.set_range(start_index=start, end_index=start + stride)
        calibrator.collect_data(reader)


def own_options(extra_options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a copy of ``extra_options`` in which types of overrides are ``QuantType``."""
    options = dict(extra_options or {})
    if isinstance(options.get("TensorQuantOverrides"), Mapping):
        options["TensorQuantOverrides"] = normalized_overrides(options["TensorQuantOverrides"])
    return options


def check_overrides(
    model: ModelProto, options: Mapping[str, Any], activation_type: QuantType
) -> None:
    """Refuse ``TensorQuantOverrides`` that contradict themselves or the model.

    Raises:
        QuantizationError: the message names the tensor (a ``ValueError``).
        UnknownNameError: a node of ``recv_nodes`` does not read the tensor.
    """
    overrides = options.get("TensorQuantOverrides")
    if not overrides:
        return
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    tensors = {value.name for value in (*model.graph.value_info, *model.graph.input)}
    tensors |= {name for node in every_node(model.graph) for name in (*node.input, *node.output)}
    valid, error = TensorQuantOverridesHelper(copy.deepcopy(dict(overrides))).is_valid(
        initializers, tensors, activation_type
    )
    if not valid:
        raise QuantizationError(error)
    check_receivers(model, overrides)


def warn_if_raw(model: ModelProto) -> None:
    """Log that preprocessing fuses what then quantizes better, if it was not done."""
    if not model_has_pre_process_metadata(model):
        logger.warning(
            "Please consider to run pre-processing before quantization: "
            "qwrap.ort.quant_pre_process(model_input, model_output)"
        )


def finish(
    quantizer: ONNXQuantizer | QDQQuantizer,
    path: str | Path | None,
    external: bool,
    report: Report | None,
) -> ModelProto | None:
    """Quantize, and write the model or return it."""
    quantizer.quantize_model()
    if report is not None:
        report.nodes += quantizer.report.nodes
        report.notes += quantizer.report.notes
    logger.info("%s", quantizer.report)
    model: ModelProto = quantizer.model.model
    if path is None:
        return model
    write_model(model, path, use_external_data_format=external)
    return None
