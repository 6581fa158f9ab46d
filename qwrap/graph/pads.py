"""Move zero padding into the convolutions behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qwrap.graph.constants import Constants
from qwrap.graph.index import OnnxGraph, opset_of, walk_nodes

PADS_AS_INPUT = 11  # Pad-11 takes its pads as an input


def fold_pads(model: ir.Model, computed: Mapping[str, npt.NDArray[Any]]) -> list[str]:
    """Let every Conv behind a Pad with zeros do the padding itself, in place.

    onnxruntime's PadFusion does so before it fuses QDQ pairs, but not where a subgraph computes
    the pads, as torch.onnx writes it.

    Args:
        model: what to edit.
        computed: value key -> integers known when the model is loaded, from subgraphs too.

    Returns:
        One line for each Pad that is gone.
    """
    graph = OnnxGraph(model)
    changes = []
    for node in [n for n in walk_nodes(model.graph) if n.op_type == "Pad" and not n.domain]:
        pads = _spatial_pads(node, graph, computed)
        users = node.outputs[0].consumers()
        if pads is None or not users or node.outputs[0].is_graph_output():
            continue
        if all(_takes(user, node.outputs[0], len(pads) // 2) for user in users):
            for user in users:
                _add_pads(user, pads)
                user.replace_input_with(0, node.inputs[0])
            changes.append(f"Pad {graph.node_key(node)!r} moved into {len(users)} Conv")
            _remove_dead(node)
    return changes


def _spatial_pads(
    node: ir.Node, graph: OnnxGraph, computed: Mapping[str, npt.NDArray[Any]]
) -> list[int] | None:
    """Return begins and ends of the spatial axes, None unless they are all that is padded."""
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return None
    if opset_of(graph.model, "") < PADS_AS_INPUT:
        fill = node.attributes.get("value")
        values = node.attributes["pads"].as_ints()
        if fill is not None and fill.as_float() != 0:
            return None
    else:
        known = _known(node.inputs[1], graph, computed)
        fill_input = node.inputs[2] if len(node.inputs) > 2 else None
        fill_value = None if fill_input is None else _known(fill_input, graph, computed)
        if known is None or (fill_input is not None and (fill_value is None or fill_value.any())):
            return None
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            return None
        values = known.tolist()
    rank = len(values) // 2
    if rank < 3 or min(values) < 0 or any(values[i] or values[rank + i] for i in (0, 1)):
        return None
    return [*values[2:rank], *values[rank + 2 :]]


def _known(
    value: ir.Value | None, graph: OnnxGraph, computed: Mapping[str, npt.NDArray[Any]]
) -> npt.NDArray[Any] | None:
    if value is not None and graph.key(value) in computed:
        return computed[graph.key(value)]
    return Constants(graph.model).array(value)


def _takes(user: ir.Node, value: ir.Value, spatial: int) -> bool:
    automatic = user.attributes.get("auto_pad")
    return (
        user.op_type == "Conv"
        and not user.domain
        and user.inputs[0] is value
        and spatial > 0
        and (automatic is None or automatic.as_string() in ("NOTSET", "VALID"))
    )


def _add_pads(user: ir.Node, pads: list[int]) -> None:
    own = user.attributes.get("pads")
    before = [0] * len(pads) if own is None else list(own.as_ints())
    user.attributes.pop("auto_pad", None)
    total = [a + b for a, b in zip(before, pads, strict=True)]
    user.attributes["pads"] = ir.AttrInt64s("pads", total)


def _remove_dead(node: ir.Node) -> None:
    """Remove ``node`` and then everything that only it used, in place."""
    if any(v.uses() or v.is_graph_output() for v in node.outputs):
        return
    producers = {v.producer() for v in node.inputs if v is not None}
    graph = node.graph
    assert graph is not None
    graph.remove(node, safe=True)
    for producer in producers:
        if producer is not None and producer.graph is not None:
            _remove_dead(producer)
