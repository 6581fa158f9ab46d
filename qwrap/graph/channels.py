"""Divide the channels of a tensor, and multiply the weights it goes into: nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import Array, Constants
from qwrap.graph.index import walk_nodes
from qwrap.graph.nodes import STANDARD

OUTPUT, SCALE, MUL = "_smooth_output", "_smooth_scale", "_smooth_mul"
"""What follows the name of a tensor in the names of what divides it."""


@dataclass(frozen=True, slots=True)
class Products:
    """Nodes of one graph that multiply the channels of one tensor with constants.

    Attributes:
        value: the tensor.
        trailing: how many axes it has behind that of its channels.
        channels: how many there are.
        nodes: in the order of the graph.
    """

    value: ir.Value
    trailing: int
    channels: int
    nodes: tuple[ir.Node, ...]


def find_products(model: ir.Model, op_types: Collection[str]) -> list[Products]:
    """Return all nodes of these operators (Conv, Gemm, MatMul) whose weight is a constant.

    Nodes in bodies of control flow count; those of functions of the model do not.
    """
    constants = Constants(model)
    found: dict[tuple[ir.Value, int, int, ir.Graph], list[ir.Node]] = {}
    for node in walk_nodes(model.graph):
        if node.op_type not in op_types or node.domain not in STANDARD or len(node.inputs) < 2:
            continue
        value, graph, view = node.inputs[0], node.graph, weight_view(constants, node)
        if value is None or view is None or not isinstance(graph, ir.Graph):
            continue
        if constants.tensor(value) is None:
            key = value, _trailing(node, view), view.channels, graph
            found.setdefault(key, []).append(node)
    return [
        Products(value, trailing, channels, tuple(nodes))
        for (value, trailing, channels, _), nodes in found.items()
    ]


@dataclass(frozen=True, slots=True)
class WeightView:
    """A weight by the channels of the input that it multiplies.

    Attributes:
        values: as they are stored.
        axis: of ``values``, over the channels of one group.
        groups: of a Conv, else 1.
        is_kernel: whether it is that of a Conv.
    """

    values: Array
    axis: int
    groups: int = 1
    is_kernel: bool = False

    @property
    def channels(self) -> int:
        """How many the input has."""
        return int(self.groups * self.values.shape[self.axis])

    def largest(self) -> Array:
        """Return the largest absolute value that multiplies each channel, float64."""
        split = np.abs(self._split(self.values.astype(np.float64)))
        axes = tuple(i for i in range(split.ndim) if i not in (0, self.axis + 1))
        return np.asarray(split.max(axes, initial=0.0)).reshape(-1)

    def times(self, scale: Array) -> Array:
        """Return the values, each multiplied with the number of its channel."""
        split = self._split(self.values.astype(np.float64))
        shape = [1] * split.ndim
        shape[0], shape[self.axis + 1] = self.groups, -1
        product = (split * scale.reshape(shape)).reshape(self.values.shape)
        return np.asarray(product).astype(self.values.dtype)

    def columns(self, values: Array) -> Array:
        """Return other ``values`` of this shape as ``[G, K, R]``: K products make each output."""
        split = self._split(values)
        if self.is_kernel:
            outputs_last = split.reshape(self.groups, split.shape[1], -1).swapaxes(1, 2)
            return np.asarray(outputs_last)
        return np.moveaxis(values, self.axis, 0).reshape(1, values.shape[self.axis], -1)

    def _split(self, values: Array) -> Array:
        return values.reshape(self.groups, -1, *values.shape[1:])


def weight_view(constants: Constants, node: ir.Node) -> WeightView | None:
    """Return the weight of a Conv, Gemm or MatMul; None if that is no float constant."""
    tensor = constants.tensor(node.inputs[1])
    if tensor is None or not constants.is_float(node.inputs[1]):
        return None
    values, rank = tensor.numpy(), len(tensor.shape)
    if rank < 2 or 0 in values.shape:
        return None
    if node.op_type == "Conv":
        return WeightView(values, 1, _int(node, "group", 1), is_kernel=True)
    if node.op_type == "Gemm":
        return WeightView(values, _int(node, "transB", 0))
    return WeightView(values, rank - 2)


def _trailing(node: ir.Node, view: WeightView) -> int:
    if node.op_type == "Conv":
        return view.values.ndim - 2
    return _int(node, "transA", 0) if node.op_type == "Gemm" else 0


def divide(
    constants: Constants, products: Products, scale: Array, *, fold: bool = True
) -> str | None:
    """Divide the channels of a tensor, and multiply the weights that it goes into, in place.

    Args:
        constants: of the model.
        products: what multiplies the tensor.
        scale: positive, float64, one for each channel.
        fold: divide what makes the tensor, where that is possible and nothing else reads it.

    Returns:
        The name of the Mul that was put before the products, None if there is none.
    """
    for node in products.nodes:
        view = weight_view(constants, node)
        assert view is not None
        constants.replace(node, 1, view.times(scale))
    divisor = scale.reshape(-1, *[1] * products.trailing)
    edits = _Fold(constants).plan(products.value, set(products.nodes), divisor) if fold else None
    if edits is None:
        return _insert(constants, products, divisor)
    for edit in edits:
        constants.replace(edit.node, edit.index, edit.array)
    return None


def _insert(constants: Constants, products: Products, divisor: Array) -> str:
    value, first = products.value, products.nodes[0]
    graph, tensor = first.graph, constants.array(first.inputs[1])
    assert isinstance(graph, ir.Graph)
    assert tensor is not None
    factor = constants.add(
        graph,
        constants.unique_name(f"{value.name}{SCALE}"),
        np.asarray(1 / divisor).astype(tensor.dtype),
    )
    output = ir.Value(
        name=constants.unique_name(f"{value.name}{OUTPUT}"), type=value.type, shape=value.shape
    )
    name = constants.unique_name(f"{value.name}{MUL}")
    graph.insert_before(first, ir.Node("", "Mul", [value, factor], outputs=[output], name=name))
    for node in products.nodes:
        node.replace_input_with(0, output)
    return name


# --- what makes the tensor -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Edit:
    """New contents of a constant that a node reads."""

    node: ir.Node
    index: int
    array: Array


_Plan = list[_Edit] | None

GAINS = {
    "BatchNormalization": (1, 2),
    "EmbedLayerNormalization": (5, 6),
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
}
"""Normalisations to the inputs, one number a channel, that their first output is linear in."""
HOMOGENEOUS = frozenset({
    *("Relu", "LeakyRelu", "PRelu", "Identity"),
    *("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"),
})  # fmt: skip
"""What makes of a tensor with a channel divided its result with that channel divided."""
SHAPES = ("Shape", "Size")


class _Fold:
    """Finds constants to divide so that a tensor comes out divided."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants

    def plan(self, value: ir.Value, readers: Collection[ir.Node], divisor: Array) -> _Plan:
        """Return what to change, None if there is no way.

        Args:
            value: what is to be divided.
            readers: who may see that.
            divisor: broadcasts against it from the right; its first axis is that of channels.
        """
        node = value.producer()
        if node is None or value.is_graph_output() or node.outputs[0] is not value:
            return None
        if any(u.node not in readers and u.node.op_type not in SHAPES for u in value.uses()):
            return None
        if node.op_type in GAINS and node.domain in (*STANDARD, "com.microsoft"):
            return self._gains(node, divisor)
        if node.domain not in STANDARD:
            return None
        if node.op_type in HOMOGENEOUS and len([o for o in node.outputs if o.uses()]) == 1:
            return self._operand(node, 0, divisor) if self._passes(node, divisor) else None
        make = _MAKERS.get(node.op_type)
        return make(self, node, divisor) if make else None

    def _operand(self, node: ir.Node, index: int, divisor: Array) -> _Plan:
        value = node.inputs[index]
        return None if value is None else self.plan(value, {node}, divisor)

    def _passes(self, node: ir.Node, divisor: Array) -> bool:
        # Pools run over all axes behind the second: these must be the trailing ones.
        rank = None if node.inputs[0] is None else node.inputs[0].shape
        pools = node.op_type.endswith("Pool")
        return not pools or (rank is not None and len(rank) == divisor.ndim + 1)

    def _divided(self, node: ir.Node, index: int, divisor: Array) -> _Plan:
        values = self._constants.floats(node.inputs[index])
        dtype = self._dtype(node, index)
        if values is None or dtype is None:
            return None
        return [_Edit(node, index, np.asarray(values / divisor).astype(dtype))]

    def _dtype(self, node: ir.Node, index: int) -> np.dtype[Any] | None:
        array = self._constants.array(node.inputs[index])
        return None if array is None else array.dtype

    def _gains(self, node: ir.Node, divisor: Array) -> _Plan:
        edits: list[_Edit] = []
        if node.op_type == "BatchNormalization":
            shape = node.outputs[0].shape
            if shape is None or len(shape) != divisor.ndim + 1:
                return None
        elif divisor.ndim != 1:
            return None
        for index in GAINS[node.op_type]:
            if index >= len(node.inputs) or node.inputs[index] is None:
                continue
            values = self._constants.floats(node.inputs[index])
            if values is None or values.shape != (len(divisor),):
                return None
            edits += self._divided(node, index, divisor.reshape(-1)) or []
        return edits

    def sum_of(self, node: ir.Node, divisor: Array) -> _Plan:
        """Both operands of an Add or Sub have to be divided, and one of them has to be computed."""
        if node.inputs[0] is node.inputs[1]:
            return None
        plans = [
            self._divided(node, i, divisor) or self._operand(node, i, divisor) for i in range(2)
        ]
        if plans[0] is None or plans[1] is None:
            return None
        return plans[0] + plans[1]

    def product_of(self, node: ir.Node, divisor: Array) -> _Plan:
        """One operand of a Mul has to be divided; a single number is left alone."""
        if node.inputs[0] is node.inputs[1]:
            return None
        for index in (1, 0):
            array = self._constants.array(node.inputs[index])
            if array is None:
                found = self._operand(node, index, divisor)
            else:
                found = self._divided(node, index, divisor) if _is_like(array, divisor) else None
            if found is not None:
                return found
        return None

    def quotient_of(self, node: ir.Node, divisor: Array) -> _Plan:
        """The first operand of a Div has to be divided, or the second one multiplied."""
        array = self._constants.array(node.inputs[1])
        if array is not None and _is_like(array, divisor):
            return self._divided(node, 1, 1 / divisor)
        found = self._constants.array(node.inputs[0])
        if found is not None:
            return self._divided(node, 0, divisor) if _is_like(found, divisor) else None
        return self._operand(node, 0, divisor)

    def matrix_product(self, node: ir.Node, divisor: Array) -> _Plan:
        """The columns of a constant matrix, and a constant bias, are divided."""
        view = self._constants.array(node.inputs[1])
        if view is None or view.ndim < 2 or divisor.ndim != 1:
            return None
        turned = node.op_type == "Gemm" and _int(node, "transB", 0)
        if view.shape[-2 if turned else -1] != len(divisor):
            return None
        edits = self._divided(node, 1, divisor[:, None] if turned else divisor)
        return self._with_bias(node, divisor, edits)

    def convolution(self, node: ir.Node, divisor: Array) -> _Plan:
        """The outputs of a constant kernel, and a constant bias, are divided."""
        array = self._constants.array(node.inputs[1])
        if array is None or array.ndim != divisor.ndim + 1 or len(array) != len(divisor):
            return None
        edits = self._divided(node, 1, divisor.reshape(-1, *[1] * (array.ndim - 1)))
        return self._with_bias(node, divisor.reshape(-1), edits)

    def _with_bias(self, node: ir.Node, divisor: Array, edits: _Plan) -> _Plan:
        if edits is None or len(node.inputs) < 3 or node.inputs[2] is None:
            return edits
        bias = self._divided(node, 2, divisor)
        return None if bias is None else edits + bias


_MAKERS: dict[str, Callable[[_Fold, ir.Node, Array], _Plan]] = {
    "Add": _Fold.sum_of,
    "Conv": _Fold.convolution,
    "Div": _Fold.quotient_of,
    "Gemm": _Fold.matrix_product,
    "MatMul": _Fold.matrix_product,
    "Mul": _Fold.product_of,
    "Sub": _Fold.sum_of,
}


def _is_like(array: Array, divisor: Array) -> bool:
    """Whether a constant has a number of its own for each channel."""
    shape = array.shape[max(array.ndim - divisor.ndim, 0) :]
    return len(shape) == divisor.ndim and shape[0] == len(divisor)


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default
