"""Which nodes form a Block: the scopes of node names, as far as each can run in one piece."""

from __future__ import annotations

import ast
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import onnx_ir as ir
from torch import nn

from qwrap.graph.index import bodies, walk_nodes
from qwrap.model.values import Values

Path = tuple[str, ...]
DYNAMO_SCOPES = "pkg.torch.onnx.name_scopes"  # written by torch.onnx.export(dynamo=True)


@dataclass(slots=True)
class Region:
    """Nodes and inner regions in the order in which they run; one region becomes one Block."""

    path: Path
    items: list[ir.Node | Region] = field(default_factory=list)

    def nodes(self) -> Iterator[ir.Node]:
        """Yield the nodes of this region and of those inside it, not those of If bodies."""
        for item in self.items:
            if isinstance(item, Region):
                yield from item.nodes()
            else:
                yield item


def plan_regions(values: Values) -> Region:
    """Return the root region of the main graph, every node in it exactly once."""
    graph = values.graph.model.graph
    nodes = list(values.live_nodes(graph))
    scopes = with_inferred({node: scope_of(node, values) for node in nodes})
    order = {node: i for i, node in enumerate(nodes)}
    return _plan((), nodes, scopes, order)


def scope_of(node: ir.Node, values: Values) -> Path | None:
    """Return the module path that a node's name, metadata or parameters tell, None if none do."""
    listed = node.metadata_props.get(DYNAMO_SCOPES)
    name = node.name or ""
    if listed is not None:
        return _owner_beside(attribute_path(_dynamo_scope(listed)), node, values)
    if "/" in name:
        return attribute_path(_strip_parents(name.strip("/").split("/")[:-1]))
    return next((path for path, _ in _owners(node, values)), None)


def _owner_beside(told: Path, node: ir.Node, values: Values) -> Path:
    """Return ``told``, or the module beside it that owns what only ``node`` uses.

    The exporter calls a convolution that took in the normalisation after it by the latter's name.
    """
    for path, value in _owners(node, values):
        if told and path[:-1] == told[:-1] and len(value.consumers()) == 1:
            return path
    return told


def _owners(node: ir.Node, values: Values) -> Iterator[tuple[Path, ir.Value]]:
    """Yield each stored input with a dotted name, behind the module that the name tells."""
    for value in node.inputs:
        name = "" if value is None else value.name or ""
        owner = name.rpartition(".")[0]
        if value is None or not owner or "/" in owner or ":" in owner:
            continue
        if values.graph.key(value) in values.stored:
            yield attribute_path(owner.split(".")), value


def with_inferred(told: Mapping[ir.Node, Path | None]) -> dict[ir.Node, Path]:
    """Return the scopes with one for each node that tells none: where its surroundings are.

    Exporters' rewrites leave nodes without a scope in the middle of a layer, which could then not
    run in one piece. Such a node belongs to every scope that lies both before and after it.

    Args:
        told: node -> its scope or None, in an order in which the nodes can run.
    """
    before = _nearest_told(told, _producers)
    after = _nearest_told(dict(reversed(list(told.items()))), _consumers)
    common = cache(_common)  # whole chains of nodes have the same scopes before and after them
    return {
        node: common(before[node], after[node]) if scope is None else scope
        for node, scope in told.items()
    }


def _nearest_told(
    told: Mapping[ir.Node, Path | None], neighbours: Callable[[ir.Node], Iterator[ir.Node]]
) -> dict[ir.Node, frozenset[Path]]:
    """Return for each node without a scope the first scopes met on all ways through its like."""
    found: dict[ir.Node, frozenset[Path]] = {}
    for node, scope in told.items():
        if scope is None:
            met: frozenset[Path] = frozenset()
            for near in neighbours(node):
                near_scope = told.get(near)
                known = found.get(near, met) if near_scope is None else frozenset((near_scope,))
                met = known if met <= known else met if known <= met else met | known
            found[node] = met  # where nothing is new, the very set of a neighbour
    return found


def _common(before: frozenset[Path], after: frozenset[Path]) -> Path:
    path: Path = ()
    while True:
        depth = len(path)
        sides = [
            {p[depth] for p in side if len(p) > depth and p[:depth] == path}
            for side in (before, after)
        ]
        shared = sides[0] & sides[1]
        if len(shared) != 1:
            return path
        path = (*path, *shared)


def _consumers(node: ir.Node) -> Iterator[ir.Node]:
    for value in node.outputs:
        yield from value.consumers()


def _dynamo_scope(listed: str) -> list[str]:
    try:
        names = ast.literal_eval(listed)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return []
    if not isinstance(names, list):
        return []
    known = (name for name in names[:-1] if isinstance(name, str) and name)
    scopes = [name for name in known if not name.startswith("_empty_nn_module_stack")]
    return scopes[-1].split(".") if scopes else []


