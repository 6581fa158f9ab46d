"""What the adapters of operator revisions need: attributes, types, new constants and nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qwrap.errors import ExportError
from qwrap.graph.constants import Array, Constants, label
from qwrap.graph.index import ValueType, bodies, infer_types, walk_nodes


def refuse(node: ir.Node, why: str) -> ExportError:
    """Return the error that says why ``node`` has no form in a later opset."""
    return ExportError(f"{label(node)}: {why}")


def has(node: ir.Node, index: int) -> bool:
    """Return whether input ``index`` of ``node`` is given."""
    return len(node.inputs) > index and node.inputs[index] is not None


def is_used(value: ir.Value) -> bool:
    """Return whether anything reads ``value``."""
    return bool(value.uses()) or value.is_graph_output()


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Return the value of an attribute.

    Raises:
        ExportError: it is a parameter of the function that the node is in.
    """
    found = node.attributes.get(name)
    if found is None:
        return default
    if found.is_ref():
        raise refuse(node, f"attribute {name!r} is a parameter of a function; inline it first")
    return found.value


def take(node: ir.Node, name: str, default: Any = None) -> Any:
    """Remove an attribute, in place, and return its value."""
    value = attribute(node, name, default)
    node.attributes.pop(name, None)
    return value


def known_types(model: ir.Model) -> dict[str, ValueType]:
    """Return what is known of each value whose name no other value has."""
    made = Counter(v.name for node in walk_nodes(model.graph) for v in node.outputs)
    for node in walk_nodes(model.graph):  # subgraphs side by side may use a name twice
        for _, body in bodies(node):
            made.update(v.name for v in (*body.inputs, *body.initializers.values()))
    types = infer_types(model).items()
    return {v.name: kind for v, kind in types if v.name is not None and made[v.name] <= 1}


class Editor:
    """Knows the constants and types of ``model`` and adds constants and nodes to it, in place.

    ``types`` are those of the model before any edit, see ``known_types``; what is added has none.
    New names begin with the name of the node that they are for. Integers of the same value are
    made once for each graph.
    """

    def __init__(self, model: ir.Model, types: Mapping[str, ValueType]) -> None:
        self._types = types
        self.constants = Constants(model)
        self._model = model
        self._integers: dict[tuple[ir.Graph, tuple[int, ...], bytes], ir.Value] = {}
        self._in_functions = {
            value.name
            for function in model.functions.values()
            for value in (*function.inputs, *(v for node in function for v in node.outputs))
        }

    def type_of(self, value: ir.Value | None) -> ValueType:
        """Return element type and shape of ``value`` as far as they are known."""
        if value is None or not value.name or value.name in self._in_functions:
            return ValueType()
        return self._types.get(value.name, ValueType())

    def dtype_for(self, node: ir.Node) -> np.dtype[Any]:
        """Return the element type of the first input of ``node``.

        Raises:
            ExportError: it is not known.
        """
        dtype = self.type_of(node.inputs[0]).dtype or self.type_of(node.outputs[0]).dtype
        if dtype is None:
            raise refuse(node, "the element type of its input is unknown; declare it")
        return dtype.numpy()

    def unique_name(self, node: ir.Node, suffix: str) -> str:
        """Return a free name for something that is made for ``node``."""
        stem = f"{node.name or node.outputs[0].name}_{suffix}"
        name = self.constants.unique_name(stem)
        while name in self._in_functions:
            name = self.constants.unique_name(stem)
        return name

    def constant(self, node: ir.Node, suffix: str, array: Array) -> ir.Value:
        """Return ``array`` as a value that ``node`` can read.

        It is an initialiser of the main graph, a Constant node at the start of any other.
        """
        graph = graph_of(node)
        key = (graph, array.shape, array.tobytes())
        if array.dtype == np.int64 and key in self._integers:
            return self._integers[key]
        name = self.unique_name(node, suffix)
        if graph is self._model.graph:
            value = self.constants.add(graph, name, array)
        else:
            value = _constant_node(graph, name, array)
        if array.dtype == np.int64:
            self._integers[key] = value
        return value

    def give(self, node: ir.Node, index: int, suffix: str, array: Array) -> None:
        """Make ``array`` the input ``index`` of ``node``, in place."""
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        node.replace_input_with(index, self.constant(node, suffix, array))

    def insert(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        suffix: str,
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        """Insert a node before ``node``, in place, and return its output."""
        name = self.unique_name(node, suffix)
        new = ir.node(op_type, inputs, attributes, name=name)
        new.outputs[0].name = name
        graph_of(node).insert_before(node, new)
        return new.outputs[0]

    def reshape_input(self, node: ir.Node, index: int, shape: Sequence[int]) -> None:
        """Let ``node`` read its input ``index`` in another shape, in place."""
        sizes = self.constant(node, "shape", np.array(shape, np.int64))
        reshaped = self.insert(node, "Reshape", [node.inputs[index], sizes], "reshaped")
        node.replace_input_with(index, reshaped)


def graph_of(node: ir.Node) -> ir.Graph:
    """Return the graph that holds ``node``, the one inside for a node of a function."""
    graph = node.graph
    assert graph is not None
    return graph.graph if isinstance(graph, ir.Function) else graph


def _constant_node(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    node = ir.node("Constant", [], {"value": ir.tensor(array, name=name)}, name=name)
    value = node.outputs[0]
    value.name, value.const_value = name, None
    graph.insert_before(graph[0], node)
    return value


Adapter = Callable[[Editor, ir.Node], bool]
"""Rewrites a node in place; says whether anything changed. Raises ExportError if it cannot."""


def drop(*names: str) -> Adapter:
    """Return an adapter for attributes that meant nothing, or nothing at inference."""

    def adapt(edit: Editor, node: ir.Node) -> bool:
        del edit
        found = [name for name in names if node.attributes.pop(name, None) is not None]
        return bool(found)

    return adapt


def to_input(name: str, index: int, dtype: Any = np.int64, *, keep_empty: bool = False) -> Adapter:
    """Return an adapter for an attribute that became an input."""

    def adapt(edit: Editor, node: ir.Node) -> bool:
        if name not in node.attributes:
            return False
        value = take(node, name)
        if keep_empty or len(value):
            edit.give(node, index, name, np.array(value, dtype))
        return True

    return adapt


def set_default(**values: Any) -> Adapter:
    """Return an adapter that writes out defaults which the next revision changed."""

    def adapt(edit: Editor, node: ir.Node) -> bool:
        del edit
        missing = {name: v for name, v in values.items() if name not in node.attributes}
        for name, value in missing.items():
            node.attributes.add(ir.convenience.convert_attribute(name, value))
        return node.attributes.pop("consumed_inputs", None) is not None or bool(missing)

    return adapt


def each(ops: str, revision: int, adapter: Adapter) -> dict[tuple[str, int], Adapter]:
    """Return the entries of a table for operators that changed in one way."""
    return {(op, revision): adapter for op in ops.split()}
