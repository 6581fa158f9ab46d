"""From what observers saw, or from weights, to the range that the codes should cover."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.errors import ConfigError
from qwrap.numerics import block_extremes, choose_qparams, fake_quantize, squared_error_integral
from qwrap.quant.observers import HistogramObserver, Observer

ACTIVATION_METHODS = ("mse", "percentile", "minmax")
WEIGHT_METHODS = ("mse", "minmax")

# Ratios tried: first of the whole range, then of each end, then around the best of each end.
_COARSE = tuple(1 - 0.8 * i / 24 for i in range(25))
_ENDS = tuple(1 - 0.9 * i / 15 for i in range(16))
_FINE = (0.94, 0.96, 0.98, 1.02, 1.04, 1.06)
_WEIGHT_RATIOS = tuple(1 - i / 64 for i in range(40))
_CHUNK = 32  # tensors searched at once, so that temporaries stay in the cache
_WEIGHT_CHUNK = 2**18  # values


def choose_ranges(
    observers: Sequence[Observer],
    specs: Sequence[QuantSpec],
    method: str = "mse",
    percentile: float = 99.999,
) -> tuple[Tensor, Tensor]:
    """Return the range of every observed tensor, within what was seen.

    Args:
        observers: one for each of N tensors; for other methods than ``"minmax"``, histograms.
        specs: how each will be quantized.
        method: ``"minmax"``; ``"percentile"``, which cuts half of the rest off each side; or
            ``"mse"``, the least squared error on the histogram.
        percentile: share of the values to keep, in percent; 100 keeps the exact extremes.

    Returns:
        Two float32 ``[N]`` on the CPU, low and high.

    Raises:
        NotCalibratedError: an observer saw no value.
        ConfigError: the method is unknown or needs a histogram that is not there.
    """
    _check_method(method, ACTIVATION_METHODS)
    low = torch.tensor([float(o.low) for o in observers], dtype=torch.float64)
    high = torch.tensor([float(o.high) for o in observers], dtype=torch.float64)
    if method == "percentile" and not 50 < percentile <= 100:
        raise ConfigError(f"percentile={percentile} must lie above 50 and not above 100")
    if method != "minmax" and not (method == "percentile" and percentile == 100):
        for (spec, bins), members in _alike(observers, specs, method).items():
            for start in range(0, len(members), _CHUNK):
                chunk = members[start : start + _CHUNK]
                counts, edges = _stack([observers[i] for i in chunk], bins)
                ends = low[chunk], high[chunk]
                if method == "percentile":
                    ends = _percentiles(counts, edges, ends, percentile)
                else:
                    ends = _least_squares(counts, edges, ends, spec)
                low[chunk], high[chunk] = ends
    return low.to(torch.float32), high.to(torch.float32)


def _check_method(method: str, known: Sequence[str]) -> None:
    if method not in known:
        raise ConfigError(f"no range method {method!r}; choose one of {', '.join(known)}")


def _alike(
    observers: Sequence[Observer], specs: Sequence[QuantSpec], method: str
) -> dict[tuple[QuantSpec, int], list[int]]:
    """Return the indices of tensors with the same spec and bins, one-sided ones first."""
    groups: dict[tuple[QuantSpec, int], list[int]] = defaultdict(list)
    for index, (observer, spec) in enumerate(zip(observers, specs, strict=True)):
        if not isinstance(observer, HistogramObserver):
            raise ConfigError(
                f"tensor {observer.name!r}: method {method!r} needs a HistogramObserver; got "
                f"{type(observer).__name__}"
            )
        groups[spec, observer.histogram.bins].append(index)
    for members in groups.values():
        members.sort(key=lambda i: float(observers[i].low) < 0)
    return groups


def _stack(observers: Sequence[Observer], bins: int) -> tuple[Tensor, Tensor]:
    """Return float64 counts ``[N, 2 * bins + 1]``, zeros last, and edges of the bins."""
    counts, tops = [], []
    for observer in observers:
        assert isinstance(observer, HistogramObserver)
        assert observer.histogram.counts is not None
        assert observer.histogram.exponent is not None
        counts.append(observer.histogram.counts[0].cpu())
        tops.append(2.0 ** int(observer.histogram.exponent))
    grid = torch.arange(-bins, bins + 1, dtype=torch.float64) / bins
    edges = torch.tensor(tops, dtype=torch.float64)[:, None] * grid
    return torch.stack(counts).to(torch.float64), edges


def _percentiles(
    counts: Tensor, edges: Tensor, ends: tuple[Tensor, Tensor], percentile: float
) -> tuple[Tensor, Tensor]:
    bins = counts[:, :-1]
    below = bins.cumsum(1)
    total = below[:, -1:]
    cut = total * ((100 - percentile) / 200)
    ranks = torch.cat([cut, total - cut], 1)
    index = torch.searchsorted(below, ranks).clamp_(max=bins.shape[1] - 1)
    inside = bins.gather(1, index)
    part = 1 - (below.gather(1, index) - ranks) / inside.clamp(min=1)
    values = edges.gather(1, index) + part * (edges[:, 1:2] - edges[:, :1])
    low, high = (torch.minimum(torch.maximum(v, ends[0]), ends[1]) for v in values.unbind(1))
    return low, high


def _least_squares(
    counts: Tensor, edges: Tensor, ends: tuple[Tensor, Tensor], spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Search the ratios of both ends together, then of each; keep the least squared error."""
    low, high = ends[0].clamp(max=0), ends[1].clamp(min=0)
    cost = _histogram_cost(counts, edges, spec, one_sided=bool((low == 0).all()))
    best = [torch.ones_like(low), torch.ones_like(high)]
    least = torch.full_like(low, torch.inf)

    def attempt(shrunk_low: Tensor, shrunk_high: Tensor) -> None:
        shrunk_low, shrunk_high = shrunk_low.clamp(max=1), shrunk_high.clamp(max=1)
        error = cost(low * shrunk_low, high * shrunk_high)
        better = error < least
        least[better] = error[better]
        best[0] = torch.where(better, shrunk_low, best[0])
        best[1] = torch.where(better, shrunk_high, best[1])

    one = torch.ones_like(low)
    for ratio in _COARSE:
        attempt(one * ratio, one * ratio)
    movable = [] if spec.symmetric else [e for e, v in enumerate((low, high)) if (v != 0).any()]
    if len(movable) == 2:
        for end in movable[::-1]:
            for ratio in _ENDS:
                attempt(*(one * ratio if e == end else best[e] for e in (0, 1)))
    for moved in [[end] for end in movable[::-1]] or [[0, 1]]:
        centre = list(best)
        for ratio in _FINE:
            attempt(*(centre[e] * (ratio if e in moved else 1) for e in (0, 1)))
    return low * best[0], high * best[1]


