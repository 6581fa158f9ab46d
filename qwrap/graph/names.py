"""Whether every value of a graph is made once, before it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set

import onnx

from qwrap.graph.nodes import label, subgraphs


class Names:
    """Follows the values of a graph and of those inside it, and notes what is wrong.

    A subgraph may make a value of a name that the graph around it also has, and means its own
    from there on; it may not do so after it has read the outer one.

    Attributes:
        problems: one line each.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []

    def graph(self, graph: onnx.GraphProto, *outer: Set[str]) -> set[str]:
        """Check a graph; return the names that it reads from the graphs around it.

        Args:
            graph: the graph.
            outer: what there is to be read when its node runs, a set for each graph around it.
        """
        dense = Counter(t.name for t in graph.initializer)
        dense.update(t.values.name for t in graph.sparse_initializer)
        declared = Counter(v.name for v in graph.input)
        twice = [name for counts in (dense, declared) for name, n in counts.items() if n > 1]
        if twice:
            self.problems.append(f"initialisers or graph inputs {twice} appear twice")
        outputs = [v.name for v in graph.output]
        if "" in declared or "" in dense or "" in outputs:
            where = f"graph {graph.name!r}" if graph.name else "a graph"
            self.problems.append(f"{where} has an input, output or initialiser without a name")
        return self.body({*dense, *declared}, graph.node, outputs, "graph outputs", *outer)

    def function(self, function: onnx.FunctionProto, where: str) -> None:
        """Check the body of a function of the model."""
        twice = [name for name, n in Counter(function.input).items() if n > 1]
        if twice:
            self.problems.append(f"{where}: inputs {twice} appear twice")
        what = f"{where}: outputs"
        self.body(set(function.input), function.node, function.output, what)

    def body(
        self,
        own: set[str],
        nodes: Sequence[onnx.NodeProto],
        outputs: Iterable[str],
        what: str,
        *outer: Set[str],
    ) -> set[str]:
        """Check nodes in order; ``own`` are the values there are at the start, ``what`` outputs."""
        captured: set[str] = set()
        awaited: set[str] = set()  # what was read too early, and may still be made
        disorder: _Disorder | None = None
        for node in nodes:
            reads = {name for name in node.input if name}
            for inner in subgraphs(node):
                reads |= self.graph(inner, *outer, own)
            captured |= reads - own
            missing = _outside(reads - own, outer)
            if missing:
                disorder = disorder or _Disorder(nodes)
                self.problems.append(f"node {label(node)!r} {disorder.misses(missing, node)}")
                own |= missing  # said once
                awaited |= missing
                captured -= missing
            made = Counter(name for name in node.output if name)
            again = [name for name, n in made.items() if n > 1 or name in own or name in captured]
            if again := [name for name in again if name not in awaited]:
                self.problems.append(f"node {label(node)!r} produces {again}, which already exists")
            own.update(made)
            awaited -= {*made}
        captured |= {name for name in outputs if name} - own
        if missing := _outside(captured, outer):
            self.problems.append(f"{what} {sorted(missing)} are produced by no node")
        return captured - missing


def _outside(names: set[str], scopes: Sequence[Set[str]]) -> set[str]:
    """Return the names in none of ``scopes``, each of which may be far larger than ``names``."""
    return {name for name in names if not any(name in scope for scope in scopes)}


class _Disorder:
    """Finds out how nodes come to read what is not there yet."""

    def __init__(self, nodes: Sequence[onnx.NodeProto]) -> None:
        self._nodes = nodes
        self._cyclic = _on_cycles(nodes)
        self._makers: dict[str, list[int]] = {}
        for i, node in enumerate(nodes):
            for name in node.output:
                self._makers.setdefault(name, []).append(i)

    def misses(self, missing: set[str], node: onnx.NodeProto) -> str:
        """Say how ``node`` comes to read the ``missing`` values."""
        names = sorted(missing)
        behind = sorted({i for name in missing for i in self._makers.get(name, ())})
        makers = [label(self._nodes[i]) for i in behind]
        if not makers:
            return f"reads {names}, which nothing before it produces"
        if self._cyclic & {*node.output}:
            return f"reads {names}, and what makes them needs its own output: a cycle with {makers}"
        return f"reads {names}, which only {makers} behind it produce; sort the nodes"


def _on_cycles(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    """Return the outputs of the nodes that wait for each other."""
    waiting = {i: {name for name in _reads(node) if name} for i, node in enumerate(nodes)}
    makers = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    users: dict[int, list[int]] = {}
    needs = {}
    for i, names in waiting.items():
        sources = {makers[name] for name in names if name in makers}
        needs[i] = len(sources)
        for source in sources:
            users.setdefault(source, []).append(i)
    ready = [i for i, count in needs.items() if count == 0]
    while ready:
        for user in users.get(ready.pop(), ()):
            needs[user] -= 1
            if needs[user] == 0:
                ready.append(user)
    return {name for i, count in needs.items() if count for name in nodes[i].output}


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for inner in subgraphs(node):
        for nested in inner.node:
            yield from _reads(nested)
        yield from (v.name for v in inner.output)
