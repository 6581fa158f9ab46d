"""The message a model was read from, with other values in it and nothing else changed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from qwrap.errors import ExportError
from qwrap.graph.check import packed_size
from qwrap.graph.external import BLOCK, DataFile, FileTensor
from qwrap.graph.index import OnnxGraph, bodies
from qwrap.graph.load import external_tensors, original_proto
from qwrap.graph.nodes import graphs, label, subgraphs


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a message, and where its data comes from if not from the message itself.

    Attributes:
        proto: the tensor in the message.
        new: its new values, None if it has none.
        file: where its data lies, None if in the message.
    """

    proto: onnx.TensorProto
    new: ir.TensorProtocol | None
    file: DataFile | None

    @property
    def size(self) -> int:
        """Bytes of data."""
        return packed_size(self.proto) if self.new is None else self.new.nbytes

    @property
    def offset(self) -> int:
        """Where the data begins in its file."""
        return int(entries(self.proto).get("offset", 0))

    def blocks(self) -> Iterator[bytes | memoryview]:
        """Yield the data as stored in files, in blocks."""
        if self.new is not None:
            data = self.new.tobytes() if self.size <= BLOCK else None
            yield from [data] if data is not None else _blocks(self.new)
        elif self.file is not None:
            yield from self.file.blocks(self.offset, self.size)
        else:
            yield ir.tensor(self.proto).tobytes()


