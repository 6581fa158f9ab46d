"""Initialisers that several nodes share: tied on purpose, or merged by an exporter."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from qwrap.graph.nodes import graphs, label, subgraphs

NORMS = ("Normalization", "LayerNorm", "Mul", "Add")  # ends of names; the last two when decomposed
FLOATS = (
    *(onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16),
    *(onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE),
)


def merged_names(model: ir.Model) -> dict[str, int]:
    """Return the initialisers that an exporter seems to have merged, with how many nodes use each.

    Weights and biases of normalisations start as all ones and all zeros, and exporters keep one
    copy of equal tensors. Embeddings that are tied on purpose hold many values.
    """
    found = {}
    for name, value in model.graph.initializers.items():
        users = {use.node for use in value.uses()}
        tensor = value.const_value
        if len(users) < 2 or tensor is None or int(tensor.dtype) not in FLOATS:
            continue
        if tensor.size < 2 or sum(n > 1 for n in tensor.shape.numpy()) != 1:
            continue
        if all(user.op_type.endswith(NORMS) for user in users):
            array = tensor.numpy()
            if (array == 0).all() or (array == 1).all():
                found[name] = len(users)
    return found


def untie(proto: onnx.ModelProto) -> None:
    """Give each node of the main graph its own copy of the float initialisers it reads, in place.

    The first node keeps the initialiser as it is, unless a subgraph reads it or it is an output;
    the copies are called ``<initialiser>_<node>``.
    """
    graph = proto.graph
    shared = {t.name: t for t in graph.initializer if t.data_type in FLOATS and t.dims}
    kept = {v.name for v in (*graph.input, *graph.output)} | set(_captured(graph))
    taken = set(_all_names(graph))
    seen = set(kept)
    copies = []
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            if name not in shared:
                continue
            if name not in seen:
                seen.add(name)
                continue
            copy = onnx.TensorProto()
            copy.CopyFrom(shared[name])
            copy.name = _unused(f"{name}_{label(node)}", taken)
            copies.append(copy)
            node.input[:] = [copy.name if other == name else other for other in node.input]
    graph.initializer.extend(copies)


def _captured(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the names that graphs inside of ``graph`` mention."""
    for node in graph.node:
        for inner in subgraphs(node):
            for nested in graphs(inner):
                yield from (name for n in nested.node for name in n.input)
                yield from (v.name for v in nested.output)


def _all_names(graph: onnx.GraphProto) -> Iterator[str]:
    for nested in graphs(graph):
        yield from (v.name for v in (*nested.input, *nested.output, *nested.value_info))
        yield from (t.name for t in nested.initializer)
        yield from (name for node in nested.node for name in (*node.input, *node.output))


def _unused(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
