"""What the bodies of If, Loop and Scan read from the graphs around them."""

from __future__ import annotations

import onnx

from qwrap.graph import subgraphs


def made_names(graph: onnx.GraphProto) -> set[str]:
    """Return the names of all values that ``graph`` itself declares or computes."""
    names = {name for node in graph.node for name in node.output if name}
    names |= {value.name for value in (*graph.input, *graph.initializer)}
    names |= {sparse.values.name for sparse in graph.sparse_initializer}
    return names


def captured_names(graph: onnx.GraphProto) -> set[str]:
    """Return the names that a body, or a body in it, reads and does not make."""
    read = {value.name for value in graph.output}
    for node in graph.node:
        read |= node_reads(node)
    return read - made_names(graph) - {""}


def node_reads(node: onnx.NodeProto) -> set[str]:
    """Return the names that a node reads, those that its bodies capture included."""
    names = {name for name in node.input if name}
    for body in subgraphs(node):
        names |= captured_names(body)
    return names


def rename_reads(node: onnx.NodeProto, old: str, new: str) -> None:
    """Let ``node`` and its bodies read ``new`` where they read ``old``, in place.

    A body that makes a value ``old`` of its own goes on reading that.
    """
    for index, name in enumerate(node.input):
        if name == old:
            node.input[index] = new
    for body in subgraphs(node):
        if old in made_names(body):
            continue
        for inner in body.node:
            rename_reads(inner, old, new)
        for value in body.output:
            if value.name == old:
                value.name = new
