"""A configuration that takes a whole model to integers, for accelerators that run nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, NodeProto

from qwrap.ort.calibrate import CalibrationDataReader
from qwrap.ort.entry.arguments import check_names
from qwrap.ort.entry.configs import StaticQuantConfig
from qwrap.ort.enums import CalibrationMethod, QuantFormat, QuantType
from qwrap.ort.errors import QuantizationError
from qwrap.ort.quant_utils import MODEL_SIZE_THRESHOLD, get_opset_version
from qwrap.ort.tensor_quant_overrides import TensorQuantOverridesHelper

Exclude = list[str] | Callable[[ModelProto, NodeProto], bool]

_LEFT = {"Cast", "DequantizeLinear", "QuantizeLinear"}
_WIDE = {QuantType.QInt16, QuantType.QUInt16}
_NARROW = {QuantType.QInt4, QuantType.QUInt4}
_ARGUMENTS = {
    "symmetric": "CalibTensorRangeSymmetric",
    "moving_average": "CalibMovingAverage",
    "averaging_constant": "CalibMovingAverageConstant",
    "max_intermediate_outputs": "CalibMaxIntermediateOutputs",
    "percentile": "CalibPercentile",
}


def get_qdq_config(
    model_input: str | Path | ModelProto,
    calibration_data_reader: CalibrationDataReader,
    calibrate_method: CalibrationMethod = CalibrationMethod.MinMax,
    calibrate_args: Mapping[str, Any] | None = None,
    activation_type: QuantType = QuantType.QUInt8,
    weight_type: QuantType = QuantType.QInt8,
    activation_symmetric: bool = False,
    weight_symmetric: bool | None = None,
    per_channel: bool = False,
    reduce_range: bool = False,
    keep_removable_activations: bool = False,
    min_real_range: float | None = None,
    tensor_quant_overrides: Mapping[str, list[dict[str, Any]]] | None = None,
    calibration_providers: Sequence[str] | None = None,
    op_types_to_quantize: Sequence[str] | None = None,
    nodes_to_exclude: Exclude | None = None,
    extra_options: Mapping[str, Any] | None = None,
) -> StaticQuantConfig:
    """Return the configuration that quantizes every operator of a model, in QDQ form.

    Args:
        model_input: path or model.
        calibration_data_reader: where batches come from.
        calibrate_method: how ranges are chosen.
        calibrate_args: "symmetric", "moving_average", "averaging_constant",
            "max_intermediate_outputs" and "percentile", as calibrators call them.
        activation_type: type of activations.
        weight_type: type of weights.
        activation_symmetric: whether zero has the middle code in activations.
        weight_symmetric: the same of weights; None: with signed types.
        per_channel: one scale per output channel of a weight.
        reduce_range: weights in 7 bits.
        keep_removable_activations: keep Relu and Clip that the quantization makes superfluous.
        min_real_range: smallest width of a range, in real units.
        tensor_quant_overrides: what is said of single tensors.
        calibration_providers: where the float model runs meanwhile.
        op_types_to_quantize: only these operator types.
        nodes_to_exclude: names of nodes, or which nodes they are.
        extra_options: win over what the arguments say.

    Raises:
        QuantizationError: ``calibrate_args`` has an unknown key.
        UnknownNameError: a node to exclude does not exist.
    """
    model = _structure(model_input)
    arguments = dict(calibrate_args or {})
    if unknown := sorted(set(arguments) - set(_ARGUMENTS)):
        raise QuantizationError(
            f"calibrate_args has no key '{unknown[0]}'; there are {', '.join(_ARGUMENTS)}"
        )
    overrides = TensorQuantOverridesHelper(copy.deepcopy(dict(tensor_quant_overrides or {})))
    op_types, excluded = _chosen(model, op_types_to_quantize, nodes_to_exclude)
    options = {
        "MinimumRealRange": min_real_range,
        "QDQKeepRemovableActivations": keep_removable_activations,
        "ActivationSymmetric": activation_symmetric,
        "WeightSymmetric": weight_symmetric,
        "ForceQuantizeNoInputCheck": True,
        "TensorQuantOverrides": overrides.get_dict(),
        **{_ARGUMENTS[key]: value for key, value in arguments.items()},
    }
    types = {activation_type, weight_type, *overrides.get_quant_types()}
    # 16 bits raise the opset to 21, whose own operators take 4 bits.
    if get_opset_version(model) < 21 and types & _NARROW and not types & _WIDE:
        options["UseQDQContribOps"] = True
    return StaticQuantConfig(
        calibration_data_reader,
        calibrate_method=calibrate_method,
        quant_format=QuantFormat.QDQ,
        activation_type=activation_type,
        weight_type=weight_type,
        op_types_to_quantize=op_types_to_quantize or sorted(op_types - _LEFT),
        nodes_to_exclude=sorted(excluded),
        per_channel=per_channel,
        reduce_range=reduce_range,
        use_external_data_format=_is_large(model),
        calibration_providers=calibration_providers,
        extra_options={**options, **(extra_options or {})},
    )


def _structure(source: str | Path | ModelProto) -> ModelProto:
    if isinstance(source, ModelProto):
        return source
    return onnx.load_model(str(source), load_external_data=False)


def _chosen(
    model: ModelProto, op_types: Sequence[str] | None, exclude: Exclude | None
) -> tuple[set[str], set[str]]:
    """Return the types of the nodes that are not excluded, and the names of those that are."""
    excluded = set() if exclude is None or callable(exclude) else set(exclude)
    check_names(model, (), excluded, op_types or ())
    found: set[str] = set()
    for node in model.graph.node:
        if (op_types and node.op_type not in op_types) or node.name in excluded:
            continue
        if callable(exclude) and exclude(model, node):
            if not node.name:
                raise QuantizationError(
                    f"the {node.op_type} that makes '{node.output[0]}' is to be excluded but has "
                    "no name; give it one, or exclude its type"
                )
            excluded.add(node.name)
        else:
            found.add(node.op_type)
    return found, excluded


def _is_large(model: ModelProto) -> bool:
    external = any(onnx.external_data_helper.uses_external_data(t) for t in model.graph.initializer)
    return external or model.ByteSize() >= MODEL_SIZE_THRESHOLD
