"""Batches to train on, and batches held out, which training never sees."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from qwrap.errors import ConfigError, InputError
from qwrap.model.batches import count_batches, iterate, to_inputs
from qwrap.model.wrapped import WrappedModel
from qwrap.train.loaders import split_loader

Inputs = dict[str, Any]

ONCE = 8  # batches held out of data that can be read once, where its length is not known


@dataclass(frozen=True, slots=True)
class Split:
    """Data in two parts.

    Attributes:
        held_out: returns the batches held out, the same ones each time.
        epoch: returns the batches to train on in an epoch, in its order.
        count: batches in an epoch, None if that shows only while they are read.
        is_once: whether there is one epoch only.
    """

    held_out: Callable[[], Iterable[Inputs]]
    epoch: Callable[[int], Iterator[Inputs]]
    count: int | None
    is_once: bool = False


def split(
    batches: Iterable[Any],
    model: WrappedModel,
    held_out: float | Iterable[Any],
    seed: int = 0,
) -> Split:
    """Divide ``batches``, or take another part's from ``held_out``.

    A share of them is held out: of a list any batches; of a ``DataLoader`` any samples of its
    data set, whatever its sampler does; of other data that can be read again every so many
    batches, kept in memory and found again at their places in each epoch. Of data that can be read
    once, the first ones are held out and kept in memory.

    Args:
        batches: as for ``calibrate``.
        model: whose graph inputs they are for.
        held_out: share of the batches, at least 0 and less than 1; 0 holds nothing out. Or the
            batches held out themselves.
        seed: says which ones, and the order of a list in each epoch.

    Raises:
        ConfigError: the share is out of range.
        InputError: there are too few batches to divide, or one does not fit.
    """
    if isinstance(held_out, (int, float)):
        if not 0 <= held_out < 1:
            raise ConfigError(f"held_out={held_out}: expected a share from 0 to less than 1")
        if held_out:
            return _shared(batches, model, float(held_out), seed)
        return _whole(batches, model, list, seed)
    if _is_once(held_out):
        kept = [_kept(inputs) for inputs in iterate(held_out, model)]
        return _whole(batches, model, lambda: (to_inputs(b, model) for b in kept), seed)
    return _whole(batches, model, lambda: iterate(held_out, model), seed)


def rows_of(inputs: Inputs) -> int:
    """Return how many samples a batch holds: the first axis of the first tensor that has one."""
    tensors = (x for x in inputs.values() if isinstance(x, Tensor) and x.dim())
    first = next(tensors, None)
    return 1 if first is None else len(first)


def _shared(batches: Iterable[Any], model: WrappedModel, share: float, seed: int) -> Split:
    if _is_loader(batches):
        trained, kept = split_loader(batches, share, seed)
        return Split(
            lambda: iterate(kept, model),
            lambda epoch: _loaded(trained, model, epoch),
            count_batches(trained),
        )
    if _is_list(batches):
        return _shared_list(batches, model, share, seed)
    if _is_once(batches):
        return _shared_once(batches, model, share)
    return _shared_again(batches, model, share)


def _whole(
    batches: Iterable[Any], model: WrappedModel, held_out: Callable[[], Iterable[Inputs]], seed: int
) -> Split:
    if _is_list(batches):
        rows = list(range(len(batches)))
        return Split(held_out, lambda epoch: _picked(batches, model, rows, seed, epoch), len(rows))
    if _is_once(batches):
        data = iterate(batches, model)
        return Split(held_out, lambda _: data, count_batches(batches), is_once=True)
    return Split(held_out, lambda epoch: _loaded(batches, model, epoch), count_batches(batches))


# --- lists and loaders ---------------------------------------------------------------------------


def _shared_list(batches: Sequence[Any], model: WrappedModel, share: float, seed: int) -> Split:
    total = len(batches)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    number = number_held_out(total, share)
    kept, rows = sorted(order[:number]), sorted(order[number:])
    return Split(
        lambda: (_at(batches, model, i) for i in kept),
        lambda epoch: _picked(batches, model, rows, seed, epoch),
        len(rows),
    )


def number_held_out(total: int, share: float) -> int:
    """Return how many of ``total`` are held out: one or more, and not all.

    Raises:
        InputError: there are fewer than two.
    """
    if total < 2:
        raise InputError(
            f"{total} batches cannot be divided into some to train on and some to hold out; give "
            "more, or held_out= another iterable, or held_out=0 for no check"
        )
    return min(max(round(total * share), 1), total - 1)


def _picked(
    batches: Sequence[Any], model: WrappedModel, rows: Sequence[int], seed: int, epoch: int
) -> Iterator[Inputs]:
    """Yield the batches at ``rows`` in an order of the epoch's own."""
    generator = torch.Generator().manual_seed(seed + epoch)
    for i in torch.randperm(len(rows), generator=generator).tolist():
        yield _at(batches, model, rows[i])


