"""Stable keys, order, types and shapes for everything in a model."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

SMALL = 4096  # bytes: initialisers beyond this steer no shapes, so inference need not see them


@dataclass(frozen=True, slots=True)
class ValueType:
    """What shape inference knows of a value.

    Attributes:
        dtype: element type, None if unknown or not a tensor.
        shape: one entry a dimension: its size, a symbol, or None; None if the rank is unknown.
    """

    dtype: ir.DataType | None = None
    shape: tuple[int | str | None, ...] | None = None

    @property
    def rank(self) -> int | None:
        """Number of dimensions, None if unknown."""
        return None if self.shape is None else len(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether the element type is a floating-point type of 16 bits or more."""
        return self.dtype in FLOATS


FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


class OnnxGraph:
    """A model that is never modified, with a unique key for each node and value.

    A node's key is its name where that is unique, else ``OpType:<key of its first output>``; a
    value's key is its name where that is unique, else its name behind the path of its subgraph.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.types = infer_types(model)
        self.nodes: dict[str, ir.Node] = {}
        self.values: dict[str, ir.Value] = {}
        self._node_keys: dict[ir.Node, str] = {}
        self._value_keys: dict[ir.Value, str] = {}
        self._index_values(model.graph)
        self._index_nodes(model.graph)

    def _index_values(self, graph: ir.Graph) -> None:
        def add(value: ir.Value, path: str) -> None:
            if value in self._value_keys or not value.name:
                return
            key = value.name if value.name not in self.values else f"{path}/{value.name}"
            self.values[key] = value
            self._value_keys[value] = key

        def walk(inner: ir.Graph, path: str) -> None:
            for value in (*inner.inputs, *inner.initializers.values()):
                add(value, path)
            for node in inner:
                for value in node.outputs:
                    add(value, path)
                for name, body in bodies(node):
                    walk(body, f"{path}/{node.name or node.outputs[0].name}.{name}")

        walk(graph, "")

    def _index_nodes(self, graph: ir.Graph) -> None:
        names = [node.name for node in walk_nodes(graph)]
        unique = {name for name, count in Counter(names).items() if name and count == 1}
        for node in walk_nodes(graph):
            first = next((self.key(v) for v in node.outputs if v.name), "")
            key = node.name if node.name in unique else f"{node.op_type}:{first}"
            assert key is not None
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
        return self.types.get(value.name or "", ValueType())

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
        folders = {
            str(v.const_value.base_dir)
            for v in self.model.graph.initializers.values()
            if isinstance(v.const_value, ir.ExternalTensor)
        }
        proto = ir.to_proto(self.model)
        return {"proto": proto.SerializeToString(), "folder": next(iter(folders), None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = ir.from_proto(onnx.ModelProto.FromString(state["proto"]))
        if state["folder"] is not None:
            ir.external_data.set_base_dir(model.graph, Path(state["folder"]))
        self.__init__(model)  # type: ignore[misc]  # rebuilds every table from the model


def opset_of(model: ir.Model, domain: str) -> int:
    """Return the version of ``domain`` that ``model`` imports, 1 if it does not say."""
    imports = model.opset_imports
    if domain in ("", "ai.onnx"):
        return imports.get("", imports.get("ai.onnx", 1))
    return imports.get(domain, 1)


def bodies(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """Yield the subgraphs of a control-flow node with the attribute that holds each."""
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH:
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            for i, graph in enumerate(attribute.as_graphs()):
                yield f"{name}[{i}]", graph


def walk_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield all nodes, a control-flow node before the nodes of its bodies."""
    for node in graph:
        yield node
        for _, body in bodies(node):
            yield from walk_nodes(body)


def infer_types(model: ir.Model) -> dict[str, ValueType]:
    """Run ONNX shape inference on a copy without weights; return value name -> type."""
    proto = onnx.ModelProto()
    proto.CopyFrom(ir.to_proto(model))
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) > SMALL:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
    # Where inference fails, what the file itself declares remains.
    with contextlib.suppress(onnx.shape_inference.InferenceError, RuntimeError):
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    types: dict[str, ValueType] = {}
    _collect_types(proto.graph, types)
    return types


def _collect_types(graph: onnx.GraphProto, types: dict[str, ValueType]) -> None:
    for tensor in graph.initializer:
        types[tensor.name] = ValueType(ir.DataType(tensor.data_type), tuple(tensor.dims))
    for info in (*graph.input, *graph.value_info, *graph.output):
        kind = info.type.tensor_type
        if not kind.elem_type:
            continue
        shape = None
        if kind.HasField("shape"):
            shape = tuple(
                d.dim_value if d.HasField("dim_value") else d.dim_param or None
                for d in kind.shape.dim
            )
        types[info.name] = ValueType(ir.DataType(kind.elem_type), shape)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.output:
                    _collect_types(inner, types)
