"""Where a file gives some readers of a quantized tensor another type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from qwrap.graph.nodes import QUANTIZED
from qwrap.model.points import OutputPoint, Point, UsePoint

DOMAINS = ("", "ai.onnx", "com.microsoft")


def is_a(node: ir.Node | None, op_type: str) -> bool:
    """Whether a node is a QuantizeLinear, or a DequantizeLinear."""
    return node is not None and node.op_type == op_type and node.domain in DOMAINS


def quantizes(node: ir.Node | None) -> bool:
    """Whether a node rounds to the numbers of a type."""
    return node is not None and (is_a(node, "QuantizeLinear") or QUANTIZED in node.metadata_props)


def origin_of(node: ir.Node) -> ir.Node | None:
    """Return what quantized the tensor that ``node`` quantizes again, None if nothing did."""
    data = node.inputs[0]
    maker = None if data is None else data.producer()
    if maker is not None and is_a(maker, "DequantizeLinear"):
        codes = maker.inputs[0]
        maker = None if codes is None else codes.producer()
    return maker if quantizes(maker) else None


def dequantized(node: ir.Node) -> list[ir.Value]:
    """Return what stands for a quantized tensor from there on."""
    result = node.outputs[0]
    if not is_a(node, "QuantizeLinear"):
        return [result]
    return [user.outputs[0] for user in result.consumers() if is_a(user, "DequantizeLinear")]


def conversions_of(node: ir.Node) -> list[ir.Node]:
    """Return what quantizes again what ``node`` quantizes."""
    users = [user for value in dequantized(node) for user in value.consumers()]
    return [user for user in users if quantizes(user) and origin_of(user) is node]


def points_of(node: ir.Node, keys: Mapping[str, object], outputs: list[str]) -> tuple[Point, ...]:
    """Return where the float model has what ``node`` quantizes for some readers.

    Args:
        node: quantizes for the second time.
        keys: of the float model's nodes.
        outputs: names of the graph outputs.
    """
    found: list[Point] = []
    for value in dequantized(node):
        found += [UsePoint(*use) for use in _uses(value, keys)]
        found += [OutputPoint(i) for i, name in enumerate(outputs) if name == value.name]
    return tuple(found)


def _uses(value: ir.Value, keys: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Yield key and input of the nodes that read a value, perhaps behind a Max with nothing."""
    for use in value.uses():
        node, made = use.node, use.node.outputs[0]
        names = (node.name or "", f"{node.op_type}:{made.name}")
        key = next((name for name in names if name in keys), None)
        if key is not None:
            yield key, use.idx
        elif node.op_type == "Max":
            yield from _uses(made, keys)
