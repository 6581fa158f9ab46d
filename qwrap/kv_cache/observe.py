"""Scales of caches from what a float run of the decoder writes to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from torch import Tensor
from tqdm.auto import tqdm

from qwrap.config import QuantSpec
from qwrap.errors import InputError, NotCalibratedError
from qwrap.graph.constants import Constants
from qwrap.graph.index import OnnxGraph
from qwrap.kv_cache.decode import Decoder
from qwrap.kv_cache.detect import Pair
from qwrap.kv_cache.fold import Folds
from qwrap.kv_cache.grids import Grids
from qwrap.kv_cache.way import Way
from qwrap.model.batches import count_batches
from qwrap.model.build import load
from qwrap.numerics import QParams, choose_qparams
from qwrap.quant.observe.observers import HistogramObserver, MinMaxObserver, Observer
from qwrap.quant.ranges.choose import choose_ranges

_FROM_EXTREMES = ("minmax", "ema")


@dataclass(frozen=True, slots=True)
class Scales:
    """The qparams of one cache.

    Attributes:
        scale: float32 ``[C]``: in order of the axes along which scales differ.
        zero_point: int32 ``[C]``.
        sizes: of the axes that matter, those of the scales first.
    """

    scale: Tensor
    zero_point: Tensor
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """How data runs through the float decoder.

    Attributes:
        batches: mappings from graph input to array; caches may be left out.
        method: how ranges are chosen, as for ``qwrap.QConfig``.
        chunk: tokens to run at a time.
        progress: whether to show a bar.
    """

    batches: Iterable[Any]
    method: str
    chunk: int | None = None
    progress: bool = True


def observe(
    graph: OnnxGraph,
    ways: Sequence[Way],
    specs: Sequence[QuantSpec],
    others: Sequence[Pair],
    grids: Grids,
    run: Run,
) -> list[Scales]:
    """Return the scales of each cache, from one pass of the data through the float decoder.

    Args:
        graph: the decoder.
        ways: its caches.
        specs: the types of their codes.
        others: caches that only have to be fed.
        grids: gets the shapes that scales pass.
        run: the data.

    Raises:
        InputError: there are no batches, or one does not fit.
        NotCalibratedError: nothing was written to a cache.
    """
    watches = [_Watch(way, run.method) for way in ways]
    model = load(graph.model).eval()
    decoder = Decoder(model, [*(way.pair for way in ways), *others], run.chunk)
    watchers: dict[str, list[Callable[[Tensor], None]]] = {}
    for watch in watches:
        for value in watch.way.written:
            add = _if(decoder, watch.adding(value), probing=False)
            watchers.setdefault(graph.key(value), []).append(add)
    reached = Folds(grids, Constants(graph.model)).reached(v for way in ways for v in way.lies)
    for value in reached:
        note = _if(decoder, _noting(decoder, grids.probes.setdefault(value, [])), probing=True)
        watchers.setdefault(graph.key(value), []).append(note)
    bar = tqdm(
        run.batches,
        "calibrate caches",
        count_batches(run.batches),
        unit="batch",
        disable=None if run.progress else True,
    )
    with bar, model.watching({key: _all(each) for key, each in watchers.items()}):
        decoder.run(bar)
    return _chosen(watches, specs, run.method)


def _if(
    decoder: Decoder, watcher: Callable[[Tensor], None], *, probing: bool
) -> Callable[[Tensor], None]:
    def call(x: Tensor) -> None:
        if decoder.is_probing == probing:
            watcher(x)

    return call


def _noting(decoder: Decoder, shapes: list[tuple[int, ...]]) -> Callable[[Tensor], None]:
    def note(x: Tensor) -> None:
        if len(shapes) < decoder.probes:  # in a loop, the first time counts
            shapes.append(tuple(x.shape))

    return note


def _all(watchers: Sequence[Callable[[Tensor], None]]) -> Callable[[Tensor], None]:
    def call(x: Tensor) -> None:
        for watcher in watchers:
            watcher(x)

    return call


class _Watch:
    """Observes what is written to one cache."""

    def __init__(self, way: Way, method: str) -> None:
        self.way, self.sizes = way, tuple[int, ...]()
        kind = MinMaxObserver if method in _FROM_EXTREMES else HistogramObserver
        self.observer: Observer = kind(way.pair.name, axis=0 if way.scaled else None)

    def adding(self, value: ir.Value) -> Callable[[Tensor], None]:
        """Return what takes in this value."""
        axes = self.way.lies[value].axes

        def add(x: Tensor) -> None:
            if not x.numel():
                return
            sizes = tuple(x.shape[a] for a in axes)
            if self.sizes not in ((), sizes):
                raise InputError(
                    f"cache {self.way.pair.name!r}: sizes {sizes} along axes {list(axes)} of its "
                    f"channels, and {self.sizes} before; they have to stay"
                )
            self.sizes = sizes
            scaled = axes[: self.way.scaled]
            others = [a for a in range(x.dim()) if a not in scaled]
            many = x.permute(*scaled, *others).flatten(0, len(scaled) - 1) if scaled else x
            self.observer.observe(many)

        return add


def _chosen(watches: Sequence[_Watch], specs: Sequence[QuantSpec], method: str) -> list[Scales]:
    for watch in watches:
        if not watch.observer.count:
            raise NotCalibratedError(
                f"cache {watch.way.pair.name!r}: no batch wrote usable values to it; give batches "
                "that do, leave it out with caches=, or give it scales with like="
            )
    ranges = choose_ranges(
        [watch.observer for watch in watches],
        specs,
        [method] * len(watches),
        [100.0] * len(watches),
    )
    found: list[QParams] = [
        choose_qparams(low, high, spec) for (low, high), spec in zip(ranges, specs, strict=True)
    ]
    return [
        Scales(q.scale, q.zero_point, watch.sizes) for q, watch in zip(found, watches, strict=True)
    ]
