"""Initializers that nothing reads."""

from __future__ import annotations

import onnx

from qwrap.graph import subgraphs
from qwrap.ort.graphs.name_index import NameIndex
from qwrap.ort.graphs.scopes import captured_names


def drop_unused(graph: onnx.GraphProto) -> set[str]:
    """Remove the initializers that nothing reads, in place, in ``graph`` and the bodies in it.

    A graph input of such a name goes with its initializer.

    Returns:
        The names that the graph reads and does not make.
    """
    for node in graph.node:
        for body in subgraphs(node):
            drop_unused(body)
    read = {name for node in graph.node for name in node.input}
    read |= {value.name for value in graph.output}
    for node in graph.node:
        for body in subgraphs(node):
            read |= captured_names(body)
    unused = [tensor for tensor in graph.initializer if tensor.name not in read]
    inputs = NameIndex(lambda: graph.input)
    inputs.discard([v for tensor in unused if (v := inputs.get(tensor.name)) is not None])
    gone = {id(tensor) for tensor in unused}
    for position in range(len(graph.initializer) - 1, -1, -1):
        if id(graph.initializer[position]) in gone:
            del graph.initializer[position]
    return captured_names(graph)
