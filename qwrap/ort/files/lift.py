"""Constant nodes as initializers, so that a weight is a weight however it is written."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qwrap.graph import graphs

_INITIALIZERS_FREE = 4  # the IR version since which an initializer need not be a graph input
_STAYS = {onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.STRING}


def lift_constants(model: onnx.ModelProto) -> set[str]:
    """Make initializers of the same names from Constant nodes, in place, in every graph.

    Nodes remain that cannot be weights, such as shapes, for nothing is done to them; and those
    whose output is an output of their graph, or which hold a sparse tensor.

    Returns:
        The names of the nodes that are gone.
    """
    gone = set()
    must_be_input = model.ir_version < _INITIALIZERS_FREE
    for graph in list(graphs(model.graph)):
        if must_be_input and graph is not model.graph:
            continue  # there an input more would be one that the node has to give
        gone |= _lift(graph, must_be_input)
    return gone


def _lift(graph: onnx.GraphProto, must_be_input: bool) -> set[str]:
    outputs = {value.name for value in graph.output}
    gone = []
    for position, node in enumerate(graph.node):
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            continue
        tensor = None if node.output[0] in outputs else _tensor(node)
        if tensor is None:
            continue
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        if must_be_input:
            info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(info)
        gone.append((position, node.name))
    for position, _ in reversed(gone):
        del graph.node[position]
    return {name for _, name in gone if name}


def _tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """Return the value of a Constant node that may be a weight or its codes, else None."""
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            return None
        if attribute.name == "value" and attribute.t.data_type not in _STAYS:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(attribute.t)
            return tensor
        if attribute.name in ("value_float", "value_floats"):
            value = helper.get_attribute_value(attribute)
            return numpy_helper.from_array(np.asarray(value, np.float32))
    return None
