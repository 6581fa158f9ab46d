"""The float model as rivals get it: at an opset that can carry scales per channel."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import version_converter

_LEAST_OPSET = 13  # the attribute ``axis`` of QuantizeLinear came with it
_CONSTANTS_ALONE = 4  # the IR version since which constants need not be inputs


def load(path: Path, least: int = _LEAST_OPSET) -> onnx.ModelProto:
    """The model, raised to opset ``least`` where it is lower, as onnxruntime's tool gets it.

    Constants that old files list among the inputs, which some tools then ask for, are no inputs.
    """
    model = onnx.load(path)
    opset = next(entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"})
    if opset < least:
        model = version_converter.convert_version(model, least)
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    if len(inputs) < len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        model.ir_version = max(model.ir_version, _CONSTANTS_ALONE)
    return model


def has_attention(model: onnx.ModelProto) -> bool:
    """Whether a MatMul multiplies two tensors that are computed."""
    stored = {tensor.name for tensor in model.graph.initializer}
    stored |= {n.output[0] for n in model.graph.node if n.op_type == "Constant"}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    return any(not stored & set(node.input) for node in products)
