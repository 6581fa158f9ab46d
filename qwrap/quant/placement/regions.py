"""Which nodes the user wants in which types."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import onnx_ir as ir

from qwrap.config import FLOATS, QConfig, QuantSpec, Region
from qwrap.errors import ConfigError
from qwrap.model.layout import Layout
from qwrap.quant.placement.paths import Paths


@dataclass(frozen=True, slots=True)
class Wish:
    """What regions say of one node.

    Attributes:
        activation: region with the last word on its inputs and outputs, None for none.
        weight: the same for its weight.
    """

    activation: Region | None = None
    weight: Region | None = None

    @property
    def in_float(self) -> str:
        """The float type that its inputs and outputs are to have, empty if they are quantized."""
        asked = None if self.activation is None else self.activation.activation
        return asked if isinstance(asked, str) and asked in FLOATS else ""

    @property
    def keeps_weight(self) -> bool:
        """Whether its weight stays float."""
        if self.weight is not None:
            return self.weight.weight in FLOATS
        return bool(self.in_float)


class Types:
    """The type of every node: of its region, or of the whole model.

    Attributes:
        notes: what to know of regions that overlap, one line each.
        everything: whether nodes without a kernel are quantized too.
    """

    def __init__(self, layout: Layout, config: QConfig) -> None:
        """Find the nodes of all regions.

        Raises:
            ConfigError: a selector fits nothing, or no way leads from one node to another.
        """
        self.config = config
        self.notes: list[str] = []
        self.everything = config.scope == "all"
        self._nodes = {layout.graph.node_key(node): node for node, _ in layout.placed()}
        self._wishes: dict[ir.Node, Wish] = {}
        selection = _Selection(layout, self._nodes)
        found = [(region, selection.nodes(region)) for region in config.regions]
        self._add_notes(found)
        for region, nodes in found:
            for node in nodes:
                wish = self._wishes.get(node, Wish())
                if region.activation is not None:
                    turned = region.activation in FLOATS or wish.in_float  # float or back
                    wish = Wish(region, None if turned else wish.weight)
                if region.weight is not None:
                    wish = replace(wish, weight=region)
                self._wishes[node] = wish

    def _add_notes(self, found: Iterable[tuple[Region, set[ir.Node]]]) -> None:
        """Say of which nodes two regions differ, where neither is a part of an earlier one."""
        before: list[tuple[Region, set[ir.Node]]] = []
        keys = {node: key for key, node in self._nodes.items()}
        for region, nodes in found:
            for other, theirs in before:
                both = nodes & theirs
                if not both or nodes < theirs or _agree(other, region):
                    continue
                shown = sorted(keys[node] for node in both)
                listed = ", ".join(shown[:3]) + (f", … ({len(shown)} nodes)" if shown[3:] else "")
                self.notes.append(f"{region.text} holds for {listed}, not {other.text}")
            before.append((region, nodes))

    @property
    def has_activations(self) -> bool:
        """Whether it is said of some activations of what type they are quantized."""
        return bool(self.config.tensors) or any(self.is_chosen(node) for node in self._wishes)

    def is_asked(self, node: ir.Node) -> bool:
        """Whether it was said of a node that it is quantized, in whatever types."""
        wish = self._wishes.get(node)
        return wish is not None and not (wish.in_float and wish.keeps_weight)

    def of(self, node: ir.Node) -> QuantSpec | None:
        """Return how the inputs and outputs of a node are quantized, None if they are float."""
        wish = self._wishes.get(node, Wish())
        if wish.in_float:
            return None
        if wish.activation is None:
            return self.config.activation_spec
        assert wish.activation.activation is not None
        return self.config.activation_spec_of(wish.activation.activation)

    def is_chosen(self, node: ir.Node) -> bool:
        """Whether a region says of what type the inputs and outputs of a node are."""
        wish = self._wishes.get(node, Wish())
        return wish.activation is not None and not wish.in_float

    def weight_of(
        self, node: ir.Node, axis: int | None, block_axis: int | None = None
    ) -> QuantSpec:
        """Return how the weight of a node is quantized; arguments as ``QConfig.weight_spec``."""
        wish = self._wishes.get(node, Wish())
        if wish.weight is None or wish.weight.weight is None or wish.keeps_weight:
            return self.config.weight_spec(axis, block_axis)
        return self.config.weight_spec_of(wish.weight.weight, axis, block_axis)

    def keeps_weight(self, node: ir.Node) -> bool:
        """Whether a region says that the weight of a node stays float."""
        return self._wishes.get(node, Wish()).keeps_weight

    def left_float(self) -> dict[str, str]:
        """Return node key -> reason, of the nodes that regions leave float altogether."""
        wishes = {key: self._wishes.get(node, Wish()) for key, node in self._nodes.items()}
        return {
            key: f"{wish.in_float} was asked for"
            for key, wish in wishes.items()
            if wish.in_float and wish.keeps_weight
        }

    def in_half(self) -> list[ir.Node]:
        """Return the nodes that are to compute in half precision."""
        return [node for node, wish in self._wishes.items() if wish.in_float == "float16"]


def _agree(a: Region, b: Region) -> bool:
    pairs = ((a.activation, b.activation), (a.weight, b.weight))
    return all(x is None or y is None or x == y for x, y in pairs)


class _Selection:
    def __init__(self, layout: Layout, nodes: Mapping[str, ir.Node]) -> None:
        self.layout, self.nodes_by_key = layout, nodes

    def nodes(self, region: Region) -> set[ir.Node]:
        """Return the nodes of a region."""
        start = self._selected(region, region.selectors)
        if not region.to:
            return start
        end = self._selected(region, region.to)
        paths = Paths(self.nodes_by_key.values())
        between = (start | paths.behind(start)) & (end | paths.ahead_of(end))
        if not between:
            raise ConfigError(
                f"{region.text}: no way leads from {list(region.selectors)} to {list(region.to)}; "
                "name them in the order of the graph"
            )
        return between & set(self.nodes_by_key.values())

    def _selected(self, region: Region, selectors: Iterable[str]) -> set[ir.Node]:
        found: set[ir.Node] = set()
        for selector in selectors:
            nodes = self._by_name(selector) or self._by_scope(selector) or self._at_tensor(selector)
            if not nodes:
                raise ConfigError(f"{region.text}: {self._unknown(selector)}")
            found |= nodes
        return found

    def _by_name(self, selector: str) -> set[ir.Node]:
        nodes = self.nodes_by_key
        found = {node for key, node in nodes.items() if _fits(key, selector)}
        return found or {node for node in nodes.values() if node.op_type == selector}

    def _by_scope(self, selector: str) -> set[ir.Node]:
        return {
            node
            for node, path in self.layout.placed()
            for depth in range(1, len(path) + 1)
            if _fits(".".join(path[:depth]), selector)
        }

    def _at_tensor(self, selector: str) -> set[ir.Node]:
        graph, known = self.layout.graph, set(self.nodes_by_key.values())
        values = [value for key, value in graph.values.items() if _fits(key, selector)]
        around = [(value.producer(), *value.consumers()) for value in values]
        return {node for nodes in around for node in nodes if node in known and node is not None}

    def _unknown(self, selector: str) -> str:
        graph = self.layout.graph
        if any(_fits(key, selector) for key in graph.values):
            return f"{selector!r} fits only tensors that no node reads or makes"
        types = {node.op_type for node in self.nodes_by_key.values()}
        names = [*self.nodes_by_key, *sorted(types), *graph.values]
        nearest = difflib.get_close_matches(selector, list(dict.fromkeys(names)), 3, cutoff=0.0)
        return (
            f"no node, operator type, Block or tensor fits {selector!r}; the nearest names are "
            f"{', '.join(map(repr, nearest))} (normalizations are folded into other layers)"
        )


def _fits(name: str, selector: str) -> bool:
    return name == selector or fnmatchcase(name, selector)
