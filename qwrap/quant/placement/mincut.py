"""Minimum cut: the cheapest split of a graph into two sides."""

from __future__ import annotations

from collections import deque

NEVER = 1e18  # a cost that no sum of others reaches


class Network:
    """A flow network between a source and a sink, with float capacities.

    Source: Dinic's algorithm, Soviet Math. Dokl. 11 (1970): shortest augmenting paths by layers.
    """

    def __init__(self) -> None:
        self._edges: list[list[int]] = [[], []]
        self._to: list[int] = []
        self._room: list[float] = []
        self.cost = 0.0  # of the cut, once ``source_side`` has found it

    def add_node(self, cost_on_source_side: float, cost_on_sink_side: float) -> int:
        """Add a node that costs so much on either side; return its number."""
        self._edges.append([])
        node = len(self._edges) - 1
        self.add_edge(0, node, cost_on_sink_side)
        self.add_edge(node, 1, cost_on_source_side)
        return node

    def add_edge(self, a: int, b: int, cost: float) -> None:
        """Let it cost ``cost`` if ``a`` is on the source's side and ``b`` on the sink's."""
        for tail, head, room in ((a, b, cost), (b, a, 0.0)):
            self._edges[tail].append(len(self._to))
            self._to.append(head)
            self._room.append(room)

    def source_side(self) -> set[int]:
        """Return the nodes on the source's side of a minimum cut, as few as possible."""
        while True:
            level = self._levels()
            if level[1] < 0:
                return {node for node, depth in enumerate(level) if depth >= 0} - {0}
            self._saturate(level)

    def _levels(self) -> list[int]:
        level = [-1] * len(self._edges)
        level[0] = 0
        queue = deque([0])
        while queue:
            node = queue.popleft()
            for edge in self._edges[node]:
                head = self._to[edge]
                if self._room[edge] > 0 and level[head] < 0:
                    level[head] = level[node] + 1
                    queue.append(head)
        return level

    def _saturate(self, level: list[int]) -> None:
        """Push flow along shortest paths until none is left, depth first without recursion."""
        position = [0] * len(self._edges)
        path: list[int] = []
        node = 0
        while True:
            if node == 1:
                flow = min(self._room[edge] for edge in path)
                self.cost += flow
                for edge in path:
                    self._room[edge] -= flow
                    self._room[edge ^ 1] += flow
                path, node = [], 0
            advanced = self._next(node, level, position)
            if advanced is not None:
                path.append(advanced)
                node = self._to[advanced]
            elif not path:
                return
            else:
                edge = path.pop()
                node = self._to[edge ^ 1]
                position[node] += 1

    def _next(self, node: int, level: list[int], position: list[int]) -> int | None:
        edges = self._edges[node]
        while position[node] < len(edges):
            edge = edges[position[node]]
            if self._room[edge] > 0 and level[self._to[edge]] == level[node] + 1:
                return edge
            position[node] += 1
        return None
