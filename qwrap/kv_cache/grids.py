"""Scales as they lie along a tensor, and how they lie behind what moves its values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwrap.graph.constants import Constants
from qwrap.graph.index import ValueType
from qwrap.kv_cache.route import JOINS, Route

Array = npt.NDArray[Any]
TypeOf = Callable[[ir.Value], ValueType]


@dataclass(frozen=True, slots=True)
class Lie:
    """Where axes of a cache are in a tensor on its way.

    Attributes:
        rank: of the tensor; 0 if no axis matters.
        axes: of the tensor, one for each of the cache's that were asked for.
    """

    rank: int
    axes: tuple[int, ...]

    def grid(self, values: Array, sizes: Sequence[int]) -> Array:
        """Return values, one for each index of the axes, as they broadcast to the tensor.

        Args:
            values: ``[C]``, C the product of ``sizes``; or ``[1]``, which gets rank 0.
            sizes: of the first axes, in their order.
        """
        if values.size == 1:
            return values.reshape(())
        axes = self.axes[: len(sizes)]
        shape = [1] * self.rank
        for axis, size in zip(axes, sizes, strict=True):
            shape[axis] = size
        grid: Array = values.reshape(sizes).transpose(np.argsort(axes)).reshape(shape)
        return grid


class Grids:
    """Finds out where axes are in the values on a route.

    A grid has the rank of its tensor and broadcasts to it; one number has rank 0, and suits every
    tensor.

    Attributes:
        probes: shapes that values had in runs with other numbers of sequences and of tokens.
        probe: which of these runs is looked at.
    """

    def __init__(self, constants: Constants, type_of: TypeOf) -> None:
        self._constants, self._type_of = constants, type_of
        self.probes: dict[ir.Value, list[tuple[int, ...]]] = {}
        self.probe = 0

    def along(
        self, route: Route, past: ir.Value, rank: int, axes: Sequence[int]
    ) -> dict[ir.Value, Lie] | None:
        """Return where axes are in every value of ``route``, and in what is added to it.

        Args:
            route: from ``past``.
            past: the first value.
            rank: of it.
            axes: of it.

        Returns:
            None if one of the axes cannot be followed.
        """
        if not axes:
            return {value: Lie(0, ()) for value in self._with_new(route)}
        found: dict[ir.Value, Lie] = {}
        for axis in axes:
            grids, stopped = self._follow(route, past, axis, rank)
            if stopped is not None:
                return None
            for value, grid in grids.items():
                before = found.get(value, Lie(grid.ndim, ()))
                found[value] = Lie(grid.ndim, (*before.axes, int(np.argmax(grid.shape))))
        return found

    def where_stopped(self, route: Route, past: ir.Value, axis: int, rank: int) -> ir.Node | None:
        """Return the node at which scales along ``axis`` would stop, None if they travel on."""
        return self._follow(route, past, axis, rank)[1]

    def _with_new(self, route: Route) -> list[ir.Value]:
        return [*route.values, *(v for node in route.nodes for v in route.new(node))]

    def _follow(
        self, route: Route, past: ir.Value, axis: int, rank: int
    ) -> tuple[dict[ir.Value, Array], ir.Node | None]:
        """Return the grids of scales that differ along ``axis``, and where they end."""
        found = {past: np.arange(2).reshape([2 if a == axis else 1 for a in range(rank)])}
        for node in route.nodes:
            known = [found[v] for v in route.moved(node) if v in found]
            behind = self.behind(node, known[0]) if _agree(known) else None
            if behind is None or not self._suits_new(route, node, behind):
                return found, node
            same = [v for v in node.outputs if v in route.values]
            if node.op_type in JOINS or node.op_type == "If":
                same += route.new(node)
            found.update(dict.fromkeys(same, behind))
        return found, None

    def behind(self, node: ir.Node, grid: Array) -> Array | None:
        """Return the grid of what ``node`` makes of a tensor with ``grid``, None if not known."""
        if not grid.ndim:
            return grid
        rule = _RULES.get(node.op_type)
        return None if rule is None else rule(self, node, grid)

    def _suits_new(self, route: Route, node: ir.Node, grid: Array) -> bool:
        """Whether what is added at ``node`` lies as the rest does."""
        if node.op_type in ("Concat", "If"):
            return True
        return all(self._fits(value, grid) for value in route.new(node))

    def _fits(self, value: ir.Value, grid: Array) -> bool:
        shape = self._type_of(value).shape
        if shape is None or len(shape) != grid.ndim:
            return False
        # Of what is smaller than the cache there, nothing says where in it it goes.
        return all(n == 1 or have != 1 for n, have in zip(grid.shape, shape, strict=True))

    def axes(self, node: ir.Node, name: str, index: int) -> list[int] | None:
        """Return axes that are an attribute or, in later opsets, an input; None if unknown."""
        attribute = node.attributes.get(name)
        if attribute is not None:
            return [int(i) for i in attribute.as_ints()]
        array = self._constants.array(node.inputs[index]) if len(node.inputs) > index else None
        return None if array is None else [int(i) for i in array.reshape(-1)]

    def seen(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """Return the shape that a value had in the probe that is looked at, None if in none."""
        shapes = () if value is None else self.probes.get(value, ())
        return shapes[self.probe] if self.probe < len(shapes) else None

    def rank(self, value: ir.Value | None) -> int | None:
        """Return the rank of a value, None if unknown."""
        seen = self.seen(value)
        if value is None or seen is not None:
            return None if seen is None else len(seen)
        return self._type_of(value).rank


def _agree(grids: list[Array]) -> bool:
    first = grids[0]
    return all(g.shape == first.shape and bool((g == first).all()) for g in grids)


def _same(grids: Grids, node: ir.Node, grid: Array) -> Array:
    del grids, node
    return grid


def _along_axis(grids: Grids, node: ir.Node, grid: Array) -> Array | None:
    """Of what takes, adds or splits along one axis, which must have one scale."""
    del grids
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return grid if -grid.ndim <= axis < grid.ndim and grid.shape[axis] == 1 else None


def _gather(grids: Grids, node: ir.Node, grid: Array) -> Array | None:
    return _along_axis(grids, node, grid) if grids.rank(node.inputs[1]) == 1 else None


def _slice(grids: Grids, node: ir.Node, grid: Array) -> Array | None:
    axes = grids.axes(node, "axes", 3)
    if axes is None and (len(node.inputs) > 3 and node.inputs[3] is not None):
        return None
    cut = range(grid.ndim) if axes is None else axes
    return grid if all(grid.shape[a] == 1 for a in cut) else None


def _transpose(grids: Grids, node: ir.Node, grid: Array) -> Array:
    del grids
    perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
    turned: Array = grid.transpose(perm)
    return turned


def _unsqueeze(grids: Grids, node: ir.Node, grid: Array) -> Array | None:
    axes = grids.axes(node, "axes", 1)
    return None if axes is None else np.expand_dims(grid, tuple(axes))


def _squeeze(grids: Grids, node: ir.Node, grid: Array) -> Array | None:
    axes = grids.axes(node, "axes", 1)
    if axes is None or any(grid.shape[a] != 1 for a in axes):
        return None
    return grid.squeeze(tuple(axes))


def _expand(grids: Grids, node: ir.Node, grid: Array) -> Array | None:
    rank = grids.rank(node.outputs[0])
    if rank is None or rank < grid.ndim:
        return None
    return grid.reshape((1,) * (rank - grid.ndim) + grid.shape)


def _reshape(grids: Grids, node: ir.Node, grid: Array) -> Array | None:
    """Of what was seen to be reshaped: scales are, too, and then cut down to those that differ."""
    before, after = grids.seen(node.inputs[0]), grids.seen(node.outputs[0])
    if before is None or after is None:
        return None
    behind = np.broadcast_to(grid, before).reshape(after)
    for axis in range(behind.ndim):
        first = behind.take([0], axis)
        behind = first if bool((behind == first).all()) else behind
    return behind


_RULES: dict[str, Callable[[Grids, ir.Node, Array], Array | None]] = {
    "Concat": _along_axis,
    "Expand": _expand,
    "Gather": _gather,
    "Identity": _same,
    "If": _same,
    "Reshape": _reshape,
    "ScatterElements": _same,
    "Slice": _slice,
    "Split": _along_axis,
    "Squeeze": _squeeze,
    "TensorScatter": _same,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _same,
}
