"""Static quantization as Qualcomm's provider can run it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from qwrap.ort.calibrate import CalibrationDataReader, CalibrationMethod
from qwrap.ort.entry.configs import StaticQuantConfig
from qwrap.ort.enums import QuantType
from qwrap.ort.errors import MissingFileError
from qwrap.ort.execution_providers.qnn.compatibility import (
    QnnCompatibilityOverrides,
    warn_unable_to_override,
)
from qwrap.ort.execution_providers.qnn.mixed_precision_overrides_utils import (
    MixedPrecisionTensorQuantOverridesFixer,
)
from qwrap.ort.files.lift import lift_constants
from qwrap.ort.files.metadata import get_opset_version
from qwrap.ort.files.model_io import STEERS_SHAPES, ModelSource
from qwrap.ort.files.proto_file import is_external, weightless, weights_size
from qwrap.ort.graphs.tensor_names import MODEL_SIZE_THRESHOLD
from qwrap.ort.tensor_quant_overrides import TensorQuantOverridesHelper

__all__ = [
    "MODEL_SIZE_THRESHOLD",
    "OP_TYPES_TO_EXCLUDE",
    "Q4_TYPES",
    "Q8_TYPES",
    "Q16_TYPES",
    "QnnCompatibilityOverrides",
    "get_qnn_qdq_config",
    "warn_unable_to_override",
]

Q16_TYPES = {QuantType.QInt16, QuantType.QUInt16}
Q8_TYPES = {QuantType.QInt8, QuantType.QUInt8}
Q4_TYPES = {QuantType.QInt4, QuantType.QUInt4}
OP_TYPES_TO_EXCLUDE = {"Cast"}
_STANDARD_TYPES = 21  # the opset since which 16 and 4 bits are in ai.onnx
_MINIMUM_REAL_RANGE = 0.0001


def get_qnn_qdq_config(
    model_input: ModelSource,
    calibration_data_reader: CalibrationDataReader,
    calibrate_method: CalibrationMethod = CalibrationMethod.MinMax,
    activation_type: QuantType = QuantType.QUInt8,
    weight_type: QuantType = QuantType.QUInt8,
    per_channel: bool = False,
    init_overrides: dict[str, list[dict[str, Any]]] | None = None,
    add_qtype_converts: bool = True,
    activation_symmetric: bool = False,
    weight_symmetric: bool | None = None,
    keep_removable_activations: bool = False,
    stride: int | None = None,
    calibration_providers: list[str] | None = None,
    op_types_to_quantize: list[str] | None = None,
    nodes_to_exclude: list[str] | None = None,
) -> StaticQuantConfig:
    """Return settings with which a model runs whole on Qualcomm's provider.

    Args:
        model_input: path or model; neither is modified, weights are not read.
        calibration_data_reader: as for ``quantize_static``.
        calibrate_method: as for ``quantize_static``.
        activation_type: type of activations of which nothing else is said.
        weight_type: type of weights of which nothing else is said.
        per_channel: one scale per channel for weights of Conv (axis 0) and ConvTranspose (axis 1).
        init_overrides: settings of single tensors, as ``TensorQuantOverrides``; not modified.
        add_qtype_converts: let the neighbours of tensors with another type follow, with
            conversions where types change; see ``MixedPrecisionTensorQuantOverridesFixer``.
        activation_symmetric: whether the zero point of activations is the middle code.
        weight_symmetric: the same for weights; None for signed types only.
        keep_removable_activations: keep Relu and Clip, which a range could replace.
        stride: calibrate that many batches at a time.
        calibration_providers: where the float model runs; None for the CPU.
        op_types_to_quantize: operator types; None for all in the model but Cast.
        nodes_to_exclude: not these nodes.

    Raises:
        QuantizationError: overrides do not fit the model or each other (a ``ValueError``).
        MissingFileError: the model is not there.
    """
    model, outside = _structure(model_input)
    if weight_symmetric is None:
        weight_symmetric = weight_type in {QuantType.QInt8, QuantType.QInt16}
    overrides = TensorQuantOverridesHelper(copy.deepcopy(init_overrides) if init_overrides else {})
    if not overrides.empty() and add_qtype_converts:
        fixer = MixedPrecisionTensorQuantOverridesFixer.create_from_model(
            overrides, model, activation_type
        )
        fixer.apply(activation_type, activation_symmetric)
    compatibility = QnnCompatibilityOverrides(
        activation_type,
        weight_type,
        activation_symmetric,
        weight_symmetric,
        per_channel,
        overrides,
        {tensor.name: tensor for tensor in model.graph.initializer},
    )
    nodes = _chosen(model, op_types_to_quantize, nodes_to_exclude)
    for node in nodes:
        compatibility.process_node(node)
    options = {
        "MinimumRealRange": _MINIMUM_REAL_RANGE,
        "DedicatedQDQPair": False,  # onnxruntime duplicates the nodes where that helps
        "QDQKeepRemovableActivations": keep_removable_activations,
        "TensorQuantOverrides": overrides.get_dict(),
        "ActivationSymmetric": activation_symmetric,
        "WeightSymmetric": weight_symmetric,
        "CalibStridedMinMax": stride,
    }
    types = {activation_type, weight_type, *overrides.get_quant_types()}
    if get_opset_version(model) < _STANDARD_TYPES and types & (Q16_TYPES | Q4_TYPES):
        options["UseQDQContribOps"] = True
    found = dict.fromkeys(node.op_type for node in nodes)
    return StaticQuantConfig(
        calibration_data_reader,
        calibrate_method=calibrate_method,
        activation_type=activation_type,
        weight_type=weight_type,
        op_types_to_quantize=op_types_to_quantize
        or [op_type for op_type in found if op_type not in OP_TYPES_TO_EXCLUDE],
        nodes_to_exclude=nodes_to_exclude,
        per_channel=per_channel,
        use_external_data_format=outside,
        calibration_providers=calibration_providers,
        extra_options=options,
    )


def _structure(source: ModelSource) -> tuple[onnx.ModelProto, bool]:
    """Return a copy of a model without its large weights, and whether these need a file."""
    if isinstance(source, onnx.ModelProto):
        model = source
    else:
        path = Path(source)
        if not path.is_file():
            raise MissingFileError(f"{path}: no such file; expected an ONNX model")
        model = onnx.load_model(path, load_external_data=False)
    outside = any(is_external(tensor) for tensor in model.graph.initializer)
    outside = outside or weights_size(model) >= MODEL_SIZE_THRESHOLD
    light, _ = weightless(model, STEERS_SHAPES)
    lift_constants(light)
    return light, outside


def _chosen(
    model: onnx.ModelProto, op_types: Sequence[str] | None, excluded: Sequence[str] | None
) -> list[onnx.NodeProto]:
    return [
        node
        for node in model.graph.node
        if (not op_types or node.op_type in op_types) and node.name not in (excluded or ())
    ]
