"""Layers that stay float between quantized tensors: onnxruntime must not make integers of them."""

from __future__ import annotations

import onnx_ir as ir

from qwrap.export.qdq import QdqWriter
from qwrap.graph.nodes import STANDARD
from qwrap.quant.placement.forms import DEQUANTIZE, QUANTIZE

QUANTIZED_BY_RUNTIME = ("Conv", "ConvTranspose", "Gemm")


def keep_layers_float(writer: QdqWriter) -> None:
    """Put a node in front of each layer that would not stay float, in place.

    Behind a DequantizeLinear and in front of a QuantizeLinear, onnxruntime (1.31) gives float
    weights a pair of its own, 8 bits per tensor, and then has an integer kernel for the layer. One
    that is excluded, or in a region of floats, is to compute with the weights that it has.

    Args:
        writer: has written the pairs.
    """
    apart: dict[ir.Value, ir.Value] = {}
    for key, planned in writer.plan.nodes.items():
        node = writer.graph.nodes[key]
        if planned.role == "float" and key not in writer.plan.half and _is_at_risk(writer, node):
            value = node.inputs[0]
            assert value is not None
            if value not in apart:
                apart[value] = _apart(writer, value)
            node.replace_input_with(0, apart[value])


def _is_at_risk(writer: QdqWriter, node: ir.Node) -> bool:
    if node.op_type not in QUANTIZED_BY_RUNTIME or node.domain not in STANDARD:
        return False
    value, weight = node.inputs[:2]
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != DEQUANTIZE:
        return False
    readers = node.outputs[0].consumers()
    behind = [*readers, *(user for reader in readers for user in _users(reader))]
    is_constant = writer.make.initializers.tensor(weight) is not None
    return is_constant and any(user.op_type == QUANTIZE for user in behind)


def _users(node: ir.Node) -> list[ir.Node]:
    """Return what reads the outputs of a node."""
    return [user for value in node.outputs for user in value.consumers()]


def _apart(writer: QdqWriter, value: ir.Value) -> ir.Value:
    producer = value.producer()
    assert producer is not None
    assert isinstance(producer.graph, ir.Graph)
    real = value.dtype or ir.DataType.FLOAT
    node = writer.calls.keep_apart(value, value.name or "tensor", real)
    producer.graph.insert_after(producer, node)
    return node.outputs[0]
