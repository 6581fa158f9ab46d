"""A few calibration samples, kept so that methods can be compared on them later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qwrap.model.wrapped import WrappedModel

BYTES = 20 * 2**20
"""Room for samples, 20 MiB: some 33 photographs of 224 x 224, or 64 of half the side."""
JOINED, JOINED_BYTES = 8, 2**20
"""Samples in a joined batch, and bytes of its inputs; what is computed from them takes more."""


class Samples:
    """The first samples that ran through a model, on the CPU, in bounded memory.

    Attributes:
        most: how many samples to keep.
        batches: graph input -> tensor, for each batch kept.
        sizes: samples in each.
    """

    def __init__(self, most: int, room: int = BYTES) -> None:
        self.most = most
        self.batches: list[dict[str, Any]] = []
        self.sizes: list[int] = []
        self._room = room

    @property
    def count(self) -> int:
        """Samples in all batches."""
        return sum(self.sizes)

    @property
    def is_full(self) -> bool:
        """Whether no more will be kept."""
        return self.count >= self.most

    def take(self, inputs: Mapping[str, Any], *, divisible: bool) -> None:
        """Keep a copy of a batch, as far as there is room.

        Args:
            inputs: graph input -> tensor, list, array of text or None.
            divisible: whether the first axis of all inputs counts samples, so that some of them
                may be left out.
        """
        tensors = [x for x in inputs.values() if isinstance(x, Tensor)]
        sizes = {len(x) if x.dim() else 1 for x in tensors}
        size = sizes.pop() if len(sizes) == 1 else 1
        left = self.most - self.count
        if left <= 0 or any(not x.numel() for x in tensors):
            return
        if divisible and size > left:
            inputs, size = {name: x[:left] for name, x in inputs.items()}, left
        needed = sum(_bytes(x) for x in inputs.values())
        if needed > self._room:
            return
        self._room -= needed
        batch = {name: _copy(x) for name, x in inputs.items()}
        if divisible and self.batches and self._can_join(batch, size):
            last = self.batches[-1]
            self.batches[-1] = {name: torch.cat((last[name], batch[name])) for name in batch}
            self.sizes[-1] += size
        else:
            self.batches.append(batch)
            self.sizes.append(size)

    def _can_join(self, batch: Mapping[str, Tensor], size: int) -> bool:
        """Whether the last batch can take another one in: small ones cost most in overhead."""
        last = self.batches[-1]
        small = sum(_bytes(x) for x in (*last.values(), *batch.values())) <= JOINED_BYTES
        fits = all(last[name].shape[1:] == batch[name].shape[1:] for name in batch)
        return fits and small and self.sizes[-1] + size <= JOINED

    def on(self, device: torch.device) -> Iterator[dict[str, Any]]:
        """Yield the batches on ``device``, one at a time."""
        for batch in self.batches:
            yield {k: x.to(device) if isinstance(x, Tensor) else x for k, x in batch.items()}


def _bytes(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_bytes, value))
    return int(value.nbytes) if hasattr(value, "nbytes") else 0


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    return [_copy(item) for item in value] if isinstance(value, list) else value


@contextmanager
def keeping(model: WrappedModel, most: int) -> Iterator[None]:
    """Keep up to ``most`` samples of what runs in the ``with`` block, in ``model.samples``."""
    model.samples = Samples(most)

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(model, {**dict(zip(model.input_names, args, strict=False)), **kwargs})

    handle = model.register_forward_pre_hook(take, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def keep(model: WrappedModel, inputs: Mapping[str, Any]) -> None:
    """Keep a batch, graph input -> tensor, in ``model.samples`` as far as there is room."""
    samples = model.samples
    assert isinstance(samples, Samples)
    if samples.count < samples.most:
        samples.take(inputs, divisible=is_divisible(model))


def is_divisible(model: WrappedModel) -> bool:
    """Return whether all inputs have one unknown first axis: that of samples."""
    kinds = [model.graph.type_of(value) for value in model.graph.inputs]
    if not all(kind.kind == "tensor" and kind.shape for kind in kinds):
        return False
    first = {kind.shape[0] for kind in kinds if kind.shape}
    return len(first) == 1 and not any(isinstance(size, int) for size in first)
