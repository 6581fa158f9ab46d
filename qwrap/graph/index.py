"""Stable keys, order, types and shapes for everything in a model."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir

from qwrap.errors import ModelError
from qwrap.graph.external import FileTensor
from qwrap.graph.load import external_tensors, original_proto, to_model, without_weights
from qwrap.graph.nodes import graphs, label
from qwrap.graph.stand_ins import put_stand_ins


@dataclass(frozen=True, slots=True)
class ValueType:
    """What shape inference knows of a value.

    Attributes:
        dtype: element type, of a sequence or optional that of the tensors inside; None if unknown.
        shape: one entry a dimension: its size, a symbol, or None; None if the rank is unknown, or
            not a tensor.
        kind: ``"tensor"``, or what holds the tensors.
    """

    dtype: ir.DataType | None = None
    shape: tuple[int | str | None, ...] | None = None
    kind: Literal["tensor", "sequence", "optional"] = "tensor"

    @property
    def rank(self) -> int | None:
        """Number of dimensions, None if unknown."""
        return None if self.shape is None else len(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether it is a tensor of a floating-point type of 16 bits or more."""
        return self.dtype in FLOATS and self.kind == "tensor"


FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


class OnnxGraph:
    """A model that is never modified, with a unique key for each node and value.

    A node's key is its name where unique, else ``OpType:<key of its first output>``. A value's key
    is its name; where a value outside or before has that name, it is the name behind the path
    of its subgraph.

    Attributes:
        model: the graph; weights that lie outside the file are still there.
        source: the file it was read from, None if from memory.
        pristine: the model as it was read, if ``model`` is that with functions expanded, else
            ``model`` itself. Initialisers are the same.
        nodes: node by key, a control-flow node before the nodes of its bodies.
        values: value by key.
        types: what shape inference knows, by value key.
    """

    def __init__(
        self, model: ir.Model, source: Path | None = None, pristine: ir.Model | None = None
    ) -> None:
        self.model, self.source, self.pristine = model, source, pristine or model
        self.nodes: dict[str, ir.Node] = {}
        self.values: dict[str, ir.Value] = {}
        self._node_keys: dict[ir.Node, str] = {}
        self._value_keys: dict[ir.Value, str] = {}
        self._index_values(model.graph, _FreeKeys(self.values))
        self._index_nodes(model.graph)
        self.types = {self.key(v): kind for v, kind in infer_types(model).items()}

    def _index_values(self, graph: ir.Graph, free: _FreeKeys, path: str = "") -> None:
        """Give the values of a graph their keys, then those of the graphs inside it."""
        made = (*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs))
        for value in made:
            if value.name and value not in self._value_keys:
                key = free(value.name, f"{path}/{value.name}")
                self.values[key] = value
                self._value_keys[value] = key
        for node in graph:
            for name, body in bodies(node):
                self._index_values(body, free, f"{path}/{node.name or node.op_type}.{name}")

    def _index_nodes(self, graph: ir.Graph) -> None:
        names = [node.name for node in walk_nodes(graph)]
        unique = {name for name, count in Counter(names).items() if name and count == 1}
        free = _FreeKeys(self.nodes, unique)
        for node in walk_nodes(graph):
            if node.name and node.name in unique:
                key = node.name
            else:
                first = next((self.key(v) for v in node.outputs if v.name), "")
                made = f"{node.op_type}:{first}"
                key = free(made, made)
            self.nodes[key] = node
            self._node_keys[node] = key

    def key(self, value: ir.Value) -> str:
        """Return the key of a value."""
        return self._value_keys[value]

    def node_key(self, node: ir.Node) -> str:
        """Return the key of a node."""
        return self._node_keys[node]

    def type_of(self, value: ir.Value) -> ValueType:
        """Return element type and shape of a value as far as they are known."""
        return self.types.get(self.key(value), ValueType()) if value.name else ValueType()

    @property
    def opset(self) -> int:
        """The imported version of ai.onnx."""
        return opset_of(self.model, "")

    @property
    def inputs(self) -> list[ir.Value]:
        """Graph inputs that the caller must give, in order: those without an initialiser."""
        return [v for v in self.model.graph.inputs if not v.is_initializer()]

    @property
    def outputs(self) -> list[ir.Value]:
        """Graph outputs in order."""
        return list(self.model.graph.outputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxGraph:
        return self  # immutable

    def __getstate__(self) -> dict[str, Any]:
        folders = {os.fspath(tensor.base_dir) for tensor in external_tensors(self.pristine)}
        assert len(folders) <= 1, "one model, one folder"
        for tensor in external_tensors(self.pristine):
            if isinstance(tensor, FileTensor) and not tensor.file.is_current:
                raise ModelError(
                    f"tensor {tensor.name!r}: its file {tensor.path!r} was replaced since the "
                    "model was loaded, and a pickle refers to it by name; load the model again"
                )
        original = original_proto(self.pristine)
        proto = ir.to_proto(self.pristine) if original is None else original
        expanded = None if self.model is self.pristine else ir.to_proto(_without(self.model))
        return {
            "proto": proto.SerializeToString(),
            "expanded": None if expanded is None else expanded.SerializeToString(),
            "is_original": original is not None,
            "folder": next(iter(folders), None),
            "source": self.source,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        folder = None if state["folder"] is None else Path(state["folder"])
        proto = onnx.ModelProto.FromString(state["proto"])
        pristine = to_model(proto, folder, is_original=state["is_original"])
        model = pristine
        if state["expanded"] is not None:
            model = ir.from_proto(onnx.ModelProto.FromString(state["expanded"]))
            for name, value in model.graph.initializers.items():
                value.const_value = pristine.graph.initializers[name].const_value
        self.__init__(model, state["source"], pristine)  # type: ignore[misc]  # rebuilds every table


class _FreeKeys:
    """Finds keys that are in none of ``taken``, which only grow; the caller adds what it uses."""

    def __init__(self, *taken: Container[str]) -> None:
        self._taken = taken
        self._numbers: dict[str, Iterator[int]] = {}  # thousands may share a name; none is retried

    def __call__(self, name: str, otherwise: str) -> str:
        """Return ``name``, else ``otherwise``, else that with a number, whichever is free."""
        if self._is_free(name):
            return name
        if self._is_free(otherwise):
            return otherwise
        numbers = self._numbers.setdefault(otherwise, itertools.count(2))
        return next(key for n in numbers if self._is_free(key := f"{otherwise}#{n}"))

    def _is_free(self, key: str) -> bool:
        return not any(key in keys for keys in self._taken)


def _without(model: ir.Model) -> ir.Model:
    """Return a copy in which every initialiser of the main graph is a stub."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        value.const_value = ir.tensor(np.zeros((), np.float32), name=value.name)
    return copy


def opset_of(model: ir.Model, domain: str) -> int:
    """Return the version of ``domain`` that ``model`` imports, 1 if it does not say."""
    imports = model.opset_imports
    if domain in ("", "ai.onnx"):
        return imports.get("", imports.get("ai.onnx", 1))
    return imports.get(domain, 1)


def bodies(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """Yield the subgraphs of a control-flow node with the attribute that holds each."""
    for name, attribute in node.attributes.items():
        if attribute.is_ref():  # in a function
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            for i, graph in enumerate(attribute.as_graphs()):
                yield f"{name}[{i}]", graph


def read_values(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the values that a node reads, and those that its bodies read from outside."""
    yield from (value for value in node.inputs if value is not None)
    for _, body in bodies(node):
        made = {*body.inputs, *body.initializers.values()}
        for inner in body:
            yield from (value for value in read_values(inner) if value not in made)
            made.update(inner.outputs)
        yield from (value for value in body.outputs if value not in made)


def walk_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield all nodes, a control-flow node before the nodes of its bodies."""
    for node in graph:
        yield node
        for _, body in bodies(node):
            yield from walk_nodes(body)


Types = dict[ir.Value, ValueType]
FAILURES = (onnx.shape_inference.InferenceError, RuntimeError, ValueError)


def infer_types(model: ir.Model) -> Types:
    """Run ONNX shape inference on a copy without weights; return what it knows of each value."""
    proto = without_weights(model)
    put_stand_ins(proto)
    # Where inference fails, what the file itself declares remains.
    with contextlib.suppress(*FAILURES):
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    types: Types = {}
    _collect_types(proto.graph, model.graph, types)
    return types


def inferred_message(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of ``proto`` that declares what ONNX shape inference knows of its values.

    Operators of com.microsoft are seen through where their types follow from their inputs. The
    copy is good for its declarations only: it has other nodes in their place. Tensors without
    data may stand for large weights. Where inference fails, what ``proto`` declares remains.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    put_stand_ins(copy)
    with contextlib.suppress(*FAILURES):
        copy = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    return copy


def infer_strictly(model: ir.Model, unknown: Container[ir.Node] = ()) -> tuple[Types, str]:
    """Infer types and shapes from graph inputs and initialisers alone.

    What a file declares of the values between may be out of date.

    Args:
        model: not modified.
        unknown: nodes behind which nothing is to be inferred.

    Returns:
        What is known of each value; and a text on nodes that inference cannot follow, each by its
        name or ``label``.
    """
    proto, complaints = without_weights(model), ""
    for graph in graphs(proto.graph):
        graph.ClearField("value_info")
        for value in graph.output:
            value.ClearField("type")
        for node in graph.node:
            node.name = label(node)
    if unknown:
        _hide(proto.graph, model.graph, unknown)
    put_stand_ins(proto)
    try:
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True, strict_mode=True)
    except FAILURES as error:
        complaints = str(error)
        with contextlib.suppress(*FAILURES):
            proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    types: Types = {}
    _collect_types(proto.graph, model.graph, types)
    return types, complaints


def _hide(proto: onnx.GraphProto, graph: ir.Graph, hidden: Container[ir.Node]) -> None:
    """Make ``hidden`` nodes, in place of the proto, operators that inference does not know."""
    for message, node in zip(proto.node, graph, strict=True):
        if node in hidden:
            message.domain = "qwrap.hidden"
        inner = {attribute.name: attribute.g for attribute in message.attribute}
        for name, body in bodies(node):
            if name in inner:  # else one of a list, which no operator of ONNX has
                _hide(inner[name], body, hidden)


def _collect_types(
    proto: onnx.GraphProto, graph: ir.Graph, types: dict[ir.Value, ValueType]
) -> None:
    """Match a graph with its inferred proto: names are only unique within one graph."""
    made = (*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs))
    values = {value.name: value for value in made if value.name}
    for info in (*proto.input, *proto.value_info, *proto.output):
        declared = _declared(info.type) if info.name in values else None
        if declared is not None:
            types[values[info.name]] = declared
    for value in graph.initializers.values():
        if value.const_value is not None:
            shape = tuple(int(n) for n in value.const_value.shape.numpy())
            types[value] = ValueType(value.const_value.dtype, shape)
    for node, inferred in zip(graph, proto.node, strict=True):
        inner = {attribute.name: attribute for attribute in inferred.attribute}
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.GRAPH:
                _collect_types(inner[name].g, attribute.as_graph(), types)
            elif attribute.type == ir.AttributeType.GRAPHS:
                for body, g in zip(attribute.as_graphs(), inner[name].graphs, strict=True):
                    _collect_types(g, body, types)


def _declared(declared: onnx.TypeProto) -> ValueType | None:
    if declared.HasField("sequence_type"):
        inner = _declared(declared.sequence_type.elem_type) or ValueType()
        return ValueType(inner.dtype, kind="sequence")
    if declared.HasField("optional_type"):
        inner = _declared(declared.optional_type.elem_type) or ValueType()
        return ValueType(inner.dtype, kind="optional")
    kind = declared.tensor_type
    if not kind.elem_type:
        return None
    if not kind.HasField("shape"):
        return ValueType(ir.DataType(kind.elem_type))
    shape = tuple(
        d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim
    )
    return ValueType(ir.DataType(kind.elem_type), shape)
