"""The constant values of a model: initialisers and Constant nodes, read and replaced alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from qwrap.graph.index import FLOATS, walk_nodes

Array = np.ndarray[Any, np.dtype[Any]]

# Where a computed weight or bias keeps a layer from being recognised as one.
WEIGHT_READERS = frozenset({
    "Add", "BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul", "Mul",
})  # fmt: skip
CONSTANT_DTYPES = {
    "value": None,
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}
FREE_INITIALISERS = 4  # the IR version since which an initialiser need not be a graph input


class Constants:
    """Reads, replaces and drops the constant values of ``model``, in place.

    An initialiser that is also a graph input counts as constant: that is how exporters wrote
    weights before IR version 4, and some do still.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._names = {v.name for v in (*model.graph.inputs, *model.graph.initializers.values())}
        for node in walk_nodes(model.graph):
            self._names.update(v.name for v in node.outputs)
            if node.graph is not None:
                self._names.update(node.graph.initializers)
                self._names.update(v.name for v in node.graph.inputs)

    def tensor(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """Return the tensor that ``value`` holds, None if it is not constant."""
        return None if value is None else _tensor(value)

    def array(self, value: ir.Value | None) -> Array | None:
        """Return what ``value`` holds, None if it is not constant."""
        tensor = self.tensor(value)
        return None if tensor is None else tensor.numpy()

    def is_float(self, value: ir.Value | None) -> bool:
        """Whether ``value`` is a floating-point constant."""
        tensor = self.tensor(value)
        return tensor is not None and tensor.dtype in FLOATS

    def floats(self, value: ir.Value | None) -> Array | None:
        """Return what ``value`` holds as float64, None if it is not a floating-point constant."""
        array = self.array(value) if self.is_float(value) else None
        return None if array is None else array.astype(np.float64)

    def unique_name(self, name: str) -> str:
        """Return ``name``, with a number behind it if a value of the model has that name."""
        candidate, count = name, 1
        while candidate in self._names:
            candidate, count = f"{name}_{count}", count + 1
        self._names.add(candidate)
        return candidate

    def add(self, graph: ir.Graph, name: str, array: Array) -> ir.Value:
        """Make an initialiser of ``graph``; ``name`` must be free (see ``unique_name``)."""
        return self.add_tensor(graph, ir.tensor(np.asarray(array, order="C"), name=name))

    def add_tensor(self, graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
        """Make an initialiser of ``graph``; the tensor's name must be free."""
        if self._model.ir_version < FREE_INITIALISERS:
            self._free_initialisers()
        value = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        graph.register_initializer(value)
        return value

    def _free_initialisers(self) -> None:
        # Before version 4 they are listed as inputs yet constant; from 4 on, listing one means
        # that the caller may override it, and onnxruntime no longer folds it as a constant.
        self._model.ir_version = FREE_INITIALISERS
        inputs = self._model.graph.inputs
        for value in [v for v in inputs if v.is_initializer()]:
            inputs.remove(value)

    def replace(self, node: ir.Node, index: int, array: Array) -> None:
        """Give the constant that is input ``index`` of ``node`` new contents, in place.

        It keeps its name, and a Constant node becomes an initialiser. If others read it as well,
        ``node`` gets a copy ``<name>_<node>`` of its own.
        """
        value = node.inputs[index]
        assert value is not None
        assert value.name is not None
        assert node.graph is not None
        shared = len(value.uses()) > 1 or value.is_graph_output()
        if shared:
            name = self.unique_name(f"{value.name}_{node.name or node.outputs[0].name}")
            node.replace_input_with(index, self.add(_graph(node), name, array))
        elif value.is_initializer():
            tensor = ir.tensor(np.asarray(array, order="C"), name=value.name)
            value.const_value, value.shape = tensor, ir.Shape(array.shape)
        else:
            self.materialise(value, array)

    def materialise(self, value: ir.Value, array: Array) -> None:
        """Make an initialiser of the same name from a node's only output, in place."""
        producer, name = value.producer(), value.name
        assert producer is not None
        assert name is not None
        graph, inputs = _graph(producer), tuple(producer.inputs)
        value.replace_all_uses_with(self.add(graph, name, array))
        graph.remove(producer, safe=True)
        self.drop_unused(inputs)

    def drop_unused(self, values: Iterable[ir.Value | None]) -> None:
        """Remove those constants among ``values`` that nothing reads any more, in place."""
        for value in values:
            if value is None or value.uses() or value.is_graph_output():
                continue
            producer = value.producer()
            if producer is not None and producer.op_type == "Constant":
                if producer.graph is not None:
                    _graph(producer).remove(producer, safe=True)
            elif value.is_initializer() and value.graph is not None:
                graph = value.graph
                assert isinstance(graph, ir.Graph)
                if value.is_graph_input():
                    graph.inputs.remove(value)
                graph.initializers.pop(value.name or "")


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    # Not ir.convenience.get_const_tensor: it renames the tensor inside a Constant node.
    if value.is_initializer():
        return value.const_value
    producer = value.producer()
    if producer is None or producer.op_type != "Constant" or producer.domain:
        return None
    for name, attribute in producer.attributes.items():
        if attribute.is_ref() or name not in CONSTANT_DTYPES:
            continue
        if name == "value":
            return attribute.as_tensor()
        return ir.tensor(np.array(attribute.value, dtype=CONSTANT_DTYPES[name]))
    return None


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)  # nodes of functions are never edited
    return node.graph


def label(node: ir.Node) -> str:
    """Return how to call a node in a message: its type and its name, or that of its output."""
    return f"{node.op_type} {node.name or node.outputs[0].name!r}"


def integers(constants: Constants, node: ir.Node, name: str, index: int) -> list[int] | None:
    """Return an attribute that later opsets made an input, None if absent or not constant."""
    attribute = node.attributes.get(name)
    if attribute is not None:
        return [int(i) for i in attribute.as_ints()]
    array = constants.array(node.inputs[index]) if len(node.inputs) > index else None
    return None if array is None else [int(i) for i in array.reshape(-1)]


def fold_constant_weights(model: ir.Model) -> list[str]:
    """Evaluate, in place, what only moves or reshapes a constant on its way to a weight or bias.

    Reshape, Transpose, Squeeze, Unsqueeze, Identity and a Cast to the same type give way to an
    initialiser named as their output.

    Returns:
        A line for each node that is gone.
    """
    constants, lines = Constants(model), []
    for node in list(walk_nodes(model.graph)):
        value = node.outputs[0] if node.outputs else None
        if node.op_type not in MOVERS or node.domain or value is None or value.is_graph_output():
            continue
        if not constants.is_float(node.inputs[0]) or not _feeds_weight(value):
            continue
        array = MOVERS[node.op_type](constants, node)
        if array is not None:
            lines.append(f"{label(node)}: evaluated into initialiser {value.name!r}")
            constants.materialise(value, array)
    return lines


def _feeds_weight(value: ir.Value) -> bool:
    return any(
        use.node.op_type in WEIGHT_READERS
        or (use.node.op_type in MOVERS and _feeds_weight(use.node.outputs[0]))
        for use in value.uses()
    )


def _reshape(constants: Constants, node: ir.Node) -> Array | None:
    data, shape = constants.array(node.inputs[0]), integers(constants, node, "shape", 1)
    if data is None or shape is None:
        return None
    keep_zero = "allowzero" in node.attributes and node.attributes["allowzero"].as_int() == 1
    sizes = [data.shape[i] if n == 0 and not keep_zero else n for i, n in enumerate(shape)]
    return data.reshape(sizes)


def _transpose(constants: Constants, node: ir.Node) -> Array | None:
    data = constants.array(node.inputs[0])
    return None if data is None else data.transpose(integers(constants, node, "perm", 1))


def _squeeze(constants: Constants, node: ir.Node) -> Array | None:
    data, axes = constants.array(node.inputs[0]), integers(constants, node, "axes", 1)
    if data is None or (axes is None and len(node.inputs) > 1):
        return None
    return data.squeeze(None if axes is None else tuple(axes))


def _unsqueeze(constants: Constants, node: ir.Node) -> Array | None:
    data, axes = constants.array(node.inputs[0]), integers(constants, node, "axes", 1)
    return None if data is None or axes is None else np.expand_dims(data, tuple(axes))


def _identity(constants: Constants, node: ir.Node) -> Array | None:
    return constants.array(node.inputs[0])


def _cast(constants: Constants, node: ir.Node) -> Array | None:
    data, to = constants.array(node.inputs[0]), node.attributes["to"]
    if data is None or to.type != ir.AttributeType.INT:  # a string until opset 5
        return None
    return data if ir.DataType.from_numpy(data.dtype) == to.as_int() else None


MOVERS: dict[str, Callable[[Constants, ir.Node], Array | None]] = {
    "Cast": _cast,
    "Identity": _identity,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
