"""The way of a cache through the graph, from input to output, on which codes can travel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qwrap.graph.index import bodies
from qwrap.graph.nodes import STANDARD

# Operators that move values and change none: which inputs hold the values, None for all.
_MOVERS: dict[str, tuple[int, ...] | None] = {
    "Concat": None,
    "Gather": (0,),
    "Identity": (0,),
    "Reshape": (0,),
    "ScatterElements": (0, 2),
    "ScatterND": (0, 2),
    "Slice": (0,),
    "Split": (0,),
    "Squeeze": (0,),
    "TensorScatter": (0, 1),
    "Transpose": (0,),
    "Unsqueeze": (0,),
    "Where": (1, 2),
}
JOINS = frozenset({"Concat", "ScatterElements", "ScatterND", "TensorScatter", "Where"})
"""Those that put something new beside the past."""


@dataclass(frozen=True, slots=True)
class Route:
    """Nodes that only move a cache, and their values.

    Attributes:
        nodes: each behind those whose values it moves.
        values: what is the cache, or parts of it: the past, what the nodes make, the present; in
            that order.
    """

    nodes: tuple[ir.Node, ...]
    values: Mapping[ir.Value, None]

    @property
    def joins(self) -> bool:
        """Whether anything is added on the way."""
        return any(node.op_type in JOINS for node in self.nodes)

    def moved(self, node: ir.Node) -> list[ir.Value]:
        """Return the values that ``node`` moves: inputs, or what the bodies of an If make."""
        if node.op_type == "If":
            made = [v for v in node.outputs if v in self.values]
            return [source for value in made for source in sources(value)]
        return [v for i in data_inputs(node) if (v := node.inputs[i]) is not None]

    def new(self, node: ir.Node) -> list[ir.Value]:
        """Return those of them that come from elsewhere, and become codes here."""
        return [value for value in self.moved(node) if value not in self.values]


def data_inputs(node: ir.Node) -> Sequence[int]:
    """Return which inputs a node moves; none if it is no such node."""
    if node.domain not in STANDARD or node.op_type not in _MOVERS:
        return ()
    known = _MOVERS[node.op_type]
    indices = range(len(node.inputs)) if known is None else known
    return [i for i in indices if i < len(node.inputs)]


def asks_shape(node: ir.Node) -> bool:
    """Whether a node reads the shape of its input, and none of its values."""
    return node.op_type == "Shape" and node.domain in STANDARD


def sources(value: ir.Value) -> list[ir.Value]:
    """Return the values that ``value`` consists of, if its node only moves them."""
    node = value.producer()
    if node is None:
        return []
    if node.op_type == "If" and node.domain in STANDARD:
        index = node.outputs.index(value)
        return [body.outputs[index] for _, body in bodies(node)]
    return [v for i in data_inputs(node) if (v := node.inputs[i]) is not None]


def origins(present: ir.Value) -> set[ir.Value]:
    """Return the graph inputs of which ``present`` consists, as far as values are only moved."""
    found, seen, waiting = set(), {present}, [present]
    while waiting:
        value = waiting.pop()
        if value.is_graph_input():
            found.add(value)
        for source in sources(value):
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return found


def trace(past: ir.Value, present: ir.Value) -> Route | None:
    """Return the way from ``past`` to ``present``; None if values are computed on it.

    None too if another graph output, or one of a body, is a value on the way.
    """
    tracer = _Tracer(past)
    if not tracer.carries(present):
        return None
    nodes = tuple(tracer.nodes)
    values = dict.fromkeys(tracer.values)
    inner = {
        v for n in nodes if n.op_type == "If" for o in n.outputs if o in values for v in sources(o)
    }
    if any(v.is_graph_output() and v is not present and v not in inner for v in values):
        return None
    return Route(nodes, values)


class _Tracer:
    def __init__(self, past: ir.Value) -> None:
        self._known = {past: True}
        self.nodes: dict[ir.Node, None] = {}
        self.values: dict[ir.Value, None] = {past: None}

    def carries(self, value: ir.Value) -> bool:
        """Whether ``value`` consists of the past, at least in part."""
        if value in self._known:
            return self._known[value]
        self._known[value] = False
        node = value.producer()
        found = [self.carries(source) for source in sources(value)]
        if node is None or not any(found):
            return False
        self.nodes[node] = None
        made = node.outputs if node.op_type == "Split" else [value]
        self.values.update(dict.fromkeys(made))
        self._known.update(dict.fromkeys(made, True))
        return True