def _histogram_cost(
    counts: Tensor, edges: Tensor, spec: QuantSpec, *, one_sided: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the squared error of a range, for values spread evenly within each bin."""
    middle = edges.shape[1] // 2
    density = counts[:, :-1].clone()
    density[:, middle] -= counts[:, -1]  # zeros have no error
    if one_sided:
        density, edges = density[:, middle:], edges[:, middle:]
    # The integral's difference over each bin times the bin's count, summed by parts.
    weight = -torch.diff(density, prepend=density[:, :1] * 0, append=density[:, :1] * 0)
    weight /= edges[:, 1:2] - edges[:, :1]

    def cost(low: Tensor, high: Tensor) -> Tensor:
        qparams = choose_qparams(low, high, spec)
        scale, zero_point = qparams.scale[:, None], qparams.zero_point[:, None]
        return (squared_error_integral(edges, scale, zero_point, spec) * weight).sum(1)

    return cost


def choose_weight_range(
    weight: Tensor, spec: QuantSpec, method: str = "mse"
) -> tuple[Tensor, Tensor]:
    """Return the range of a weight, or of each of its channels.

    A channel of zeros gets the widest range of all channels, so that its scale, and its bias's
    with it, is of the order of the others.

    Args:
        weight: floats; channels along ``spec.axis``, unless that is None.
        spec: how it will be quantized.
        method: ``"minmax"``, or ``"mse"`` for the clip ratio with the least squared error, which
            is never above that of ``"minmax"``.

    Returns:
        Two float32 ``[C]`` (``[1]`` without axis), low and high.

    Raises:
        ConfigError: the method is unknown.
        InputError: the weight holds NaN or infinity.
    """
    _check_method(method, WEIGHT_METHODS)
    flat = weight.detach().to(torch.float32)
    if spec.block_size is not None:
        low, high = block_extremes(flat, spec)
        zero = (low == 0) & (high == 0)
        return torch.where(zero, low.min(), low), torch.where(zero, high.max(), high)
    flat = flat.reshape(1, -1) if spec.axis is None else flat.movedim(spec.axis, 0).flatten(1)
    low, high = (end.clone() for end in torch.aminmax(flat, dim=1))
    if method == "mse" and spec.dtype.is_integer:
        rows = max(1, _WEIGHT_CHUNK // flat.shape[1])
        for start in range(0, flat.shape[0], rows):
            part = slice(start, start + rows)
            ratio = _best_ratio(flat[part], low[part], high[part], spec)
            low[part] *= ratio
            high[part] *= ratio
    zero = (low == 0) & (high == 0)
    return torch.where(zero, low.min(), low), torch.where(zero, high.max(), high)


def _best_ratio(rows: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    by_row = replace(spec, axis=0, block_size=None)
    best, least = torch.ones_like(low), torch.full_like(low, torch.inf, dtype=torch.float64)
    for ratio in _WEIGHT_RATIOS:
        qparams = choose_qparams(low * ratio, high * ratio, by_row)
        error = fake_quantize(rows, qparams.scale, qparams.zero_point, by_row).sub_(rows)
        cost = error.square_().sum(1, dtype=torch.float64)
        best = torch.where(cost < least, ratio, best)
        least = torch.minimum(cost, least)
    return best
