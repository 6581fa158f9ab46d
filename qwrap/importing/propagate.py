"""Where onnxruntime takes the pairs of a file to before it looks for integer kernels."""

from __future__ import annotations

import onnx_ir as ir

from qwrap.graph.index import opset_of, walk_nodes
from qwrap.graph.nodes import STANDARD
from qwrap.importing.stripped import Stripped, Tap
from qwrap.quant.placement.target import ORT_CPU

MOVERS = {
    "Identity": 1,
    "MaxPool": 12,
    "Reshape": 5,
    "Slice": 10,
    "Squeeze": 1,
    "Transpose": 1,
    "Unsqueeze": 1,
}
"""Operators that a pair may change places with, and the first opset in which it does.

Source: onnxruntime 1.31, ``qdq_propagation.cc``; an Identity it removes.
"""


def propagate(stripped: Stripped, draft: ir.Model) -> None:
    """Move taps to the operators that make their tensors, and spread scales to those that read.

    Between them there is nothing but operators that move values, so that the same is computed. It
    changes ``stripped`` in place.
    """
    opset = opset_of(draft, "")
    for tapped in list(stripped.taps):
        _to_maker(stripped, tapped, opset)
    for node in walk_nodes(draft.graph):
        source = stripped.read_by(node, 0) if _is_mover(node, opset) else None
        known = stripped.source_of(node.outputs[0]) if node.outputs else None
        if source is not None and known is None and _is_per_tensor(source):
            stripped.moved[node.outputs[0]] = source


def _is_mover(node: ir.Node | None, opset: int) -> bool:
    if node is None or node.domain not in STANDARD or len([v for v in node.outputs if v.name]) > 1:
        return False
    return opset >= MOVERS.get(node.op_type, opset + 1)


def _is_per_tensor(tap: Tap) -> bool:
    return tap.reading.spec.axis is None


def _to_maker(stripped: Stripped, value: ir.Value, opset: int) -> None:
    """Move one tap upwards as far as that brings it behind an operator with an integer kernel."""
    first, moved = value, list[ir.Value]()
    while (node := first.producer()) is not None and _is_mover(node, opset):
        before = node.inputs[0]
        if before is None or not _is_between(before, node) or stripped.source_of(before):
            return
        moved.append(first)
        first = before
    makers = (*ORT_CPU.matrix, *ORT_CPU.elementwise, *ORT_CPU.absorbed)
    if not moved or node is None or node.op_type not in makers:
        return
    if node.domain in STANDARD and _is_per_tensor(stripped.taps[value]):
        tap = stripped.taps.pop(value)
        stripped.taps[first], tap.value = tap, first
        stripped.readers |= dict.fromkeys((first, *moved[1:]), 1)
        stripped.moved |= dict.fromkeys(moved, tap)


def _is_between(value: ir.Value, reader: ir.Node) -> bool:
    """Whether nothing but ``reader`` reads a value that a node of the same graph makes."""
    node = value.producer()
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return alone and node is not None and node.graph is reader.graph
