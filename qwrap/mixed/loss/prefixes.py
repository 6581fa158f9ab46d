"""Float prefixes of a model, run once for all trials that change nothing in them.

A cut is a place in the order of the nodes. What crosses it in a float run is kept for some batches;
then the nodes in front of it return what was kept, and only those behind it are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from qwrap.mixed.loss.carriers import Carrier, NodeSwitch, Place
from qwrap.model.border import makes, reads
from qwrap.model.layout import Layout
from qwrap.model.points import OutputPoint, Program, UsePoint
from qwrap.model.values import is_flow

MOST = 8  # cuts: with more of them less is saved by each
WORTH = 4  # trials to a cut at least: it costs a float run and new code

Kept = dict[str, Any]
"""Tensor -> its value in the float model, on one batch."""


class Prefixes:
    """Where a model can be cut, and what crosses the cuts.

    Args:
        carrier: calibrated copy of the model.
    """

    def __init__(self, carrier: Carrier) -> None:
        self._carrier, self._layout = carrier, carrier.model.layout
        self.nodes = [self._layout.graph.node_key(n) for n in self._layout.region.nodes()]
        self._index = {key: i for i, key in enumerate(self.nodes)}
        self._made, self._first, self._last = _lives(self._layout)
        flows = (i for i, n in enumerate(self._layout.region.nodes()) if is_flow(n))
        self._end = next(flows, len(self.nodes))  # what runs graphs of its own cannot be left out

    def start(self, points: Iterable[Place]) -> int:
        """Return the first node that runs differently when the stubs at ``points`` quantize."""
        starts = [self._start(point) for point in points]
        return min([self._end, *starts])

    def _start(self, point: Place) -> int:
        if isinstance(point, OutputPoint):
            return len(self.nodes)
        if isinstance(point, (UsePoint, NodeSwitch)):
            return self._index.get(point.node, 0)
        return self._first.get(point.value, 0)

    def crossing(self, cut: int) -> list[str]:
        """Return the tensors made in front of ``cut`` that are read behind it."""
        return [key for key, i in self._made.items() if i < cut <= self._last.get(key, -1)]

    @contextmanager
    def keeping(self, cuts: Iterable[int], kept: Kept) -> Iterator[None]:
        """Let float runs put what crosses ``cuts`` into ``kept``, inside the ``with`` block."""
        wanted = {key for cut in cuts for key in self.crossing(cut)}
        watchers = {key: _Keeper(key, kept) for key in wanted}
        with self._carrier.model.watching(watchers):
            yield

    @contextmanager
    def skipping(self, cut: int, kept: Kept) -> Iterator[None]:
        """Let the nodes in front of ``cut`` return what is in ``kept``, inside the block."""
        if not cut:
            yield
            return
        model = self._carrier.model
        skipped: dict[str, Callable[..., Any]] = {}
        for node in list(self._layout.region.nodes())[:cut]:
            keys = tuple(self._layout.graph.key(v) if v.name else None for v in node.outputs)
            skipped[self._layout.graph.node_key(node)] = _Skipped(keys, kept)
        current = model.program
        kernels = {**current.kernels, **skipped}
        with model.running(Program(current.taps, kernels, current.watchers)):
            yield


class _Keeper:
    """Watches a tensor of a float run."""

    def __init__(self, key: str, kept: Kept) -> None:
        self._key, self._kept = key, kept

    def __call__(self, x: Any) -> None:
        self._kept[self._key] = x


class _Skipped:
    """Stands in for a node; of what nobody will read it returns nothing."""

    def __init__(self, keys: tuple[str | None, ...], kept: Kept) -> None:
        self._keys, self._kept = keys, kept

    def __call__(self, *_inputs: Any) -> Any:
        values = [None if key is None else self._kept.get(key) for key in self._keys]
        return values[0] if len(values) == 1 else values


def _lives(layout: Layout) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Return for each tensor the node that makes it, the first that reads it, and the last.

    What shapes are read off is needed for as long as there are nodes, for those in front of a cut
    that compute with shapes are not left out. Graph outputs are needed at the end.
    """
    made: dict[str, int] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    nodes = list(layout.region.nodes())
    end = len(nodes)
    hosts = layout.values.hosts
    for i, node in enumerate(nodes):
        computes_shapes = all(key in hosts for key in makes(node, layout))
        for key in reads(node, layout):
            first.setdefault(key, i)
            last[key] = end if computes_shapes else max(i, last.get(key, 0))
        if not computes_shapes:
            made.update((key, i) for key in makes(node, layout) if key not in hosts)
    for value in layout.graph.outputs:
        key = layout.graph.key(value)
        first.setdefault(key, end)
        last[key] = end
    return made, first, last


def choose_cuts(starts: Sequence[int]) -> list[int]:
    """Return where to cut, 0 among it, given the first node that each trial changes."""
    ordered = sorted(starts)
    number = min(MOST, len(ordered) // WORTH)
    picked = {ordered[j * len(ordered) // number] for j in range(1, number)} if number else set()
    return sorted({0, *picked})


def bytes_of(values: Iterable[Any]) -> int:
    """Return how much memory values take."""
    return sum(x.nbytes for x in values if isinstance(x, Tensor))
