"""Dynamic quantization: weights in the file, scales of activations measured at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto

from qwrap.ort.entry.arguments import check_dynamic_quant_arguments, check_names
from qwrap.ort.entry.options import check_options
from qwrap.ort.entry.static import check_overrides, finish, own_options, warn_if_raw
from qwrap.ort.enums import QuantizationMode, QuantType
from qwrap.ort.files.model_io import read_model
from qwrap.ort.onnx_quantizer import ONNXQuantizer
from qwrap.ort.quant_utils import update_opset_version
from qwrap.ort.registry import IntegerOpsRegistry
from qwrap.ort.report import Report


def quantize_dynamic(
    model_input: str | Path | ModelProto,
    model_output: str | Path | None = None,
    op_types_to_quantize: Sequence[str] | None = None,
    per_channel: bool = False,
    reduce_range: bool = False,
    weight_type: QuantType = QuantType.QInt8,
    nodes_to_quantize: Sequence[str] | None = None,
    nodes_to_exclude: Sequence[str] | None = None,
    use_external_data_format: bool = False,
    extra_options: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> ModelProto | None:
    """Quantize weights; activations become uint8 at run time, by the range of each tensor.

    Args:
        model_input: path or model; neither is modified, and nothing is written beside it.
        model_output: file to make or replace; None to get the model itself.
        op_types_to_quantize: operator types; None for Conv, MatMul, Attention, LSTM, Gather,
            Transpose and EmbedLayerNormalization.
        per_channel: one scale per output channel of a weight.
        reduce_range: weights in 7 bits, for processors without VNNI.
        weight_type: QInt8 or QUInt8.
        nodes_to_quantize: only these nodes; None for all.
        nodes_to_exclude: not these nodes.
        use_external_data_format: keep tensors in ``<name>.data`` beside the output; from 2 GB on
            it is done without asking.
        extra_options: see ``qwrap.ort.OPTIONS``; ``MatMulConstBOnly`` is True by default.
        report: filled with what became of each node.

    Returns:
        The quantized model where ``model_output`` is None, else None.

    Raises:
        QuantizationError: an argument contradicts itself, another or the model (``ValueError``).
        UnknownNameError: a node or an operator type does not exist.
    """
    options = {"MatMulConstBOnly": True, **own_options(extra_options)}
    check_dynamic_quant_arguments(weight_type)
    check_options(options, "dynamic")
    lifted: set[str] = set()
    model = read_model(model_input, lifted)
    check_names(model, nodes_to_quantize, nodes_to_exclude, op_types_to_quantize, lifted)
    excluded, chosen = list(nodes_to_exclude or ()), list(nodes_to_quantize or ())
    check_overrides(model, options, QuantType.QUInt8)
    warn_if_raw(model)
    model = update_opset_version(model, weight_type)
    quantizer = ONNXQuantizer(
        model,
        per_channel,
        reduce_range,
        QuantizationMode.IntegerOps,
        False,
        weight_type,
        QuantType.QUInt8,
        None,
        chosen,
        excluded,
        list(op_types_to_quantize or IntegerOpsRegistry),
        options,
        in_place=True,
    )
    return finish(quantizer, model_output, use_external_data_format, report)