def _strip_parents(parts: Sequence[str]) -> list[str]:
    """Turn TorchScript's ``layer1/layer1.0`` into ``layer1, 0``."""
    path: list[str] = []
    for part in parts:
        for depth in range(len(path) if "." in part else 0, 0, -1):
            prefix = ".".join(path[-depth:]) + "."
            if part.startswith(prefix):
                path.extend(part.removeprefix(prefix).split("."))
                break
        else:
            path.extend(part.split("."))
    return path


def attribute_path(parts: Sequence[str]) -> Path:
    """Return the parts as names a module may have, the deepest ones left out."""
    return tuple(_attribute(part) for part in parts if part)[:DEEPEST]


def _attribute(part: str) -> str:
    part = part.replace(".", "_")
    return f"{part}_" if part in RESERVED or part.startswith("_constant_") else part


DEEPEST = 32  # modules in modules; torch walks them recursively
RESERVED = frozenset((
    *dir(nn.Module()),
    *("_compile", "_file", "_run", "namespace", "path", "set_code", "source"),  # of Block
    *("taps", "substitutes"),
    *("attach", "attached", "before_loading", "config", "graph", "input_names", "layout"),
    *("assign", "become", "deployed", "kernels", "origin", "put_substitutes", "remade"),
    *("loaded_opset", "output_names", "plan", "replaced", "substitute", "quantization", "samples"),
    *("program", "programs", "rewrite", "running", "stored", "tap", "tensor_names", "watching"),
    *(
        "_add_blocks",
        "_bind",
        "_build",
        "_computed",
        "_detach",
        "_fitting",
        "_device",
        "_generate",
        "_get",
        "_written",
    ),
    *("_module_at", "_program", "_signature"),
))


def _plan(
    path: Path, nodes: list[ir.Node], scopes: dict[ir.Node, Path], order: dict[ir.Node, int]
) -> Region:
    """Group ``nodes`` by the next part of their scope; inline the groups that cannot be called."""
    groups = _group(path, nodes, scopes)
    while True:
        owner = {node: i for i, group in enumerate(groups) for node in group.nodes}
        edges = _edges(groups, owner)
        ranks = [min(order[node] for node in group.nodes) for group in groups]
        sequence = _topological(edges, ranks)
        if len(sequence) == len(groups):
            break
        stuck = _on_cycles(edges, sequence)
        groups = [
            part
            for i, group in enumerate(groups)
            for part in (
                _group(group.path, group.nodes, scopes) if i in stuck and group.path else [group]
            )
        ]
    items: list[ir.Node | Region] = []
    for i in sequence:
        group = groups[i]
        items.append(
            group.nodes[0] if group.path is None else _plan(group.path, group.nodes, scopes, order)
        )
    return Region(path, items)


@dataclass(slots=True)
class _Group:
    """Nodes below one path, or (path None) a single node."""

    path: Path | None
    nodes: list[ir.Node]


def _group(path: Path | None, nodes: list[ir.Node], scopes: dict[ir.Node, Path]) -> list[_Group]:
    assert path is not None
    groups: dict[Path, _Group] = {}
    result: list[_Group] = []
    for node in nodes:
        scope = scopes[node]
        if len(scope) <= len(path) or scope[: len(path)] != path:
            result.append(_Group(None, [node]))
            continue
        child = scope[: len(path) + 1]
        if child not in groups:
            groups[child] = _Group(child, [])
            result.append(groups[child])
        groups[child].nodes.append(node)
    return result


def _edges(groups: list[_Group], owner: dict[ir.Node, int]) -> list[set[int]]:
    edges: list[set[int]] = [set() for _ in groups]
    for i, group in enumerate(groups):
        for node in group.nodes:
            for source in _producers(node):
                j = owner.get(source)
                if j is not None and j != i:
                    edges[j].add(i)
    return edges


def _on_cycles(edges: list[set[int]], sorted_forwards: list[int]) -> set[int]:
    """Return what neither has all its producers before it nor all its consumers after it."""
    backwards: list[set[int]] = [set() for _ in edges]
    for i, targets in enumerate(edges):
        for target in targets:
            backwards[target].add(i)
    sorted_backwards = _topological(backwards, list(range(len(edges))))
    return set(range(len(edges))) - set(sorted_forwards) - set(sorted_backwards)


def _producers(node: ir.Node) -> Iterator[ir.Node]:
    readers = [node]
    for _, body in bodies(node):
        readers.extend(walk_nodes(body))
    for reader in readers:
        for value in reader.inputs:
            producer = None if value is None else value.producer()
            if producer is not None:
                yield producer


def _topological(edges: list[set[int]], ranks: list[int]) -> list[int]:
    """Return indices in dependency order, earliest rank first; those on cycles are missing."""
    waiting = [0] * len(edges)
    for targets in edges:
        for target in targets:
            waiting[target] += 1
    ready = [(ranks[i], i) for i, count in enumerate(waiting) if count == 0]
    heapq.heapify(ready)
    done = []
    while ready:
        _, i = heapq.heappop(ready)
        done.append(i)
        for target in edges[i]:
            waiting[target] -= 1
            if waiting[target] == 0:
                heapq.heappush(ready, (ranks[target], target))
    return done
