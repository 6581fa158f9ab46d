"""How the codes of one cache get from input to output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from qwrap.kv_cache.detect import Pair
from qwrap.kv_cache.grids import Grids, Lie
from qwrap.kv_cache.route import Route

Form = Literal["codes", "requantized", "operator"]

_OF_ONE_SHAPE = ("ScatterElements", "Where")


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """One cache and the form in which its codes travel.

    Attributes:
        pair: the cache.
        form: ``"codes"``: codes of what is new are put beside those of the past;
            ``"requantized"``: what the graph makes of the float values of the past becomes codes
            again, the same ones for what it left as it was; ``"operator"``: an operator reads and
            writes codes itself.
        axes: of the cache: those along which scales differ, and then the one along which codes of
            4 bits are packed.
        scaled: how many of them have scales.
        lies: where they are in each value that is codes or becomes codes.
        written: the float values that become codes.
    """

    pair: Pair
    form: Form
    axes: tuple[int, ...]
    scaled: int
    lies: dict[ir.Value, Lie]
    written: tuple[ir.Value, ...]

    @property
    def route(self) -> Route:
        """The nodes that move codes."""
        assert self.pair.route is not None
        return self.pair.route


def native_way(pair: Pair, scaled: Sequence[int]) -> Way:
    """Return the way of a cache whose codes an operator reads and writes."""
    assert pair.present is not None
    axes = (*scaled, *(a for a in pair.layout.channels if a not in scaled))
    lies = {value: Lie(pair.layout.rank, axes) for value in pair.values}
    return Way(pair, "operator", axes, len(scaled), lies, (pair.present,))


def way_of(pair: Pair, grids: Grids, scaled: Sequence[int], packed: int | None) -> Way:
    """Return how the codes of a cache travel: as codes if they can.

    Args:
        pair: the cache.
        grids: of the graph.
        scaled: axes along which scales differ.
        packed: the axis along which two codes share a byte, if they do.
    """
    axes = (*scaled, *(() if packed is None or packed in scaled else (packed,)))
    rank, route = pair.layout.rank, pair.route
    # Indices and conditions there have the shape of the values.
    nodes = () if route is None else route.nodes
    stays = packed is None or not any(node.op_type in _OF_ONE_SHAPE for node in nodes)
    if route is not None and pair.past is not None and stays:
        lies = grids.along(route, pair.past, rank, axes)
        if lies is not None:
            written = dict.fromkeys(v for n in route.nodes for v in route.new(n))
            return Way(pair, "codes", axes, len(scaled), lies, tuple(written))
    ends = pair.values
    written_end = ends[-1:]  # the present; or a past that is only read
    lies = {value: Lie(rank, axes) for value in ends}
    return Way(pair, "requantized", axes, len(scaled), lies, tuple(written_end))
