"""The first and last layers of a graph, and the tensors in front of and behind all layers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import onnx_ir as ir

from qwrap.config import QuantSpec
from qwrap.dtypes import FLOAT8E4M3FN, INT8, UINT8
from qwrap.quant.placement.eligibility import Eligibility
from qwrap.quant.placement.paths import Paths

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
    paths = Paths(facts.nodes)
    behind, ahead = paths.behind(layers), paths.ahead_of(layers)
    first = {node for node in facts.nodes if node not in behind}
    last = {node for node in facts.nodes if node not in ahead}
    known = frozenset(layers)
    return Outer(known & (first | last), frozenset((first - known) | last))


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