def _at(batches: Sequence[Any], model: WrappedModel, index: int) -> Inputs:
    try:
        return to_inputs(batches[index], model)
    except InputError as error:
        raise InputError(f"batch {index}: {error}") from error


def _loaded(batches: Iterable[Any], model: WrappedModel, epoch: int) -> Iterator[Inputs]:
    for name in ("sampler", "batch_sampler"):
        _set_epoch(getattr(batches, name, None), epoch)
    return iterate(batches, model)


def _set_epoch(sampler: object, epoch: int) -> None:
    """Tell a sampler that shuffles by the epoch (a ``DistributedSampler``) which one it is."""
    for each in (sampler, getattr(sampler, "sampler", None)):
        if hasattr(each, "set_epoch"):
            each.set_epoch(epoch)


# --- other data ----------------------------------------------------------------------------------


def _shared_once(batches: Iterable[Any], model: WrappedModel, share: float) -> Split:
    data, total = iterate(batches, model), count_batches(batches)
    number = ONCE if total is None else number_held_out(total, share)
    kept = [_kept(inputs) for inputs in itertools.islice(data, number)]
    first = next(data, None)
    if first is None:
        raise InputError(
            f"the data ended after {len(kept)} batches, which are held out; give a list, or "
            "held_out= another iterable"
        )
    data = itertools.chain([first], data)
    left = None if total is None else total - number
    return Split(lambda: (to_inputs(b, model) for b in kept), lambda _: data, left, is_once=True)


def _shared_again(batches: Iterable[Any], model: WrappedModel, share: float) -> Split:
    step = max(round(1 / share), 2)
    kept: dict[int, Inputs] = {}
    last: Inputs = {}
    total = 0
    for total, inputs in enumerate(iterate(batches, model), 1):
        last = inputs
        if total % step == 0:
            kept[total - 1] = _kept(inputs)
    number_held_out(total, share)  # refuses what is too little
    kept = kept or {total - 1: _kept(last)}
    return Split(
        lambda: (to_inputs(b, model) for b in kept.values()),
        lambda epoch: _without(_loaded(batches, model, epoch), kept),
        total - len(kept),
    )


def _without(data: Iterable[Inputs], kept: dict[int, Inputs]) -> Iterator[Inputs]:
    """Yield the batches that are not held out.

    Raises:
        InputError: those held out are not at their places, so that they would be trained on.
    """
    for i, inputs in enumerate(data):
        if i not in kept:
            yield inputs
        elif not _are_equal(inputs, kept[i]):
            raise InputError(
                f"batch {i} is another one than the first time the data was read, so held-out "
                "batches would be trained on; give held_out= an iterable of its own, or a list"
            )


def _are_equal(some: Inputs, others: Inputs) -> bool:
    return all(
        torch.equal(x.cpu(), others[name]) if isinstance(x, Tensor) else True
        for name, x in some.items()
    )


def _kept(inputs: Inputs) -> Inputs:
    """Return a copy in memory, which a reader that reuses its arrays does not change."""
    return {k: x.to("cpu", copy=True) if isinstance(x, Tensor) else x for k, x in inputs.items()}


# --- kinds of data -------------------------------------------------------------------------------


def _is_loader(batches: object) -> TypeGuard[DataLoader[Any]]:
    return isinstance(batches, DataLoader) and not isinstance(batches.dataset, IterableDataset)


def _is_list(batches: object) -> TypeGuard[Sequence[Any]]:
    indexed = hasattr(batches, "__getitem__") and isinstance(batches, Sized)
    others = (DataLoader, Tensor, np.ndarray, Mapping, str)
    return indexed and not isinstance(batches, others) and not _is_once(batches)


def _is_once(batches: object) -> bool:
    return hasattr(batches, "get_next") or isinstance(batches, Iterator)
