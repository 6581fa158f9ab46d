"""A constant that was rounded before, and has not changed since."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qwrap.learned import Grid, rounded

SAMPLES = 64


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """The rounded values of a constant, for all forward passes of a step.

    Under gradient accumulation, or where a layer is used twice, rounding again gives the same.

    Attributes:
        value: the rounded constant.
        source: the constant itself; another one may come to lie where it was.
        key: where and which version of the constant, and of what its scale is made of.
        sample: some values of the constant, None where comparing them would have to wait for a
            device: what is written through ``.data`` counts as no version.
    """

    value: Tensor
    source: weakref.ref[Tensor]
    key: Key
    sample: Tensor | None

    @staticmethod
    def is_possible(x: Tensor) -> bool:
        """Whether it can be told that ``x`` did not change: not so while torch traces it."""
        if torch.compiler.is_compiling() or x.is_inference() or x.device.type == "meta":
            return False
        is_made = x.grad_fn is not None  # anew in every forward pass
        return type(x) in (Tensor, torch.nn.Parameter) and not is_made

    @classmethod
    def of(cls, x: Tensor, grid: Grid, parts: Iterable[Tensor]) -> Held:
        """Round ``x`` to ``grid``, which is made of ``parts``."""
        sample = _sample(x).clone() if x.device.type == "cpu" else None
        return cls(rounded(x, grid)[0], weakref.ref(x), _key(x, parts), sample)

    def is_of(self, x: Tensor, parts: Iterable[Tensor]) -> bool:
        """Whether this is what ``x`` would be rounded to now."""
        if self.source() is not x or self.key != _key(x, parts):
            return False
        return self.sample is None or torch.equal(self.sample, _sample(x))


Key = tuple[tuple[int, int], ...]


def _key(x: Tensor, parts: Iterable[Tensor]) -> Key:
    return tuple((tensor.data_ptr(), tensor._version) for tensor in (x, *parts))


def _sample(x: Tensor) -> Tensor:
    flat = x.detach().as_strided((x.numel(),), (1,)) if x.is_contiguous() else x.detach().flatten()
    return flat[:: max(1, x.numel() // SAMPLES)]
