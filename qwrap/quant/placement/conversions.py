"""The type of each quantized tensor, and which of its readers get another one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations

import onnx_ir as ir

from qwrap.config import QuantSpec
from qwrap.dtypes import QuantType

Use = tuple[ir.Node, int]


@dataclass(slots=True, eq=False)
class Tree:
    """A quantized tensor, what reads it, and what it is only moved to.

    Attributes:
        value: the tensor.
        readers: inputs of quantized nodes, with what these ask for.
        movers: inputs of nodes that only move values, with what a region asks of them or None,
            and what becomes of their outputs.
        pinned: whether the user said who reads it in which type. Then ``readers`` are those that
            get it converted, and all others read it as it is.
        converted: how these get it, None for nobody.
    """

    value: ir.Value
    readers: list[tuple[Use, QuantSpec]] = field(default_factory=list)
    movers: list[tuple[Use, QuantSpec | None, list[Tree]]] = field(default_factory=list)
    pinned: bool = False
    converted: QuantSpec | None = None


@dataclass(slots=True)
class Chosen:
    """What was decided of one graph.

    Attributes:
        bases: quantized value -> its type; of moved ones, that of what moved them.
        converted: value -> type -> how it is quantized, and which inputs read it.
    """

    bases: dict[ir.Value, QuantSpec] = field(default_factory=dict)
    converted: dict[ir.Value, dict[QuantType, tuple[QuantSpec, list[Use]]]] = field(
        default_factory=dict
    )

    def received(self, value: ir.Value, node: ir.Node, index: int) -> QuantType | None:
        """Return the type that an input reads instead of the value's own, None for that one."""
        kinds = self.converted.get(value, {})
        return next((kind for kind, (_, uses) in kinds.items() if (node, index) in uses), None)


def choose_types(roots: Iterable[tuple[Tree, QuantSpec | None]]) -> Chosen:
    """Return the types with which the fewest tensors have to be converted.

    A conversion is made once for each tensor and type, however many read it. What writes a tensor
    and what computes with it have their types; what merely moves values takes any. Where two
    choices cost as many conversions, fewer bits are moved; and a tensor that nothing quantized
    writes is given the widest type, so that no reader gets less than it asks for.

    Args:
        roots: tensors that are not moved from quantized ones, with the type of what writes them,
            or that the user said; None for graph inputs and what float nodes write.
    """
    chosen = Chosen()
    for tree, written in roots:
        specs = dict[QuantType, QuantSpec]()
        _collect(tree, specs)
        if written is not None:
            specs = {written.dtype: written, **specs}  # its own wish comes first
        search = _Search(specs)
        if written is not None:
            base = written.dtype
        else:
            base = min(specs, key=lambda kind: (search.cost(tree, kind)[0], -kind.bits))
        search.assign(tree, base, chosen)
    return chosen


def _collect(tree: Tree, specs: dict[QuantType, QuantSpec]) -> None:
    if tree.converted is not None:
        specs.setdefault(tree.converted.dtype, tree.converted)
    for _, spec in tree.readers:
        specs.setdefault(spec.dtype, spec)
    for _, asked, outputs in tree.movers:
        if asked is not None:
            specs.setdefault(asked.dtype, asked)
        for output in outputs:
            _collect(output, specs)


def _widest(tree: Tree) -> int:
    """Return the most bits that something behind a tensor asks for."""
    asked = [spec.dtype.bits for _, spec in tree.readers]
    asked += [spec.dtype.bits for _, spec, _ in tree.movers if spec is not None]
    asked += [_widest(out) for _, spec, outs in tree.movers if spec is None for out in outs]
    return max(asked, default=0)


Cost = tuple[int, int]
"""Conversions, and bits that are moved."""


class _Search:
    """Dynamic programming from the leaves of a tree to its root.

    For each type that a tensor may have, every set of types it is converted to is tried: there
    are few types in one tree.
    """

    def __init__(self, specs: dict[QuantType, QuantSpec]) -> None:
        self._specs = specs
        self._known: dict[tuple[int, QuantType], tuple[Cost, tuple[QuantType, ...]]] = {}

    def cost(self, tree: Tree, base: QuantType) -> Cost:
        """Return the least cost of what is below a tensor of type ``base``."""
        return self._best(tree, base)[0]

    def _best(self, tree: Tree, base: QuantType) -> tuple[Cost, tuple[QuantType, ...]]:
        key = id(tree), base
        if key not in self._known:
            asked = [spec.dtype for _, spec in tree.readers]
            asked += [spec.dtype for _, spec, _ in tree.movers if spec is not None]
            asked += [tree.converted.dtype] if tree.converted is not None else []
            needed = [kind for kind in dict.fromkeys(asked) if kind != base]
            free = [kind for kind in self._specs if kind != base and kind not in needed]
            free = [] if tree.pinned else free
            sets = (
                (*needed, *more)
                for count in range(min(len(free), len(tree.movers)) + 1)
                for more in combinations(free, count)
            )
            found = [(self._below(tree, (base, *kinds), len(kinds)), kinds) for kinds in sets]
            self._known[key] = min(found, key=lambda item: item[0])
        return self._known[key]

    def _below(self, tree: Tree, kinds: tuple[QuantType, ...], conversions: int) -> Cost:
        total, bits = conversions, 0
        for _, asked, outputs in tree.movers:
            kind = self._moved(asked, outputs, kinds[:1] if tree.pinned else kinds)
            costs = [self.cost(output, kind) for output in outputs]
            total += sum(cost[0] for cost in costs)
            bits += kind.bits + sum(cost[1] for cost in costs)
        return total, bits

    def _moved(
        self, asked: QuantSpec | None, outputs: list[Tree], kinds: tuple[QuantType, ...]
    ) -> QuantType:
        """Return in which of the types at hand, the tensor's first, values are moved.

        They lose no bit on the way that the tensor has and a reader asks for.
        """
        if asked is not None:
            return asked.dtype
        enough = min(kinds[0].bits, max(map(_widest, outputs)))

        def cost(kind: QuantType) -> Cost:
            costs = [self.cost(output, kind) for output in outputs]
            return sum(c[0] for c in costs), kind.bits + sum(c[1] for c in costs)

        return min((kind for kind in kinds if kind.bits >= enough), key=cost)

    def assign(self, tree: Tree, base: QuantType, chosen: Chosen) -> None:
        """Write what is best for a tensor of type ``base`` into ``chosen``, in place."""
        chosen.bases[tree.value] = self._specs[base]
        kinds = base, *self._best(tree, base)[1]
        uses: dict[QuantType, list[Use]] = {}
        if tree.converted is not None:
            uses[tree.converted.dtype] = []
        for use, spec in tree.readers:
            uses.setdefault(spec.dtype, []).append(use)
        for use, asked, outputs in tree.movers:
            kind = self._moved(asked, outputs, kinds[:1] if tree.pinned else kinds)
            uses.setdefault(kind, []).append(use)
            for output in outputs:
                self.assign(output, kind, chosen)
        uses.pop(base, None)
        if uses:
            chosen.converted[tree.value] = {
                kind: (self._specs[kind], found) for kind, found in uses.items()
            }
