"""Clips with an upper bound, as what lets channels be divided."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import Array, Constants
from qwrap.graph.index import OnnxGraph, ValueType, infer_types, opset_of
from qwrap.graph.nodes import STANDARD
from qwrap.graph.passing import clip_ends

MINIMUM_BROADCASTS = 8


def bounded_clips(graph: OnnxGraph) -> dict[str, float]:
    """Return the keys of the Clips from 0 to a finite bound above it, and that bound."""
    constants, found = Constants(graph.model), {}
    for key, node in graph.nodes.items():
        ends = None
        if node.op_type == "Clip" and node.domain in STANDARD:
            ends = clip_ends(constants, node)
        if ends is not None and ends[0] == 0 < ends[1] < np.inf:
            found[key] = ends[1]
    return found


def open_clips(
    model: ir.Model, keys: Collection[str], *, bound: Literal["drop", "channels"]
) -> None:
    """Make a Relu of each Clip from 0 to a bound, in place.

    Args:
        model: what to edit.
        keys: of the Clips, as ``bounded_clips`` returns them.
        bound: "drop" it, or keep it, one for each of the "channels" of the second axis, in a Min:
            that has the name and the output of the Clip, and the Relu new ones.
    """
    graph, constants, types = OnnxGraph(model), Constants(model), infer_types(model)
    bounds = bounded_clips(graph)
    for key in keys:
        node, ends = graph.nodes[key], tuple(graph.nodes[key].inputs[1:])
        if bound == "channels":
            shape = types.get(node.outputs[0], ValueType()).shape or ()
            channels = shape[1] if len(shape) > 1 else None
            if not isinstance(channels, int) or opset_of(model, "") < MINIMUM_BROADCASTS:
                continue
            limit = np.full((channels, *[1] * (len(shape) - 2)), bounds[key], np.float32)
            _become_min(constants, node, limit)
        else:
            _become(node, "Relu", 1)
        constants.drop_unused(ends)


def _become_min(constants: Constants, node: ir.Node, limit: Array) -> None:
    """Turn a Clip into a Min behind a new Relu, in place."""
    output, graph = node.outputs[0], node.graph
    assert isinstance(graph, ir.Graph)
    relu = ir.node("Relu", [node.inputs[0]], name=f"{node.name}_relu" if node.name else None)
    relu.outputs[0].name = constants.unique_name(f"{output.name}_relu")
    relu.outputs[0].type, relu.outputs[0].shape = output.type, output.shape
    graph.insert_before(node, relu)
    _become(node, "Min", 2)
    node.replace_input_with(0, relu.outputs[0])
    name = constants.unique_name(f"{output.name}_bound")
    node.replace_input_with(1, constants.add(graph, name, limit))


def _become(node: ir.Node, op_type: str, inputs: int) -> None:
    node.attributes.clear()
    node.resize_inputs(inputs)
    node.op_type = op_type
