"""Which activations later nodes still read, behind each node of the main graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from qwrap.graph.index import read_values
from qwrap.model.border import makes
from qwrap.model.layout import Layout
from qwrap.ops.traits import PASS_THROUGH


@dataclass(frozen=True, slots=True)
class Step:
    """One node, in the order in which they run, and what is there behind it.

    An activation here is a value that depends on a weight, a stored float matrix or more. Others,
    such as masks and shapes, are cheap to compute again from graph inputs or activations; who reads
    them reads, in effect, what they are made of.

    Attributes:
        node: of the main graph.
        made: the activations that it makes.
        needs: the activations that it is computed from; none for a node that makes none.
        alive: the activations, made up to here, that later nodes need.
        has_weight: whether it reads a weight.
        moves: whether it only moves values.
    """

    node: ir.Node
    made: tuple[str, ...]
    needs: frozenset[str]
    alive: frozenset[str]
    has_weight: bool
    moves: bool


def steps(layout: Layout) -> list[Step]:
    """Return a step for every node of the main graph that runs."""
    flows = list(_flows(layout))
    last = {key: i for i, flow in enumerate(flows) for key in flow.needs}
    alive: set[str] = set()
    result = []
    for i, flow in enumerate(flows):
        alive = {key for key in (*alive, *flow.made) if last.get(key, -1) > i}
        moves = not flow.node.domain and flow.node.op_type in PASS_THROUGH
        result.append(
            Step(flow.node, flow.made, flow.needs, frozenset(alive), flow.has_weight, moves)
        )
    return result


@dataclass(frozen=True, slots=True)
class _Flow:
    node: ir.Node
    made: tuple[str, ...]
    needs: frozenset[str]
    has_weight: bool


def _flows(layout: Layout) -> Iterator[_Flow]:
    sources: dict[str, frozenset[str]] = {}  # of every value seen so far, an activation its own
    for node in layout.region.nodes():
        read = [layout.graph.key(value) for value in read_values(node)]
        has_weight = any(is_weight(layout, key) for key in read)
        needs = frozenset[str]().union(*(sources.get(key, frozenset()) for key in read))
        outputs = list(makes(node, layout))
        made = [key for key in outputs if key not in layout.values.hosts]
        if not (has_weight or _reads_any(read, sources)):
            made = []
        sources.update((key, frozenset((key,)) if key in made else needs) for key in outputs)
        yield _Flow(node, tuple(made), needs if made else frozenset(), has_weight)


def _reads_any(read: Iterable[str], sources: dict[str, frozenset[str]]) -> bool:
    """Whether a node reads an activation itself."""
    return any(key in sources.get(key, ()) for key in read)


def is_weight(layout: Layout, key: str) -> bool:
    """Whether a value is a stored matrix or more, of a float type."""
    kind = layout.graph.types.get(key)
    is_matrix = kind is not None and kind.is_float and (kind.rank or 0) > 1
    return is_matrix and key in layout.slots


def may_be_float(layout: Layout, key: str) -> bool:
    """Whether a value may be a float tensor; shape inference does not know all."""
    kind = layout.graph.types.get(key)
    is_other = kind is not None and kind.dtype is not None and not kind.is_float
    return not is_other and key not in layout.values.hosts