def _blocks(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a large tensor without a copy of it where it is stored as in a file."""
    array = tensor.numpy()
    if tensor.dtype.bitwidth % 8 or not array.flags.c_contiguous or array.dtype.byteorder == ">":
        yield tensor.tobytes()
        return
    raw = array.reshape(-1).view("uint8")
    for start in range(0, raw.size, BLOCK):
        yield raw[start : start + BLOCK].data


def entries(tensor: onnx.TensorProto) -> dict[str, str]:
    """Return what a tensor says of its data outside the message."""
    return {entry.key: entry.value for entry in tensor.external_data}


def with_values(
    graph: OnnxGraph,
    changed: Mapping[str, ir.TensorProtocol],
    rewired: Mapping[tuple[str, int], ir.TensorProtocol] | None = None,
) -> tuple[onnx.ModelProto, list[Piece]]:
    """Return a copy of the message of ``graph`` and its tensors.

    The copy still holds the old data; whoever writes it fills in that of the pieces.

    Args:
        graph: of the message.
        changed: value key -> its new values.
        rewired: (node key, input) -> what it is to read instead: an initialiser more, one for all
            inputs that are given the same tensor.

    Raises:
        ExportError: something that changed is not in the main graph or a subgraph.
    """
    original = original_proto(graph.pristine)
    proto = onnx.ModelProto()
    proto.CopyFrom(ir.to_proto(graph.pristine) if original is None else original)
    files = {
        os.fspath(tensor.location): tensor.file
        for tensor in external_tensors(graph.pristine)
        if isinstance(tensor, FileTensor)
    }
    waiting = dict(changed)
    pieces = [
        Piece(tensor, waiting.pop(key, None) if key else None, _file_of(tensor, files))
        for tensor, key in _tensors(graph, graph.model.graph, proto.graph, changed)
    ]
    for function in proto.functions:
        pieces += [Piece(t, None, _file_of(t, files)) for n in function.node for t in _inside(n)]
    if waiting:
        raise ExportError(
            f"tensors {sorted(waiting)} changed, but the file has them in the bodies of functions, "
            "one for all calls; inline its functions first (onnx.inliner.inline_local_functions)"
        )
    return proto, pieces + _rewire(graph, proto, rewired or {})


def _rewire(
    graph: OnnxGraph, proto: onnx.ModelProto, rewired: Mapping[tuple[str, int], ir.TensorProtocol]
) -> list[Piece]:
    """Let inputs read new initialisers, in place; return these."""
    taken = {name for g in graphs(proto.graph) for node in g.node for name in node.output}
    taken |= {v.name for g in graphs(proto.graph) for v in (*g.input, *g.initializer)}
    names: dict[int, str] = {}
    pieces = []
    inputs: dict[str, dict[int, str]] = {}
    for (node, index), tensor in rewired.items():
        if id(tensor) not in names:
            name = names[id(tensor)] = _free_name(tensor.name or "tensor", taken)
            made = proto.graph.initializer.add(name=name, data_type=int(tensor.dtype))
            made.dims[:] = tensor.shape.numpy()
            pieces.append(Piece(made, tensor, None))
        inputs.setdefault(node, {})[index] = names[id(tensor)]
    if inputs:
        for message, made_of in _pairs(graph.model.graph, proto.graph):
            for index, name in inputs.pop(graph.node_key(made_of), {}).items():
                message.input.extend([""] * (index + 1 - len(message.input)))
                message.input[index] = name
    if inputs:
        raise ExportError(
            f"nodes {sorted(inputs)} need tensors of their own, but the file has them in the "
            "bodies of functions, one for all calls; inline its functions first "
            "(onnx.inliner.inline_local_functions)"
        )
    return pieces


def _free_name(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        candidate, count = f"{name}_{count}", count + 1
    taken.add(candidate)
    return candidate


def _pairs(body: ir.Graph, proto: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, ir.Node]]:
    """Yield the nodes of ``proto`` that ``body`` has too, with those."""
    inner = {_first(node.outputs): node for node in body}
    for message in proto.node:
        node = inner.get(next((name for name in message.output if name), None))
        if node is None:
            continue
        yield message, node
        nested = dict(bodies(node))
        for name, g in _named_graphs(message):
            if name in nested:
                yield from _pairs(nested[name], g)


def _file_of(tensor: onnx.TensorProto, files: Mapping[str, DataFile]) -> DataFile | None:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    return files[entries(tensor)["location"]]


def _tensors(
    graph: OnnxGraph,
    body: ir.Graph,
    proto: onnx.GraphProto,
    changed: Mapping[str, ir.TensorProtocol],
) -> Iterator[tuple[onnx.TensorProto, str | None]]:
    """Yield every tensor of ``proto`` with the key of the value that ``body`` makes of it.

    What changed becomes an ordinary dense tensor first.
    """
    keys = {name: graph.key(value) for name, value in body.initializers.items()}
    _make_dense(proto, {name for name, key in keys.items() if key in changed})
    for tensor in proto.initializer:
        yield tensor, keys.get(tensor.name)
    inner = {_first(node.outputs): node for node in body}
    for node in proto.node:
        made = inner.get(next((name for name in node.output if name), None))
        key = None
        if made is not None and made.op_type == "Constant" and made.outputs[0].name:
            key = graph.key(made.outputs[0])
            if key in changed:
                _make_value(node)
        for tensor in _own(node):
            yield tensor, key
        nested = {} if made is None else dict(bodies(made))
        for name, g in _named_graphs(node):
            if name in nested:
                yield from _tensors(graph, nested[name], g, changed)
            else:
                yield from ((t, None) for t in _inside_graph(g))


def _first(values: Sequence[ir.Value]) -> str | None:
    return next((value.name for value in values if value.name), None)


def _named_graphs(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """Yield the subgraphs of a node under the names that ``bodies`` gives them."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for i, graph in enumerate(attribute.graphs):
            yield f"{attribute.name}[{i}]", graph


def _own(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def _inside(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    yield from _own(node)
    for graph in subgraphs(node):
        yield from _inside_graph(graph)


def _inside_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        yield from _inside(node)


def _make_dense(graph: onnx.GraphProto, names: set[str]) -> None:
    """Turn the sparse initialisers ``names`` into dense ones without data, in place."""
    for i in range(len(graph.sparse_initializer) - 1, -1, -1):
        sparse = graph.sparse_initializer[i]
        if sparse.values.name in names:
            graph.initializer.add(
                name=sparse.values.name, data_type=sparse.values.data_type, dims=sparse.dims
            )
            del graph.sparse_initializer[i]


def _make_value(node: onnx.NodeProto) -> None:
    """Let a Constant hold its values in the attribute ``value``, still without data, in place."""
    (attribute,) = node.attribute
    if attribute.name == "value":
        return
    assert attribute.name.startswith(("value_", "sparse_")), label(node)
    doc = attribute.doc_string
    attribute.Clear()
    attribute.name, attribute.type, attribute.doc_string = "value", onnx.AttributeProto.TENSOR, doc
    attribute.t.SetInParent()
