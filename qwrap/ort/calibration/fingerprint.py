"""Which model ranges belong to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from qwrap.ort.files.model_io import load_message

Model = str | os.PathLike[str] | ModelProto


def fingerprint(model: Model) -> dict[str, Any]:
    """Return what tells a model from others whose tensors have other ranges.

    Inputs, nodes with their attributes, and the values of all constants count; versions, texts,
    inferred shapes and names of nodes do not, nor whether a constant is an initialiser or a
    Constant node, in the file or beside it.

    Args:
        model: a path, or a model in memory that holds its data.

    Returns:
        What JSON can hold: ``inputs``, name -> element type and shape, and ``digest``, of all.
    """
    proto = model if isinstance(model, ModelProto) else load_message(model)
    digest = hashlib.sha256()
    for piece in _graph_pieces(proto.graph):
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    for function in proto.functions:
        digest.update(function.SerializeToString(deterministic=True))
    return {"inputs": _inputs(proto.graph), "digest": digest.hexdigest()}


def _inputs(graph: GraphProto) -> dict[str, list[Any]]:
    constants = {tensor.name for tensor in graph.initializer}
    return {v.name: _type(v) for v in graph.input if v.name not in constants}


def _type(value: onnx.ValueInfoProto) -> list[Any]:
    if not value.type.HasField("tensor_type"):
        return [value.type.WhichOneof("value") or "unknown", None]
    tensor = value.type.tensor_type
    name = TensorProto.DataType.Name(tensor.elem_type)
    if not tensor.HasField("shape"):
        return [name, None]
    sizes = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
    return [name, sizes]


def _graph_pieces(graph: GraphProto) -> Iterator[bytes]:
    yield from sorted(repr((name, kind)).encode() for name, kind in _inputs(graph).items())
    yield from (f"output {value.name}".encode() for value in graph.output)
    yield from _constants(graph)
    for node in graph.node:
        if _lifted(node) is None:
            yield from _node_pieces(node)


def _constants(graph: GraphProto) -> Iterator[bytes]:
    """Yield the digests of constants in the order of their names."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    found.update((node.output[0], t) for node in graph.node if (t := _lifted(node)) is not None)
    for name in sorted(found):
        yield name.encode() + b"\0" + _tensor_digest(found[name])


def _lifted(node: NodeProto) -> TensorProto | None:
    """Return what a Constant node holds as a tensor."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    return next((a.t for a in node.attribute if a.name == "value"), None)


def _tensor_digest(tensor: TensorProto) -> bytes:
    digest = hashlib.sha256(f"{tensor.data_type} {list(tensor.dims)}".encode())
    if tensor.HasField("raw_data"):
        digest.update(tensor.raw_data)
    elif tensor.data_type == TensorProto.STRING:
        digest.update(repr(list(tensor.string_data)).encode())
    else:
        digest.update(numpy_helper.to_array(tensor).tobytes())
    return digest.digest()


def _node_pieces(node: NodeProto) -> Iterator[bytes]:
    domain = "" if node.domain == "ai.onnx" else node.domain
    yield repr((domain, node.op_type, list(node.input), list(node.output))).encode()
    for attribute in sorted(node.attribute, key=lambda a: a.name):
        yield attribute.name.encode()
        if attribute.type == AttributeProto.GRAPH:
            yield from _graph_pieces(attribute.g)
        elif attribute.type == AttributeProto.TENSOR:
            yield _tensor_digest(attribute.t)
        else:
            yield attribute.SerializeToString(deterministic=True)
