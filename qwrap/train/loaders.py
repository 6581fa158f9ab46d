"""A ``DataLoader`` divided by the samples of its data set, whatever order it reads them in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set, Sized
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from qwrap.errors import InputError

Loader = DataLoader[Any]

KEPT_SETTINGS = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn"),
    *("multiprocessing_context", "generator", "prefetch_factor"),
)


def split_loader(loader: Loader, share: float, seed: int) -> tuple[Loader, Loader]:
    """Return a loader of the samples to train on and one of those held out.

    The first one draws from the sampler of ``loader`` and passes over what is held out; batches
    are as large as before, but for those that a batch sampler of one's own puts together, from
    which samples go missing. The second one reads in the order of the data set.

    Args:
        loader: of a data set with an index.
        share: of the data set that is held out.
        seed: says which samples.

    Raises:
        InputError: the data set has fewer than two samples.
    """
    total = _total(loader)
    if total < 2:
        raise InputError(f"a data set of {total} samples cannot be divided; give held_out= data")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    kept = order[: min(max(round(total * share), 1), total - 1)]
    return _remaining(loader, frozenset(kept)), _of(loader, sorted(kept))


def _total(loader: Loader) -> int:
    assert isinstance(loader.dataset, Sized)
    return len(loader.dataset)


def _remaining(loader: Loader, left_out: Set[int]) -> Loader:
    sampler, total = loader.batch_sampler, _total(loader)
    if sampler is None:
        return _again(loader, batch_size=None, sampler=_Without(loader.sampler, left_out, total))
    if type(sampler) is BatchSampler:
        indices = _Without(sampler.sampler, left_out, total)
        sampler = BatchSampler(indices, sampler.batch_size, sampler.drop_last)
        return _again(loader, batch_sampler=sampler)
    return _again(loader, batch_sampler=_BatchesWithout(sampler, left_out))


def _of(loader: Loader, indices: list[int]) -> Loader:
    if loader.batch_sampler is None:
        return _again(loader, batch_size=None, sampler=indices)
    size = loader.batch_size or 1
    return _again(loader, batch_sampler=BatchSampler(indices, size, drop_last=False))


def _again(loader: Loader, **changes: Any) -> Loader:
    settings = {name: getattr(loader, name) for name in KEPT_SETTINGS}
    return DataLoader(loader.dataset, **settings, **changes)


class _Without(Sampler[int]):
    """Indices of another sampler, save those left out."""

    def __init__(self, sampler: Iterable[int], left_out: Set[int], total: int) -> None:
        self._sampler, self._left_out = sampler, left_out
        self._share = 1 - len(left_out) / total

    def __iter__(self) -> Iterator[int]:
        return (i for i in self._sampler if i not in self._left_out)

    def __len__(self) -> int:
        """Return how many are left of a sampler that draws all samples alike."""
        return round(len(self._sampler) * self._share)  # type: ignore[arg-type]  # or TypeError

    def set_epoch(self, epoch: int) -> None:
        """Pass on which epoch it is, to a sampler that shuffles by it."""
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)


class _BatchesWithout(Sampler[list[int]]):
    """Batches of another sampler, save the indices left out."""

    def __init__(self, sampler: Iterable[list[int]], left_out: Set[int]) -> None:
        self._sampler, self._left_out = sampler, left_out

    def __iter__(self) -> Iterator[list[int]]:
        for indices in self._sampler:
            if rest := [i for i in indices if i not in self._left_out]:
                yield rest

    def __len__(self) -> int:
        """Return how many batches there are if none loses all of its samples."""
        return len(self._sampler)  # type: ignore[arg-type]  # or TypeError

    def set_epoch(self, epoch: int) -> None:
        """Pass on which epoch it is, to a sampler that shuffles by it."""
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)
