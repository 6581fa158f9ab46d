"""Which group each node of a model belongs to, and which tensors go from one to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qwrap.mixed.choices import Group
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.placement.eligibility import Eligibility
from qwrap.quant.placement.target import ORT_CPU

_SHAPE_READERS = ("Shape", "Size")


@dataclass(frozen=True, slots=True)
class Border:
    """A tensor of real numbers between groups.

    Attributes:
        tensor: its key.
        source: key of the node that makes it, None for a graph input.
        producer: group of that node, None where it is in none and its values come from none.
        consumers: groups that read it; None among them for graph outputs and nodes in no group.
    """

    tensor: str
    source: str | None
    producer: str | None
    consumers: tuple[str | None, ...]


class Owners:
    """Groups of nodes, nodes that only move values counted to the group they come from.

    Attributes:
        of: node key -> name of its group, None if it is in none.
        moving: keys of nodes in no group that only move values: their time depends on the types on
            both sides, so it is a matter of the tensor.
        borders: the tensors between groups, in the order they are made.
    """

    def __init__(self, model: WrappedModel, groups: Sequence[Group]) -> None:
        """Look at a prepared model."""
        self._graph = model.graph
        self._facts = Eligibility(model.layout, ORT_CPU, {})
        self._named = {key: group.name for group in groups for key in group.nodes}
        self.of: dict[str, str | None] = {}
        self.moving: set[str] = set()
        for node in self._facts.nodes:
            self.of[model.graph.node_key(node)] = self._owner(node)
        made = [v for node in self._facts.nodes for v in node.outputs if v.name]
        self.borders = [
            border
            for value in (*model.graph.inputs, *made)
            if self._facts.is_real(value)
            for border in self._border(value)
        ]

    def _owner(self, node: ir.Node) -> str | None:
        """Return the group of a node whose predecessors are known."""
        key = self._graph.node_key(node)
        if key in self._named:
            return self._named[key]
        moved = self._facts.moved_input(node)
        if moved is None:
            return None
        self.moving.add(key)
        return self._maker(moved)

    def _maker(self, value: ir.Value) -> str | None:
        node = value.producer()
        return None if node is None else self.of.get(self._graph.node_key(node))

    def _border(self, value: ir.Value) -> list[Border]:
        producer, node = self._maker(value), value.producer()
        readers = [n for n in value.consumers() if n.op_type not in _SHAPE_READERS]
        consumers = [self.of.get(self._graph.node_key(reader)) for reader in readers]
        if value.is_graph_output():
            consumers.append(None)
        others = tuple(dict.fromkeys(c for c in consumers if c != producer))
        if not others:
            return []
        source = None if node is None else self._graph.node_key(node)
        return [Border(self._graph.key(value), source, producer, others)]
