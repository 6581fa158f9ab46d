"""A constant that was rounded before, and has not changed since."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwrap.learned import Grid, Known, rounded

SAMPLES = 64


@dataclass(slots=True, eq=False)
class Held:
    """The rounded values of a constant, for all forward passes of a step.

    Under gradient accumulation, or where a layer is used twice, rounding again gives the same.
    torch counts the versions of a tensor, but not all that writes to one is counted: not what goes
    through ``.data``, as in some optimizers, and not what FSDP gathers. So a value is only held
    while the gradients of the constant and of its scale are those of the backward passes that went
    through it, summed up: who changes a parameter resets its gradient.

    Attributes:
        known: the rounded constant.
        source: the constant.
        key: where and which version of the constant, and of what its scale is made of.
        gradients: which of them had a gradient, and its version, at the last forward pass.
        passes: how many backward passes went through the value by then.
        sample: some values of the constant, None where comparing them would have to wait for a
            device.
    """

    known: Known
    source: weakref.ref[Tensor]
    key: Key
    gradients: list[Gradient]
    passes: int
    sample: Tensor | None

    @staticmethod
    def is_possible(x: Tensor) -> bool:
        """Whether it can be told that ``x`` did not change: not so while torch traces it."""
        if torch.compiler.is_compiling():  # first, as the rest cannot be traced
            return False
        plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta"
        return plain and x.is_leaf and not x.is_inference()

    @classmethod
    def of(cls, x: Tensor, grid: Grid, parts: Sequence[Tensor]) -> Held:
        """Round ``x`` to ``grid``, which is made of ``parts``."""
        sample = _sample(x).clone() if x.device.type == "cpu" else None
        known = Known(rounded(x, grid, keep=False)[0])
        return cls(known, weakref.ref(x), _key(x, parts), _gradients(x, parts), 0, sample)

    def is_of(self, x: Tensor, parts: Sequence[Tensor]) -> bool:
        """Whether this is what ``x`` would be rounded to now; to be asked before each use."""
        if self.source() is not x or self.key != _key(x, parts) or not self._only_added(x, parts):
            return False
        return self.sample is None or torch.equal(self.sample, _sample(x))

    def _only_added(self, x: Tensor, parts: Sequence[Tensor]) -> bool:
        """Whether gradients are what they were, and what backward passes have added to them."""
        before, added = self.gradients, self.known.passes - self.passes
        self.gradients, self.passes = _gradients(x, parts), self.known.passes
        if not added:
            return True
        return all(_has_grown(*pair, added) for pair in zip(before, self.gradients, strict=True))


Key = tuple[tuple[int, int], ...]
Gradient = int | None
"""The version of a gradient, -1 before the first one; None of a tensor that gets none."""


def _has_grown(before: Gradient, now: Gradient, added: int) -> bool:
    """Whether a gradient is what it was, plus what so many backward passes have added."""
    if before is None or now is None:
        return before is now
    if before < 0:
        return 0 <= now - (added - 1) <= 1  # it was written once or twice to begin with
    return now == before + added


def _gradients(x: Tensor, parts: Sequence[Tensor]) -> list[Gradient]:
    return [_version(tensor.grad) if tensor.requires_grad else None for tensor in (x, *parts)]


def _version(gradient: Tensor | None) -> int:
    return -1 if gradient is None else gradient._version


def _key(x: Tensor, parts: Sequence[Tensor]) -> Key:
    return tuple((tensor.data_ptr(), tensor._version) for tensor in (x, *parts))


def _sample(x: Tensor) -> Tensor:
    flat = x.detach().as_strided((x.numel(),), (1,)) if x.is_contiguous() else x.detach().flatten()
    return flat[:: max(1, x.numel() // SAMPLES)]
