"""Scales of a cache moved past the matrix product that reads it, to where there is less to scale.

A scale for each channel does not depend on the token: that of keys can be multiplied with the
queries, that of values with what attention makes of them, instead of with every token of the past.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import Constants
from qwrap.graph.nodes import STANDARD
from qwrap.kv_cache.codes import Chain
from qwrap.kv_cache.grids import Array, Grids

_SHAPED = ("Expand", "Reshape")
_KEPT = frozenset({"Expand", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """What to multiply instead of an operand of a product.

    Attributes:
        product: MatMul node.
        operand: input to multiply; None for the output.
        grid: what with, as it broadcasts to that.
    """

    product: ir.Node
    operand: int | None
    grid: Array


def _equal(first: Factor, second: Factor) -> bool:
    same = first.product is second.product and first.operand == second.operand
    return same and np.array_equal(first.grid, second.grid)


class Folds:
    """Finds the products that a cache gets to, and moves scales past them."""

    def __init__(self, grids: Grids, constants: Constants) -> None:
        self._grids, self._constants = grids, constants

    def reached(self, values: Iterable[ir.Value]) -> list[ir.Value]:
        """Return the values whose shapes ``factors`` has to know to follow ``values``."""
        found: dict[ir.Value, None] = {}
        waiting, seen = list(values), set[ir.Value]()
        while waiting:
            value = waiting.pop()
            seen.add(value)
            for node, _ in value.uses():
                if node.domain in STANDARD and node.op_type in (*_KEPT, "Mul", "Div"):
                    if node.op_type in _SHAPED:
                        found.update(dict.fromkeys((value, node.outputs[0])))
                    waiting += [made for made in node.outputs if made not in seen]
        return list(found)

    def factors(self, uses: Iterable[tuple[ir.Node, int]], grid: Array) -> list[Factor] | None:
        """Return what to multiply if values that are used so lack a factor of ``grid``.

        Returns:
            None if some use needs the values themselves, or what there is to multiply depends on
            how many sequences or tokens there are.
        """
        uses = list(uses)
        probes = []
        for self._grids.probe in (0, 1):
            probes.append(self._factors(uses, grid))
        first, second = probes
        if first is None or second is None or not all(map(_equal, first, second)):
            return None
        return first

    def _factors(self, uses: Iterable[tuple[ir.Node, int]], grid: Array) -> list[Factor] | None:
        found: list[Factor] = []
        for node, index in uses:
            if node.domain not in STANDARD:
                return None
            factors = self._at(node, index, grid)
            if factors is None:
                return None
            found += factors
        return found

    def _at(self, node: ir.Node, index: int, grid: Array) -> list[Factor] | None:
        if node.op_type == "Shape":
            return []
        if node.op_type == "MatMul":
            factor = self._product(node, index, grid)
            return None if factor is None else [factor]
        behind = self._behind(node, index, grid)
        made = node.outputs[0]
        if behind is None or made.is_graph_output():
            return None
        return self._factors([(use.node, use.idx) for use in made.uses()], behind)

    def _behind(self, node: ir.Node, index: int, grid: Array) -> Array | None:
        if node.op_type in ("Mul", "Div"):
            other = self._constants.array(node.inputs[1 - index])
            is_factor = other is not None and other.size == 1 and other.ndim <= grid.ndim
            return grid if is_factor and (index == 0 or node.op_type == "Mul") else None
        if node.op_type not in _KEPT or index:
            return None
        return self._grids.behind(node, grid)

    def _product(self, node: ir.Node, index: int, grid: Array) -> Factor | None:
        other, output = node.inputs[1 - index], node.outputs[0]
        if other is None or (self._grids.rank(other) or 0) < 2 or output.is_graph_output():
            return None
        reduced, kept = (-2, -1) if index else (-1, -2)
        if grid.shape[reduced] == 1:
            return Factor(node, None, grid)
        if grid.shape[kept] > 1:
            return None
        return Factor(node, 1 - index, np.swapaxes(grid, -1, -2))

    def apply(self, factor: Factor, chain: Chain, real: ir.DataType) -> None:
        """Multiply, in place."""
        node, graph = factor.product, factor.product.graph
        assert isinstance(graph, ir.Graph)
        given = chain.constant("scale", factor.grid.astype(real.numpy()))
        if factor.operand is not None:
            made = chain.op("Mul", [node.inputs[factor.operand], given])
            graph.insert_before(node, chain.nodes)
            node.replace_input_with(factor.operand, made)
            return
        output = node.outputs[0]
        uses = [(use.node, use.idx) for use in output.uses()]
        made = chain.op("Mul", [output, given])
        graph.insert_after(node, chain.nodes)
        for user, index in uses:
            user.replace_input_with(index, made)
