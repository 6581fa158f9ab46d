"""The order of nodes: each after what it reads."""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

import onnx

from qwrap.graph import subgraphs
from qwrap.ort.errors import InvalidModelError
from qwrap.ort.graphs.scopes import captured_names, made_names


def sort_nodes(graph: onnx.GraphProto, outside: frozenset[str] = frozenset()) -> None:
    """Put the nodes of ``graph`` and of the bodies in it into topological order, in place.

    Breadth first from what is given: nodes without inputs, then the readers of graph inputs and
    initializers by the name of these, then the readers of what those make. What bodies capture
    counts as read by their node. Messages keep their identity.

    Args:
        graph: to sort.
        outside: names that the graphs around it provide.

    Raises:
        InvalidModelError: nodes read each other's outputs, or read what nothing makes; the
            message names some.
    """
    nodes = list(graph.node)
    with_bodies = {i: list(subgraphs(node)) for i, node in enumerate(nodes) if node.attribute}
    bodies = {i: held for i, held in with_bodies.items() if held}
    if bodies:
        available = frozenset(made_names(graph) | outside)
        for body in itertools.chain.from_iterable(bodies.values()):
            sort_nodes(body, available)
    order = _order(nodes, bodies, _given(graph) | outside)
    if len(order) < len(nodes):
        raise InvalidModelError(_complaint(graph, set(order), made_names(graph) | outside))
    if order != list(range(len(order))):
        ranks = {position: rank for rank, position in enumerate(order)}
        in_turn = iter(range(len(order)))
        graph.node.sort(key=lambda _: ranks[next(in_turn)])


def _given(graph: onnx.GraphProto) -> set[str]:
    names = {value.name for value in (*graph.input, *graph.initializer)}
    return names | {sparse.values.name for sparse in graph.sparse_initializer}


def _order(
    nodes: Sequence[onnx.NodeProto], bodies: Mapping[int, list[onnx.GraphProto]], given: set[str]
) -> list[int]:
    """Return the positions of the nodes that can be computed from ``given``, in their order."""
    waiting: list[int] = []
    readers: dict[str, list[int]] = defaultdict(list)
    for position, node in enumerate(nodes):
        reads = [name for name in node.input if name]
        for body in bodies.get(position, ()):
            reads += sorted(captured_names(body))
        waiting.append(len(reads))
        for name in reads:
            readers[name].append(position)
    order = [position for position, count in enumerate(waiting) if not count]
    ready = deque(order)

    def provide(name: str) -> None:
        for position in readers.pop(name, ()):
            waiting[position] -= 1
            if not waiting[position]:
                order.append(position)
                ready.append(position)

    for name in sorted(given):
        provide(name)
    while ready:
        for name in nodes[ready.popleft()].output:
            provide(name)
    return order


def _complaint(graph: onnx.GraphProto, sorted_: set[int], available: set[str]) -> str:
    left = [node for position, node in enumerate(graph.node) if position not in sorted_]
    missing = sorted({n for node in left for n in node.input if n} - available)
    if missing:
        return f"graph '{graph.name}': nothing makes {missing[:5]}, which its nodes read"
    names = [node.name or node.output[0] for node in left[:5]]
    return f"graph '{graph.name}' is not a DAG: nodes {names} wait for each other"
