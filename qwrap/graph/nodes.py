"""The nodes of a message: what they hold, and what they are called in messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx

QUANTIZED = "qwrap.quantized"
"""Key in the metadata of the call of a function that quantizes a tensor: the tensor's name."""
QUANTIZED_AS = "qwrap.quantized_as"
"""Key beside it: the name of the type."""
STANDARD = ("", "ai.onnx")


def domain_of(domain: str) -> str:
    """Return the name that operators of ``domain`` are kept under: of ai.onnx, none."""
    return "" if domain in STANDARD else domain


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield ``graph`` and all graphs inside it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs(inner)


def bodies_of(proto: onnx.ModelProto) -> Iterator[Sequence[onnx.NodeProto]]:
    """Yield the nodes of each graph and function of a model, those inside of nodes too."""
    for graph in graphs(proto.graph):
        yield graph.node
    for function in proto.functions:
        yield from nodes_of(function)


def nodes_of(function: onnx.FunctionProto) -> Iterator[Sequence[onnx.NodeProto]]:
    """Yield the nodes of a function, then those of each graph inside it."""
    yield function.node
    for node in function.node:
        for inner in subgraphs(node):
            yield from (graph.node for graph in graphs(inner))


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that ``node`` holds in its attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def label(node: onnx.NodeProto) -> str:
    """Return the name of a node, or what else it can be found by."""
    return node.name or f"{node.op_type}:{next(iter(node.output), '')}"
