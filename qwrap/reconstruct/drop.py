"""Quantization that is left out by chance while the weights around it are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwrap.quant.clamp import Clamp
from qwrap.quant.stubs import Stub
from qwrap.reconstruct.learned_scale import LearnedScale


class Drop(nn.Module):
    """Rounds elements of an activation by chance only, each on its own.

    Where it sits on the output of an activation function that the stub's clamp stands in for, that
    function has to run: see ``kernels_beside``.

    Args:
        tap: what rounds.
        probability: with which an element stays as it is, from 0 to 1; the paper's is 0.5.
        generator: gives the random numbers.

    Attributes:
        active: whether anything is left out; if not, ``tap`` is all there is.

    Source: Wei et al., arXiv:2203.05740, section 3.3.
    """

    def __init__(
        self, tap: Stub | LearnedScale, probability: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.tap, self.probability, self.generator = tap, probability, generator
        self.active = True

    @property
    def stub(self) -> Stub:
        """What rounds in the end."""
        return self.tap if isinstance(self.tap, Stub) else self.tap.stub

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with some of its elements rounded."""
        rounded: Tensor = self.tap(x)
        if not self.active or not self.probability:
            return rounded
        return torch.where(self._keeps(x), x, rounded)

    def _keeps(self, x: Tensor) -> Tensor:
        device = self.generator.device
        keeps = torch.empty(x.shape, dtype=torch.bool, device=device)
        return keeps.bernoulli_(self.probability, generator=self.generator).to(x.device)


def kernels_beside(
    kernels: Mapping[str, Callable[..., Any]], drops: Iterable[Drop]
) -> dict[str, Callable[..., Any]]:
    """Return ``kernels`` without those that leave the work of an activation function to a stub.

    What ``Drop`` does not round, nothing would clamp.

    Args:
        kernels: node key -> what computes it.
        drops: what sits on the points of the same model.
    """
    dropped = {drop.stub for drop in drops}
    return {
        key: kernel
        for key, kernel in kernels.items()
        if not (isinstance(kernel, Clamp) and kernel.stub in dropped)
    }
