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
        return mix(x, rounded, self.probability, self.generator)


def mix(x: Tensor, other: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Return each element of ``x`` with the probability given, else that of ``other``.

    Args:
        x: floats.
        other: of the same shape and type.
        probability: from 0 to 1; it counts to the nearest 2^-16.
        generator: gives the random numbers.
    """
    kept = _draw(x, probability, generator)
    mixed: Tensor = _Mixed.apply(x, other, kept)  # type: ignore[no-untyped-call]  # torch has no stub
    return mixed


def _draw(x: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Return int8 of the shape of ``x``: all bits set with the probability given, else none.

    Full random words are what a generator gives fastest, by far.
    """
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    draws = words.to(x.device).view(torch.int16)[: x.numel()].view(x.shape).to(torch.int32)
    return draws.add_(2**15 - round(probability * 2**16)).bitwise_right_shift_(31).to(torch.int8)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Mixed(torch.autograd.Function):
    """Takes elements of ``x`` where the bits of ``kept`` are set, and of ``other`` elsewhere.

    Bit operations are exact for infinity and NaN too, and ten times as fast as choosing by booleans
    on a CPU, where torch does not vectorise that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        bits = _BITS[x.itemsize]
        a, b = x.detach().view(bits), other.detach().view(bits)
        return (a ^ b).bitwise_and_(kept.to(bits)).bitwise_xor_(b).view(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        bits = _BITS[gradients[0].itemsize]
        gradient = gradients[0].view(bits)
        through = gradient & kept.to(bits)
        to_other = gradient ^ through if ctx.needs_input_grad[1] else None
        dtype = gradients[0].dtype
        return through.view(dtype), None if to_other is None else to_other.view(dtype), None


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
