"""Learned rounding by division: each weight is divided by a number of its own first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwrap.numerics import fake_quantize
from qwrap.quant.stubs import Stub
from qwrap.reconstruct.learned_scale import LearnedScale
from qwrap.reconstruct.soft_round import Rounding


class FlexRound(Rounding):
    """Rounds ``W / (S2 * s3 * s4)`` to the grid of a learned scale ``s1``.

    ``S2`` has one number for each weight, ``s3`` one for each output channel and ``s4`` one for
    each input channel. All start at 1, where this rounds to nearest, and stay positive, for their
    logarithms are learned. Their gradient is proportional to the weight: large ones can move by
    several codes, small ones hardly move. Rounding and the gradient of ``s1`` are those of learned
    step size quantization; where the user dictates ``s1`` it stays.

    Args:
        weight: the float weight, as it is stored.
        stub: how it is quantized; left as it is until ``finish``.
        output_axis: axis of the output channels, None for no ``s3``.
        input_axis: axis of the input channels, None for no ``s4``; the paper has it for
            convolutions.
        least: smallest ``s1`` to come to, see ``LearnedScale``.
        learn_scale: whether ``s1`` may move at all.

    Source: Lee et al., arXiv:2306.00317, section 3.2, equation 2.
    """

    weight: Tensor

    def __init__(
        self,
        weight: Tensor,
        stub: Stub,
        *,
        output_axis: int | None = None,
        input_axis: int | None = None,
        least: Tensor | float = 0.0,
        learn_scale: bool = True,
    ) -> None:
        super().__init__(weight, stub)
        self.register_buffer("weight", weight.detach().to(torch.float32), persistent=False)
        self.scaling = LearnedScale(stub, least, learns=learn_scale)
        self.by_element = nn.Parameter(torch.zeros_like(self.weight))
        self.by_output = _along(self.weight, output_axis)
        self.by_input = _along(self.weight, input_axis)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight rounded, with gradients straight through the rounding."""
        rounded: Tensor = self.scaling(self._divided())
        return rounded.to(weight.dtype)

    def _divided(self) -> Tensor:
        logarithm: Tensor = self.by_element
        for more in (self.by_output, self.by_input):
            if more is not None:
                logarithm = logarithm + more
        return self.weight * torch.exp(-logarithm)

    @torch.no_grad()
    def hard(self) -> Tensor:
        """Return the weight on the grid of the scale learned so far."""
        scaling = self.scaling
        return fake_quantize(self._divided(), scaling.scale, scaling.zero_point, self.stub.grid)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Give the stub the learned scale, in place, and return ``hard()``."""
        self.scaling.finish()
        return self.hard()


def _along(weight: Tensor, axis: int | None) -> nn.Parameter | None:
    """Return a zero for each index of an axis, to broadcast; None where that is no choice."""
    if axis is None or weight.shape[axis] == 1:
        return None
    shape = [1] * weight.dim()
    shape[axis] = weight.shape[axis]
    return nn.Parameter(weight.new_zeros(shape, dtype=torch.float32))
