"""Which values cross the border of a region, and how long each value lives inside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from qwrap.graph.index import bodies
from qwrap.model.layout import Layout
from qwrap.model.scopes import Region


@dataclass(frozen=True, slots=True)
class Border:
    """What a region takes and gives, by value key, in a fixed order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Borders:
    """The borders of all regions of a layout, each found once, from those inside it."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._found: dict[tuple[str, ...], Border] = {}
        self._find(layout.region)

    def __getitem__(self, region: Region) -> Border:
        return self._found[region.path]

    def touched(self, item: ir.Node | Region) -> Iterator[str]:
        """Yield the values that ``item`` reads from outside itself, then those it makes."""
        if isinstance(item, Region):
            border = self[item]
            yield from border.inputs
            yield from border.outputs
        else:
            yield from reads(item, self._layout)
            yield from makes(item, self._layout)

    def _find(self, region: Region) -> Border:
        layout, values, depth = self._layout, self._layout.values, len(region.path)
        used: dict[str, None] = {}
        made: dict[str, None] = {}
        for item in region.items:
            if isinstance(item, Region):
                inner = self._find(item)
                used.update(dict.fromkeys(inner.inputs))
                made.update(dict.fromkeys(inner.outputs))
            else:
                used.update(dict.fromkeys(reads(item, layout)))
                made.update(dict.fromkeys(makes(item, layout)))
        inputs = []
        for key in used:
            slot = layout.slots.get(key)
            is_own = slot is not None and slot.path[:depth] == region.path
            is_written_out = key in values.constants or key in values.texts
            is_written_out |= slot is None and key in values.stored
            if key not in made and not is_own and not is_written_out:
                inputs.append(key)
        outputs = [key for key in made if self._leaves(key, region)]
        self._found[region.path] = Border(tuple(inputs), tuple(outputs))
        return self._found[region.path]

    def _leaves(self, key: str, region: Region) -> bool:
        layout = self._layout
        value = layout.graph.values[key]
        if key in layout.values.constants or key in layout.values.texts:
            return False
        if value.is_graph_output():  # of the main graph, or captured by a body and returned by it
            return True
        homes = (layout.homes.get(node) for node in value.consumers())
        return any(home is not None and home[: len(region.path)] != region.path for home in homes)


def reads(node: ir.Node, layout: Layout) -> Iterator[str]:
    """Yield the values that a node and its bodies read and do not make themselves."""
    graph = layout.graph
    yield from (graph.key(value) for value in node.inputs if value is not None)
    for body in layout.values.branches(node) if any(True for _ in bodies(node)) else ():
        made: set[str] = {graph.key(v) for v in body.inputs if v.name}
        for inner in layout.values.live_nodes(body):
            yield from (key for key in reads(inner, layout) if key not in made)
            made.update(makes(inner, layout))
        yield from (graph.key(v) for v in body.outputs if graph.key(v) not in made)


def makes(node: ir.Node, layout: Layout) -> Iterator[str]:
    """Yield the values that a node makes for the graph around it."""
    yield from (layout.graph.key(value) for value in node.outputs if value.name)


def dying(
    items: Iterable[Iterable[str]], kept: Iterable[str], layout: Layout
) -> dict[int, list[str]]:
    """Return index -> the tensors that no item after that index reads.

    Args:
        items: the values that each item in turn touches.
        kept: values that outlive all items.
        layout: tells tensors from host values and parameters, which need not be freed.
    """
    values = layout.values
    last = {key: i for i, keys in enumerate(items) for key in keys}
    result: dict[int, list[str]] = {}
    keep = set(kept)
    for key, i in last.items():
        if not values.is_known(key) and key not in keep:
            result.setdefault(i, []).append(key)
    return result
