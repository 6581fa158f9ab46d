"""The bias of a layer, learned together with its weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qwrap.quant.stubs import BiasStub

TYPICAL = 8.0  # how far the ends of an activation's range are apart, in typical activations


class LearnedBias(nn.Module):
    """Stands in for the stub of a bias while the bias is learned.

    It is moved in units of the noise that rounding the weights of its channel to nearest makes, so
    that one learning rate does for all layers.

    Args:
        bias: the parameter, ``[C]``; left as it is until ``finish``.
        stub: of the bias.
        inputs: how many products make one output.
        codes: how many codes the activation has that the weight multiplies.

    Attributes:
        shift: the parameter, in these units.
    """

    unit: Tensor

    @torch.no_grad()
    def __init__(self, bias: Tensor, stub: BiasStub, inputs: int, codes: float) -> None:
        super().__init__()
        self._held = (bias, stub)  # in a tuple, so that they are not this module's
        typical = stub.scale * codes / TYPICAL  # activation times one step of the weight
        noise = typical * math.sqrt(inputs / 12)  # a rounding error has variance 1/12
        self.register_buffer("unit", noise.expand(bias.shape).clone(), persistent=False)
        self.shift = nn.Parameter(torch.zeros_like(bias))

    def forward(self, bias: Tensor) -> Tensor:
        """Return the shifted bias, rounded."""
        rounded: Tensor = self._held[1](bias + self.shift * self.unit)
        return rounded

    @property
    def bias(self) -> Tensor:
        """The parameter of the model."""
        return self._held[0]

    @torch.no_grad()
    def finish(self) -> None:
        """Shift the bias itself, in place."""
        self.bias.add_(self.shift * self.unit)
