"""What is held out is never trained on, whatever form the data has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import qwrap
from qwrap.errors import ConfigError, InputError
from qwrap.train.split import split

COUNT = 20  # samples, each of them filled with its number


@pytest.fixture(scope="module")
def model(small) -> qwrap.WrappedModel:
    return qwrap.load(small.convs())


def sample(number: int) -> np.ndarray:
    return np.full((1, 3, 8, 8), number, np.float32)


def data_set() -> TensorDataset:
    return TensorDataset(torch.cat([torch.from_numpy(sample(i)) for i in range(COUNT)]))


def numbers(batches: Iterable[dict[str, torch.Tensor]]) -> list[int]:
    """The samples in some batches, in order."""
    return [int(row) for inputs in batches for row in inputs["x"][:, 0, 0, 0]]


class Reader:
    """Data as onnxruntime's calibrators want it."""

    def __init__(self) -> None:
        self._data = iter([{"x": sample(i)} for i in range(COUNT)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._data, None)


class Anew:
    """Data that every iteration reads anew."""

    def __init__(self, shuffled: bool = False) -> None:
        self._shuffled, self._rng = shuffled, np.random.default_rng(0)

    def __iter__(self) -> Iterator[np.ndarray]:
        order = self._rng.permutation(COUNT) if self._shuffled else range(COUNT)
        return (sample(int(i)) for i in order)


class Streamed(IterableDataset):
    def __iter__(self) -> Iterator[np.ndarray]:
        return (sample(i)[0] for i in range(COUNT))


KINDS = {
    "list": lambda: [sample(i) for i in range(COUNT)],
    "loader": lambda: DataLoader(data_set(), batch_size=3),
    "shuffled loader": lambda: DataLoader(data_set(), batch_size=3, shuffle=True),
    "loader of single samples": lambda: DataLoader(
        [sample(i) for i in range(COUNT)], batch_size=None
    ),
    "own batch sampler": lambda: DataLoader(
        data_set(), batch_sampler=Pairs(BatchSampler(RandomSampler(data_set()), 2, False))
    ),
    "streamed loader": lambda: DataLoader(Streamed(), batch_size=1),
    "read anew": Anew,
}


class Pairs:
    """A batch sampler of one's own."""

    def __init__(self, sampler: BatchSampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


@pytest.mark.parametrize("kind", KINDS)
def test_data_is_divided_once_and_for_all_epochs(model, kind: str) -> None:
    parts = split(KINDS[kind](), model, 0.2)
    held_out = numbers(parts.held_out())
    assert len(held_out) == 4
    for epoch in range(3):
        assert sorted(held_out + numbers(parts.epoch(epoch))) == list(range(COUNT))
    assert numbers(parts.held_out()) == held_out


@pytest.mark.parametrize("kind", ["generator", "reader"])
def test_of_data_that_is_read_once_the_first_batches_are_held_out(model, kind: str) -> None:
    data = Reader() if kind == "reader" else (sample(i) for i in range(COUNT))
    parts = split(data, model, 0.2)
    assert parts.is_once
    assert numbers(parts.held_out()) == list(range(8))
    assert numbers(parts.epoch(0)) == list(range(8, COUNT))
    assert numbers(parts.held_out()) == list(range(8))


def test_a_reader_may_use_its_array_again(model) -> None:
    def data() -> Iterator[np.ndarray]:
        array = sample(0)
        for i in range(COUNT):
            array[:] = i
            yield array

    parts = split(data(), model, 0.2)
    assert list(parts.epoch(0))
    assert numbers(parts.held_out()) == list(range(8))


def test_data_in_another_order_each_time_is_refused(model) -> None:
    parts = split(Anew(shuffled=True), model, 0.2)
    with pytest.raises(InputError, match="another one than the first time"):
        list(parts.epoch(0))


def test_other_data_may_be_held_out(model) -> None:
    for kind in ("list", "read anew"):
        for others in ([sample(50), sample(51)], iter([sample(50), sample(51)])):
            parts = split(KINDS[kind](), model, others)
            assert sorted(numbers(parts.epoch(0))) == list(range(COUNT))
            assert numbers(parts.held_out()) == numbers(parts.held_out()) == [50, 51]


def test_nothing_is_held_out_if_asked_so(model) -> None:
    for data in ([sample(0)], iter([sample(0)])):
        parts = split(data, model, 0)
        assert numbers(parts.epoch(0)) == [0]
        assert numbers(parts.held_out()) == []


def test_the_seed_decides(model) -> None:
    data = KINDS["list"]()
    first, again, other = (split(data, model, 0.2, seed) for seed in (0, 0, 1))
    assert numbers(first.held_out()) == numbers(again.held_out()) != numbers(other.held_out())
    assert numbers(first.epoch(1)) == numbers(again.epoch(1)) != numbers(first.epoch(0))


def test_a_loader_keeps_its_batches_as_large_as_they_were(model) -> None:
    parts = split(DataLoader(data_set(), batch_size=4, shuffle=True), model, 0.2)
    assert [len(inputs["x"]) for inputs in parts.epoch(0)] == [4, 4, 4, 4]
    assert parts.count == 4
    assert [len(inputs["x"]) for inputs in parts.held_out()] == [4]


def test_a_distributed_sampler_shuffles_anew_in_each_epoch(model) -> None:
    sampler = DistributedSampler(data_set(), num_replicas=2, rank=0)
    parts = split(DataLoader(data_set(), batch_size=2, sampler=sampler), model, 0.2)
    held_out = set(numbers(parts.held_out()))
    epochs = [numbers(parts.epoch(epoch)) for epoch in range(3)]
    assert len({tuple(order) for order in epochs}) == 3
    assert not any(held_out & set(order) for order in epochs)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([sample(0)], "1 batches cannot be divided"),
        (DataLoader([sample(0)], batch_size=None), "1 samples cannot be divided"),
        (iter([sample(0), sample(1)]), "ended after 2 batches, which are held out"),
        ([np.zeros((2, 2), np.float32)] * 2, r"batch \d: input 'x': expected 4 dimensions"),
        (sample(0), "give an iterable of batches"),
    ],
)
def test_data_that_cannot_be_divided_is_refused(model, data: Any, message: str) -> None:
    def divide() -> None:
        parts = split(data, model, 0.2)
        list(parts.held_out())

    with pytest.raises(InputError, match=message):
        divide()


@pytest.mark.parametrize("share", [-0.1, 1, 1.5])
def test_a_share_out_of_range_is_refused(model, share: float) -> None:
    with pytest.raises(ConfigError, match="from 0 to less than 1"):
        split([sample(0), sample(1)], model, share)
