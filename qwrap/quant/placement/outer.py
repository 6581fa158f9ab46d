"""The first and last layers of a graph, and the tensors in front of and behind all layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from qwrap.config import QuantSpec
from qwrap.dtypes import FLOAT8E4M3FN, INT8, UINT8
from qwrap.graph.index import bodies, walk_nodes
from qwrap.quant.placement.eligibility import Eligibility

EIGHT_BITS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Outer:
    """What ``QConfig.first_last_8bit`` keeps at 8 bits.

    Attributes:
        layers: the first ones, which no other layer is in front of on any way from a graph input,
            and the last ones, which no other is behind; with what they read.
        ends: nodes in front of all layers or behind them, and the last ones: what they write.
    """

    layers: frozenset[ir.Node]
    ends: frozenset[ir.Node]


def outer_of(facts: Eligibility, layers: Collection[ir.Node]) -> Outer:
    """Return what lies at the ends of a graph.

    On any way, not on some: else what an attention mask is multiplied into would be first in every
    block, and what writes a cache last.

    Args:
        facts: the graph.
        layers: its nodes with quantized weights.
    """
    following: dict[ir.Node, list[ir.Node]] = defaultdict(list)
    preceding: dict[ir.Node, list[ir.Node]] = defaultdict(list)
    for before, after in _edges(facts.nodes):
        following[before].append(after)
        preceding[after].append(before)
    behind, ahead = _reached(layers, following), _reached(layers, preceding)
    first = {node for node in facts.nodes if node not in behind}
    last = {node for node in facts.nodes if node not in ahead}
    known = frozenset(layers)
    return Outer(known & (first | last), frozenset((first - known) | last))


def _edges(nodes: Iterable[ir.Node]) -> Iterable[tuple[ir.Node, ir.Node]]:
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


def at_8_bits(spec: QuantSpec) -> QuantSpec:
    """Return the spec with a type of 8 bits in place of a narrower one of its kind."""
    dtype = spec.dtype
    if dtype.bits >= EIGHT_BITS:
        return spec
    if dtype.levels is not None and not dtype.codebook:
        return replace(spec, dtype=FLOAT8E4M3FN)
    wide = INT8 if dtype.signed else UINT8
    # A code book has no zero point; one of positive levels becomes all positive codes.
    symmetric = spec.symmetric if dtype.has_zero_point else wide.signed
    return replace(spec, dtype=wide, symmetric=symmetric)
