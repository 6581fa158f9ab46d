"""The range of every observed tensor, by the method asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qwrap.config import METHODS, QuantSpec
from qwrap.errors import ConfigError
from qwrap.quant.observe.observers import HistogramObserver, Observer
from qwrap.quant.ranges.distribution import distribution_range
from qwrap.quant.ranges.entropy import entropy_range
from qwrap.quant.ranges.errors import least_error_range
from qwrap.quant.ranges.percentile import percentile_range
from qwrap.quant.ranges.rows import HistogramRows
from qwrap.quant.ranges.scaling import RowScaling

Range = tuple[Tensor, Tensor]
"""Low and high, float32 ``[C]`` on the CPU, one for each channel or one for the tensor."""

_CHUNK = 32  # rows searched at once, so that temporaries stay in the cache


class Request(NamedTuple):
    """A method, with the share of values that ``"percentile"`` keeps, and the margin of others."""

    method: str
    percentile: float = 100.0
    margin: float = 0.0

    @property
    def needs_histogram(self) -> bool:
        """Whether the extremes and their averages do not tell."""
        exact = self.method == "percentile" and self.percentile == 100
        return not exact and self.method not in ("minmax", "ema")


def choose_ranges(
    observers: Sequence[Observer],
    specs: Sequence[QuantSpec],
    methods: Sequence[str],
    percentiles: Sequence[float],
    margin: float = 0.0,
) -> list[Range]:
    """Return the range of every observed tensor, or of each of its channels.

    All methods but ``"distribution"`` stay within what was seen. What a tensor gets does not
    depend on the others.

    Args:
        observers: one for each of N tensors; of other methods than ``"minmax"`` and ``"ema"``,
            histograms.
        specs: how each will be quantized.
        methods: for each, ``"minmax"``, the extremes; ``"ema"``, the moving averages of those of
            each batch; ``"percentile"``, which leaves out the rarest values; ``"mse"``, ``"l1"``
            or ``"cosine"``, the least error on the histogram; ``"entropy"``, the least loss of
            information; or ``"distribution"``, from mean and standard deviation.
        percentiles: for each, the share of the values that ``"percentile"`` keeps, in percent; 100
            keeps the exact extremes.
        margin: error beyond the least, as a share of it, that ``"mse"``, ``"l1"`` and ``"cosine"``
            accept for a wider range.

    Raises:
        NotCalibratedError: an observer saw no value.
        ConfigError: a method is unknown, needs a histogram that is not there, or a percentile is
            not above 50 and at most 100.
    """
    wanted = [(Request(*each, margin),) for each in zip(methods, percentiles, strict=True)]
    return [found[0] for found in _ranges(observers, specs, wanted)]


def candidate_ranges(
    observers: Sequence[Observer],
    specs: Sequence[QuantSpec],
    percentiles: Sequence[float],
    methods: Sequence[str] = METHODS,
    margin: float = 0.0,
) -> list[dict[str, Range]]:
    """Return the ranges that several methods choose, method -> range for every tensor.

    Every histogram is read once. Methods that an observer has no histogram for are left out.

    Args:
        observers: one for each of N tensors.
        specs: how each will be quantized.
        percentiles: for each, the share of the values that ``"percentile"`` keeps, in percent.
        methods: as in ``choose_ranges``.
        margin: as in ``choose_ranges``.

    Raises:
        NotCalibratedError: an observer saw no value.
        ConfigError: a method is unknown, or a percentile is not above 50 and at most 100.
    """
    wanted = []
    for observer, percentile in zip(observers, percentiles, strict=True):
        requests = (Request(method, percentile, margin) for method in methods)
        whole = isinstance(observer, HistogramObserver)
        wanted.append(tuple(r for r in requests if whole or not r.needs_histogram))
    found = _ranges(observers, specs, wanted)
    return [
        {request.method: ends for request, ends in zip(requests, ranges, strict=True)}
        for requests, ranges in zip(wanted, found, strict=True)
    ]


class _Group(NamedTuple):
    """What tensors have in common that are searched together."""

    spec: QuantSpec
    bins: int
    requests: tuple[Request, ...]
    tensor: int | None  # where the rows of one tensor depend on each other


def _ranges(
    observers: Sequence[Observer],
    specs: Sequence[QuantSpec],
    wanted: Sequence[tuple[Request, ...]],
) -> list[list[Range]]:
    """Return the ranges of each tensor, in the order of what is wanted of it."""
    for observer, requests in zip(observers, wanted, strict=True):
        for request in requests:
            _check(observer, request)
    extremes = [(o.low.cpu(), o.high.cpu()) for o in observers]
    found: list[list[Range]] = []
    groups: dict[_Group, list[int]] = defaultdict(list)
    for index, (observer, spec, requests) in enumerate(zip(observers, specs, wanted, strict=True)):
        found.append([_known(observer, extremes[index], request) for request in requests])
        searched = tuple(request for request in requests if request.needs_histogram)
        if searched:
            groups[_group(observer, spec, searched, index)].append(index)
    for group, members in groups.items():
        for chunk in _chunks([(i, extremes[i][0].numel()) for i in members]):
            for request, ends in _search(observers, extremes, group, chunk):
                _scatter(ends, [(found[i][wanted[i].index(request)], rows) for i, rows in chunk])
    return found


def _check(observer: Observer, request: Request) -> None:
    if request.method not in METHODS:
        raise ConfigError(f"no range method {request.method!r}; choose one of {', '.join(METHODS)}")
    if not 50 < request.percentile <= 100:
        raise ConfigError(f"percentile={request.percentile} must lie above 50 and not above 100")
    if request.needs_histogram and not isinstance(observer, HistogramObserver):
        raise ConfigError(
            f"tensor {observer.name!r}: method {request.method!r} needs a HistogramObserver; got "
            f"{type(observer).__name__}"
        )


def _known(observer: Observer, extremes: Range, request: Request) -> Range:
    """Return what the extremes or their averages tell, in memory of its own."""
    if request.method == "ema":
        return observer.ema_low.cpu().to(torch.float32), observer.ema_high.cpu().to(torch.float32)
    return extremes[0].clone(), extremes[1].clone()


def _scatter(ends: Range, targets: Sequence[tuple[Range, slice]]) -> None:
    """Write the rows of a chunk to the tensors that they belong to, in place."""
    start = 0
    for target, rows in targets:
        stop = start + rows.stop - rows.start
        for whole, end in zip(target, ends, strict=True):
            whole[rows] = end[start:stop]
        start = stop


def _group(
    observer: Observer, spec: QuantSpec, requests: tuple[Request, ...], index: int
) -> _Group:
    assert isinstance(observer, HistogramObserver)
    tensor = index if spec.scale_type == "float8e4m3fn" else None
    return _Group(replace(spec, axis=None), observer.histogram.bins, requests, tensor)


def _chunks(sizes: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, slice]]]:
    """Yield the rows of tensors, given as index and number, in lists of up to ``_CHUNK`` rows."""
    chunk: list[tuple[int, slice]] = []
    room = _CHUNK
    for index, rows in sizes:
        start = 0
        while start < rows:
            stop = min(rows, start + room)
            chunk.append((index, slice(start, stop)))
            room -= stop - start
            start = stop
            if not room:
                yield chunk
                chunk, room = [], _CHUNK
    if chunk:
        yield chunk


def _search(
    observers: Sequence[Observer],
    extremes: Sequence[Range],
    group: _Group,
    chunk: Sequence[tuple[int, slice]],
) -> Iterator[tuple[Request, Range]]:
    """Yield the ranges of the rows of a chunk for every request."""
    rows = _stack(observers, extremes, chunk)
    scaling = RowScaling(group.spec)
    if group.tensor is not None:
        scaling = RowScaling.of(*extremes[group.tensor], group.spec)
    sides = list(rows.by_side())
    for request in group.requests:
        low, high = torch.empty_like(rows.low), torch.empty_like(rows.high)
        for index, side in sides:
            low[index], high[index] = _range(side, scaling, request)
        yield request, (low.to(torch.float32), high.to(torch.float32))


def _stack(
    observers: Sequence[Observer], extremes: Sequence[Range], chunk: Sequence[tuple[int, slice]]
) -> HistogramRows:
    counts, exponents = [], []
    for index, rows in chunk:
        observer = observers[index]
        assert isinstance(observer, HistogramObserver)
        assert observer.histogram.counts is not None
        assert observer.histogram.exponent is not None
        counts.append(observer.histogram.counts[rows].cpu())
        exponents.append(observer.histogram.exponent[rows].cpu())
    low, high = (torch.cat([extremes[i][end][rows] for i, rows in chunk]) for end in (0, 1))
    return HistogramRows.of(torch.cat(counts), torch.cat(exponents), low, high)


def _range(rows: HistogramRows, scaling: RowScaling, request: Request) -> tuple[Tensor, Tensor]:
    match request.method:
        case "percentile":
            return percentile_range(rows, scaling.spec, request.percentile)
        case "entropy":
            return entropy_range(rows, scaling.spec)
        case "distribution":
            return distribution_range(rows, scaling.spec)
        case "mse" | "l1" | "cosine":
            return least_error_range(rows, scaling, request.method, request.margin)
    raise AssertionError(request.method)
