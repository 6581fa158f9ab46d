"""What choices and conversions should cost, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from qwrap.mixed.choices import Choice, Edge, Group
from qwrap.mixed.cost.owners import Border
from qwrap.mixed.cost.parts import NANO, Parts, pairs_of, static_conversion
from qwrap.model.attributes import attributes_of
from qwrap.model.wrapped import WrappedModel
from qwrap.ops.traits import WEIGHTED
from qwrap.quant.placement.cost import (
    Shape,
    dequantize_cost,
    float_cost,
    integer_cost,
    quantize_cost,
)

_EIGHT = ("int8", "uint8")


def estimated_parts(
    model: WrappedModel,
    groups: Sequence[Group],
    borders: Sequence[Border],
    shapes: Mapping[str, Shape],
) -> Parts:
    """Return the seconds of choices and conversions; what is in no group counts nothing.

    Args:
        model: prepared, with all quantized that can be.
        groups: with their choices.
        borders: tensors between them.
        shapes: of all tensors that are computed.
    """
    nodes = _Nodes(model, shapes)
    seconds = {
        (group.name, choice): sum(nodes.cost(key, choice) for key in group.nodes) * NANO
        for group in groups
        for choice in group.choices
    }
    by_name = {group.name: group for group in groups}
    edges = []
    for border in borders:
        size = math.prod(shapes.get(border.tensor, (0,)))
        costs = {pair: static_conversion(pair, size) for pair in pairs_of(border, by_name)}
        edges.append(Edge(border.tensor, border.producer, border.consumers, costs))
    return Parts(seconds, edges, 0.0)


class _Nodes:
    def __init__(self, model: WrappedModel, shapes: Mapping[str, Shape]) -> None:
        self.graph, self.stored = model.graph, model.layout.values.stored
        self.shapes = shapes

    def cost(self, key: str, choice: Choice) -> float:
        """Return nanoseconds of one node."""
        node = self.graph.nodes.get(key)
        if node is None:
            return 0.0
        sizes = self._sizes(node)
        as_float = float_cost(*sizes)
        if choice.is_float or choice.activation.startswith("float"):
            return as_float
        as_integer = integer_cost(*sizes)
        if choice.activation in _EIGHT and choice.weight in _EIGHT and math.isfinite(as_integer):
            return as_integer
        size = math.prod(sizes[2])
        return as_float + quantize_cost(size) + dequantize_cost(size)

    def _sizes(self, node: ir.Node) -> tuple[str, list[Shape], Shape, Shape | None, int, int]:
        inputs = [self._shape(value) for value in node.inputs if value is not None]
        weighted = node.op_type in WEIGHTED and len(node.inputs) > 1
        weight = inputs[1] if weighted and self._is_stored(node.inputs[1]) else None
        attributes = attributes_of(node)
        window = math.prod(attributes.get("kernel_shape", (9,)))
        output = self._shape(node.outputs[0])
        return node.op_type, inputs, output, weight, attributes.get("group", 1), window

    def _is_stored(self, value: ir.Value | None) -> bool:
        return value is not None and self.graph.key(value) in self.stored

    def _shape(self, value: ir.Value) -> Shape:
        key = self.graph.key(value)
        if key in self.stored:
            return tuple(int(size) for size in self.stored[key].shape.numpy())
        return self.shapes.get(key, (1,))
