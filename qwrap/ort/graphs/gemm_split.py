"""Gemm as MatMul and Add, which is what can be quantized at run time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qwrap.graph import graphs, subgraphs
from qwrap.ort.graphs.scopes import made_names


def split_gemms(graph: onnx.GraphProto) -> None:
    """Replace each plain Gemm by MatMul and Add, in place, in ``graph`` and the bodies in it.

    Plain is one with alpha = beta = 1 that does not transpose A. A transposed constant B is
    stored the other way round, under its name if only such nodes read it; a weight that others
    read too stays as it is for them and gets a transposed copy. A B that is computed goes through
    a Transpose.
    """
    _Splitter(graph).split(graph, [])


class _Splitter:
    def __init__(self, graph: onnx.GraphProto) -> None:
        everything = list(graphs(graph))
        self._names = {name for g in everything for name in made_names(g)}
        self._readers: Counter[str] = Counter(  # by name alone: a body may use one again
            name for g in everything for node in g.node for name in node.input
        )
        self._readers.update(value.name for g in everything for value in g.output)
        self._transposing: Counter[str] = Counter(
            node.input[1]
            for g in everything
            for node in g.node
            if is_plain(node) and node.input[1] != node.input[0] and _attribute(node, "transB", 0)
        )
        self._turned: dict[tuple[int, str], str] = {}  # (graph, weight) -> its transpose

    def split(self, graph: onnx.GraphProto, around: Sequence[onnx.GraphProto]) -> None:
        path = [*around, graph]
        nodes = []
        for node in graph.node:
            for body in subgraphs(node):
                self.split(body, path)
            nodes += list(self._replacement(node, path)) if is_plain(node) else [node]
        if len(nodes) != len(graph.node) or any(is_plain(node) for node in graph.node):
            del graph.node[:]
            graph.node.extend(nodes)

    def _replacement(
        self, node: onnx.NodeProto, path: Sequence[onnx.GraphProto]
    ) -> Iterator[onnx.NodeProto]:
        weight = node.input[1]
        if _attribute(node, "transB", 0):
            owner = _owner(weight, path)
            if owner is not None:
                weight = self._transposed(weight, owner)
            else:
                turned = self._free(f"{weight}_Transposed")
                name = _named(node, "_Transpose")
                yield helper.make_node("Transpose", [weight], [turned], name)
                weight = turned
        has_bias = len(node.input) > 2 and node.input[2]
        product = self._free(f"{node.output[0]}_MatMul") if has_bias else node.output[0]
        yield helper.make_node(
            "MatMul", [node.input[0], weight], [product], _named(node, "_MatMul")
        )
        if has_bias:
            inputs = [product, node.input[2]]
            yield helper.make_node("Add", inputs, node.output, _named(node, "_Add"))

    def _transposed(self, name: str, owner: onnx.GraphProto) -> str:
        """Store the weight ``name`` of ``owner`` the other way round, in place; return its name."""
        key = id(owner), name
        if key not in self._turned:
            tensor = next(t for t in owner.initializer if t.name == name)
            turned = numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(tensor).T))
            if self._readers[name] == self._transposing[name]:
                turned.name = name
                tensor.CopyFrom(turned)
                for position in range(len(owner.input) - 1, -1, -1):
                    if owner.input[position].name == name:
                        del owner.input[position]
            else:
                turned.name = self._free(f"{name}_Transposed")
                owner.initializer.append(turned)
            self._turned[key] = turned.name
        return self._turned[key]

    def _free(self, name: str) -> str:
        free, count = name, 1
        while free in self._names:
            free, count = f"{name}_{count}", count + 1
        self._names.add(free)
        return free


def is_plain(node: onnx.NodeProto) -> bool:
    """Whether ``node`` is a Gemm that MatMul and Add can replace."""
    return (
        node.op_type == "Gemm"
        and node.domain in ("", "ai.onnx")
        and _attribute(node, "alpha", 1.0) == _attribute(node, "beta", 1.0) == 1.0
        and not _attribute(node, "transA", 0)
    )


def _attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    for attribute in node.attribute:
        if attribute.name == name:
            return float(helper.get_attribute_value(attribute))
    return default


def _named(node: onnx.NodeProto, suffix: str) -> str:
    return node.name + suffix if node.name else ""


def _owner(name: str, path: Sequence[onnx.GraphProto]) -> onnx.GraphProto | None:
    """Return the innermost graph of ``path`` whose ``name`` is an initializer."""
    for graph in reversed(path):
        if any(tensor.name == name for tensor in graph.initializer):
            return graph
        if name in made_names(graph):
            return None
    return None
