"""What all ranks of a distributed run saw, put together."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qwrap.errors import ConfigError, InputError
from qwrap.quant.observe.observers import HistogramObserver, Observer

_BUCKET = 2**24  # numbers sent at once, so that packing them takes 128 MiB at most
_UNKNOWN = 2**40  # above any number of channels


def is_distributed(group: dist.ProcessGroup | None = None) -> bool:
    """Return whether this process is one of several ranks of ``group``, of all if None."""
    ready = dist.is_available() and dist.is_initialized()
    return ready and dist.get_world_size(group) > 1


def is_first(group: dist.ProcessGroup | None = None) -> bool:
    """Return whether this process is the first rank of ``group``, or the only process."""
    return not is_distributed(group) or dist.get_rank(group) == 0


def sum_over_ranks(number: int, home: torch.device, group: dist.ProcessGroup | None = None) -> int:
    """Return the sum of what every rank calls this with."""
    return int(summed(torch.tensor([number]), home, group))


def summed(values: Tensor, home: torch.device, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum of the tensors that every rank calls this with; of one process, the tensor."""
    if not is_distributed(group):
        return values
    (total,) = _Ranks(home, group).reduce([values], dist.ReduceOp.SUM)
    return total


def merge_ranks(
    observers: Sequence[Observer], home: torch.device, group: dist.ProcessGroup | None = None
) -> None:
    """Give every observer what its counterparts on all ranks saw, in place.

    Every rank has to call this, those without any data too. Counts, exponents and extremes are
    exactly those of one process that saw everything; moving averages are averaged, each with the
    number of batches behind it. All observers share the reductions, of which there are five or,
    with more than 128 MiB of counts, some more.

    Args:
        observers: those of the same tensors in the same order on every rank.
        home: the device of the model, where observers that saw nothing start.
        group: the ranks, all if None.

    Raises:
        ConfigError: the ranks observe different tensors.
        InputError: a tensor has not the same number of channels on all ranks.
    """
    ranks = _Ranks(home, group)
    _check_alike(observers, ranks)
    reached = []
    for observer, channels in zip(observers, _channels(observers, ranks), strict=True):
        if channels:
            observer.reserve(channels, home)
            reached.append(observer)
    if reached:
        _merge_averages(reached, ranks)  # first, as it asks how many batches this rank had
        _merge_extremes(reached, ranks)
        _merge_counts(reached, ranks)


def merge_extremes(observer: Observer, channels: int, home: torch.device) -> None:
    """Give an observer the extremes that its counterparts on all ranks saw, in place.

    That is one reduction of two numbers for each channel, without any check that ranks agree.

    Args:
        observer: what may have seen nothing here.
        channels: how many it has.
        home: the device of the model.
    """
    if is_distributed():
        observer.reserve(channels, home)
        _merge_extremes([observer], _Ranks(home, None))


