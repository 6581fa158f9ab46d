"""What lies in front of nodes, and what behind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import onnx_ir as ir

from qwrap.graph.index import bodies, walk_nodes


class Paths:
    """The ways that lead from node to node."""

    def __init__(self, nodes: Iterable[ir.Node]) -> None:
        self._following: dict[ir.Node, list[ir.Node]] = defaultdict(list)
        self._preceding: dict[ir.Node, list[ir.Node]] = defaultdict(list)
        for before, after in _edges(nodes):
            self._following[before].append(after)
            self._preceding[after].append(before)

    def behind(self, nodes: Iterable[ir.Node]) -> set[ir.Node]:
        """Return what depends on any of ``nodes``."""
        return _reached(nodes, self._following)

    def ahead_of(self, nodes: Iterable[ir.Node]) -> set[ir.Node]:
        """Return what any of ``nodes`` depends on."""
        return _reached(nodes, self._preceding)


def _edges(nodes: Iterable[ir.Node]) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Yield (node, node that depends on it); bodies stand between inputs and outputs of theirs."""
    for node in nodes:
        makers = [v.producer() for v in node.inputs if v is not None]
        yield from ((maker, node) for maker in makers if maker is not None)
        inner = [other for _, body in bodies(node) for other in walk_nodes(body)]
        yield from ((other, node) for other in inner)
        yield from ((maker, other) for maker in makers if maker is not None for other in inner)


def _reached(start: Iterable[ir.Node], edges: Mapping[ir.Node, Iterable[ir.Node]]) -> set[ir.Node]:
    """Return what lies one or more edges away."""
    found: set[ir.Node] = set()
    waiting = list(start)
    while waiting:
        for node in edges.get(waiting.pop(), ()):
            if node not in found:
                found.add(node)
                waiting.append(node)
    return found
