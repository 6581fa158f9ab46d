"""How much of a file's constants is stored, or computed on, in few bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

_CODES = frozenset({
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT4,
    TensorProto.UINT4,
    TensorProto.INT16,
    TensorProto.UINT16,
})


def float_values(path: str | Path) -> int:
    """Number of float values among the constants of a file, subgraphs included."""
    return sum(
        math.prod(tensor.dims)
        for graph in _graphs(onnx.load(path).graph)
        for tensor in _constants(graph).values()
        if tensor.data_type == TensorProto.FLOAT
    )


def coded_values(path: str | Path) -> int:
    """Number of constant values that stand as codes of 16 bits or fewer, or are quantized at once.

    Zero points do not count, nor do the int32 codes of biases.
    """
    return sum(map(_coded_in, _graphs(onnx.load(path).graph)))


def _coded_in(graph: onnx.GraphProto) -> int:
    constants, coded = _constants(graph), set()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            coded.add(node.input[0])
    return sum(
        math.prod(tensor.dims)
        for name, tensor in constants.items()
        if name in coded and tensor.data_type in _CODES | {TensorProto.FLOAT}
    )


def _constants(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.HasField("t"):
                stored[node.output[0]] = attribute.t
    return stored


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from _graphs(body)
