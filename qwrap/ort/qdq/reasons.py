"""What the report says of each node of a graph in form QDQ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import NodeProto

from qwrap.graph import label

if TYPE_CHECKING:
    from qwrap.ort.qdq.scope import QuantizedGraph


def report_nodes(quantizer: QuantizedGraph) -> None:
    """Append what became of the nodes of a graph to the quantizer's report, in place."""
    asked = {id(node) for node in quantizer.quantized_nodes}
    gone = {id(node) for node in quantizer.nodes_to_remove}
    for node in quantizer.uses.nodes():
        quantized, reason = False, quantizer.reason_to_leave(node) or ""
        if id(node) in gone:
            quantized, reason = True, "removed: the codes of its output clip as it does"
        elif not reason and id(node) in asked:
            quantized, reason = _pairs_of(quantizer, node)
        quantizer.report.add(label(node), node.op_type, quantized, reason)


def _pairs_of(quantizer: QuantizedGraph, node: NodeProto) -> tuple[bool, str]:
    names = [name for name in (*node.input, *node.output) if name]
    written = [name for name in names if name in quantizer.owner_of(name).quantized_value_map]
    if not written:
        return False, "its input is not quantized, or none of its tensors is a float that can be"
    if id(node) in quantizer.unfused:
        return True, "runs in float: no kernel takes its scales"
    return True, ""