class _Ranks:
    """Packs many tensors into few reductions."""

    def __init__(self, home: torch.device, group: dist.ProcessGroup | None) -> None:
        if home.type == "cpu" and dist.get_backend(group) == "nccl":
            home = torch.device("cuda")
        self._device, self._group = home, group

    def reduce(self, tensors: Sequence[Tensor], operation: dist.ReduceOp.RedOpType) -> list[Tensor]:
        """Return each of ``tensors``, all of one type, reduced over all ranks."""
        results: list[Tensor] = []
        while len(results) < len(tensors):
            bucket = _fitting(tensors[len(results) :])
            packed = torch.cat([t.reshape(-1).to(self._device) for t in bucket])
            dist.all_reduce(packed, operation, self._group)
            parts = torch.split(packed, [t.numel() for t in bucket])
            # Copies, because a part would keep all that was packed with it in memory.
            results += [
                p.view(t.shape).to(t.device, copy=True) for p, t in zip(parts, bucket, strict=True)
            ]
        return results

    def extremes(self, numbers: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the least and the greatest of each number over all ranks."""
        ours = torch.tensor([[-n for n in numbers], list(numbers)])
        (found,) = self.reduce([ours], dist.ReduceOp.MAX)
        return (-found[0]).tolist(), found[1].tolist()


def _fitting(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the first tensors, as many as fit into a bucket, at least one."""
    size = 0
    for count, tensor in enumerate(tensors):
        size += tensor.numel()
        if size > _BUCKET and count:
            return tensors[:count]
    return tensors


def _check_alike(observers: Sequence[Observer], ranks: _Ranks) -> None:
    """Refuse what would hang or garble the reductions: tensors of different sizes."""
    kinds = [(type(o).__name__, o.name, o.axis, _bins(o)) for o in observers]
    least, greatest = ranks.extremes([zlib.crc32(repr(kinds).encode())])
    if least != greatest:
        raise ConfigError(
            "the ranks observe different tensors; on each, load the same model and prepare it "
            "with the same settings"
        )


def _bins(observer: Observer) -> int:
    return observer.histogram.bins if isinstance(observer, HistogramObserver) else 0


def _channels(observers: Sequence[Observer], ranks: _Ranks) -> list[int]:
    """Return every observer's number of channels, 0 where no rank saw the tensor."""
    known = [o.ends.channels or 0 for o in observers]
    least, greatest = ranks.extremes([n or _UNKNOWN for n in known] + known)
    least, greatest = least[: len(known)], greatest[len(known) :]
    for observer, fewest, most in zip(observers, least, greatest, strict=True):
        if most and fewest != most:
            raise InputError(
                f"tensor {observer.name!r}: {fewest} channels along axis {observer.axis} on one "
                f"rank, {most} on another; a scale per channel needs a fixed number of them"
            )
    return greatest


def _merge_averages(observers: Sequence[Observer], ranks: _Ranks) -> None:
    averages = [_tensors(o)[1] for o in observers]
    weights = [
        a.isfinite().to(torch.float64) * o.ends.batches
        for a, o in zip(averages, observers, strict=True)
    ]
    parts = [torch.where(a.isfinite(), a, 0.0) * w for a, w in zip(averages, weights, strict=True)]
    sums = ranks.reduce([*parts, *weights], dist.ReduceOp.SUM)
    count = len(observers)
    for observer, part, weight in zip(observers, sums[:count], sums[count:], strict=True):
        unknown = torch.tensor([[torch.inf], [-torch.inf]], dtype=torch.float64).to(part.device)
        mean = torch.where(weight > 0, part / weight.clamp(min=1), unknown)
        observer.ends.replace(_tensors(observer)[0], mean, observer.ends.batches)


def _merge_extremes(observers: Sequence[Observer], ranks: _Ranks) -> None:
    """Merge the extremes; widen every histogram to the greatest exponent of all ranks."""
    greatest = [torch.stack((-e[0], e[1])) for e in (_tensors(o)[0] for o in observers)]
    histograms = [o.histogram for o in observers if isinstance(o, HistogramObserver)]
    exponents = [h.exponent.to(torch.float32) for h in histograms if h.exponent is not None]
    found = ranks.reduce([*greatest, *exponents], dist.ReduceOp.MAX)
    for observer, ends in zip(observers, found, strict=False):
        extremes = torch.stack((-ends[0], ends[1]))
        observer.ends.replace(extremes, _tensors(observer)[1], observer.ends.batches)
    for histogram, exponent in zip(histograms, found[len(observers) :], strict=True):
        histogram.cover(exponent.to(torch.int32))


def _merge_counts(observers: Sequence[Observer], ranks: _Ranks) -> None:
    histograms = [o.histogram for o in observers if isinstance(o, HistogramObserver)]
    counts = [h.counts for h in histograms if h.counts is not None]
    tallies = torch.tensor([[o.seen, o.masked, o.nonfinite, o.ends.batches] for o in observers])
    summed, *counts = ranks.reduce([tallies, *counts], dist.ReduceOp.SUM)
    for histogram, merged in zip(histograms, counts, strict=True):
        histogram.counts = merged
    for observer, (seen, *left_out, batches) in zip(observers, summed.tolist(), strict=True):
        extremes, averages = _tensors(observer)
        observer.seen = seen
        observer.left_out = torch.tensor(left_out, device=extremes.device)
        observer.ends.replace(extremes, averages, batches)


def _tensors(observer: Observer) -> tuple[Tensor, Tensor]:
    tensors = observer.ends.tensors()
    assert tensors is not None, "observers start with reserve()"
    return tensors
