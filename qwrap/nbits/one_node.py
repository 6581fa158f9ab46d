"""One node of a message, for tools that walk the message themselves."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx import helper

from qwrap.nbits.matrices import WEIGHT_INPUT
from qwrap.nbits.request import Request
from qwrap.nbits.rewrite import rewrite

NEWEST = 25
"""The opset that the node is taken to be of, in which every code type is a tensor: whether the
model is of such an opset is for the caller to see to."""


def rewrite_node(
    node: onnx.NodeProto, scopes: Sequence[onnx.GraphProto], request: Request
) -> list[onnx.NodeProto]:
    """Return the nodes that take the place of ``node``, or the node itself if it stays.

    The graph that has the weight gets what they read, in place, and the weight is no longer an
    input of it; that it is no longer needed is for the caller to find out.

    Args:
        node: MatMul or Gather.
        scopes: the graphs that the node is in, outermost first.
        request: what to make of it.
    """
    name = node.input[WEIGHT_INPUT[node.op_type]]
    tensor, owner = find_initializer(name, scopes)
    if tensor is None or owner is None:
        return [node]
    model = ir.from_proto(_alone(node, tensor, scopes))
    rewrite(model, lambda _: request, through_transpose=False)
    nodes = [ir.to_proto(made) for made in model.graph]
    if len(nodes) == 1 and nodes[0].op_type == node.op_type:
        return [node]
    known = {each.name for each in owner.initializer}
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.name not in known:
            owner.initializer.append(ir.to_proto(value.const_value))
    for index, value_info in reversed(list(enumerate(owner.input))):
        if value_info.name == name:
            del owner.input[index]
    return nodes


def find_initializer(
    name: str, scopes: Sequence[onnx.GraphProto]
) -> tuple[onnx.TensorProto | None, onnx.GraphProto | None]:
    """Return the initializer of that name, innermost first, and the graph that has it."""
    for graph in reversed(scopes):
        for tensor in graph.initializer:
            if tensor.name == name:
                return tensor, graph
    return None, None


def _alone(
    node: onnx.NodeProto, tensor: onnx.TensorProto, scopes: Sequence[onnx.GraphProto]
) -> onnx.ModelProto:
    known = {
        value.name: value
        for graph in scopes
        for value in (*graph.output, *graph.value_info, *graph.input)
    }
    inputs = [
        known.get(name, onnx.ValueInfoProto(name=name))
        for name in dict.fromkeys(node.input)
        if name and name != tensor.name
    ]
    outputs = [known.get(name, onnx.ValueInfoProto(name=name)) for name in node.output]
    graph = helper.make_graph([node], "one", inputs, outputs, [tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", NEWEST)])
