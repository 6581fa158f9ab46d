"""Where a graph can be cut, and which tensors cross each cut."""

from __future__ import annotations

import onnx_ir as ir

from qwrap.graph.index import OnnxGraph, bodies, read_values, walk_nodes


class Cuts:
    """The places before, between and behind the nodes of the main graph, by number.

    Args:
        graph: its nodes are in an order in which they can run.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        nodes = list(graph.model.graph)
        self.count = len(nodes)
        self._places: dict[ir.Node, int] = {}
        self._made: dict[ir.Value, int] = dict.fromkeys(graph.inputs, 0)
        self._read: dict[ir.Value, int] = {}
        for place, node in enumerate(nodes):
            self._places[node] = place
            for _, body in bodies(node):
                self._places |= dict.fromkeys(walk_nodes(body), place)
            read = list(read_values(node))
            self._read |= dict.fromkeys(read, place)
            # What does not depend on the data is made again where it is needed.
            if any(value in self._made for value in read):
                self._made |= {value: place + 1 for value in node.outputs if value.name}
        self._keys = {value: graph.key(value) for value in self._made}

    def place(self, node: ir.Node) -> int:
        """Return the cut before a node, or before that whose body it is in."""
        return self._places[node]

    def made_between(self, first: int, last: int) -> list[str]:
        """Return the keys of what nodes between two cuts make of the data."""
        return [self._keys[value] for value, made in self._made.items() if first < made <= last]

    def crossing(self, place: int) -> list[str]:
        """Return the keys of what is made before a cut and read behind it."""
        return [
            self._keys[value]
            for value, made in self._made.items()
            if made <= place and self._read.get(value, -1) >= place
        ]
