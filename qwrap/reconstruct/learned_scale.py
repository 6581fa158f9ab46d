"""A scale that is learned together with weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qwrap.learned import Grid, Sums, learned_fake_quantize
from qwrap.numerics import QParams
from qwrap.quant.learners import LEARNERS, Learner, rule
from qwrap.quant.stubs import Stub


class LearnedScale(nn.Module):
    """Stands in for a stub, mostly that of an activation, while its scale is learned.

    The scale is ``initial * exp(gain)`` (a power of two where the type asks for one), and gets the
    gradient of learned step size quantization; the zero point stays. It respects the largest scale
    of the stub, so that an activation function which the stub's clamp stands in for stays
    redundant. A scale that an operator or the user dictates, whose ``training`` is "fixed", does
    not move: there is no parameter then, and the stub is all there is.

    Args:
        stub: calibrated; it is left as it is until ``finish``.
        least: smallest scale to come to, for biases that have to fit in 32 bits: a number, or of
            the shape of the scale. Where the scale is smaller to begin with, it is that.
        learns: whether there is anything to learn.

    Attributes:
        gain: the parameter, of the shape of the scale; None where the scale is fixed.

    Raises:
        NotCalibratedError: the stub has no scale yet.

    Source: Esser et al., arXiv:1902.08153, section 2.1.
    """

    initial: Tensor
    zero_point: Tensor
    least: Tensor
    gain: nn.Parameter | None

    def __init__(self, stub: Stub, least: Tensor | float = 0.0, *, learns: bool = True) -> None:
        super().__init__()
        qparams = stub.qparams
        self._stub = (stub,)  # in a tuple, so that it is no submodule of this one
        self.register_buffer("initial", qparams.scale.clone(), persistent=False)
        self.register_buffer("zero_point", qparams.zero_point.clone(), persistent=False)
        least = torch.as_tensor(least, device=self.initial.device, dtype=torch.float32)
        self.register_buffer("least", torch.minimum(self.initial, least), persistent=False)
        self.register_parameter("gain", None)
        if learns and stub.training_by != "fixed" and stub.grid.dtype.function is None:
            start = self._learner.start(self.initial, self.zero_point, stub.grid)
            self.gain = nn.Parameter(start["gain"])

    @property
    def stub(self) -> Stub:
        """What it stands in for."""
        return self._stub[0]

    @property
    def _learner(self) -> Learner:
        spec = self.stub.spec
        return LEARNERS["tqt" if spec.power_of_two or spec.scale_type == "float8e8m0" else "lsq"]

    @property
    @torch.no_grad()
    def scale(self) -> Tensor:
        """Scale as it is now, as it can be stored; without gradient."""
        if self.gain is None:
            return self.initial
        own = {"gain": self.gain}
        scale = self._learner.scale(self.initial, self.zero_point, self.stub.grid, own)
        return torch.minimum(torch.maximum(scale, self.least), self.stub.scale_limit)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded, with gradients for itself and the scale."""
        stub = self.stub
        if stub.mode != "quantize" or stub.grid.dtype.function is not None:
            return stub(x)  # type: ignore[no-any-return]  # modules return Any
        grid = Grid(self.scale, self.zero_point, stub.grid, is_alive=stub.stored)
        learned = [] if self.gain is None else [self.gain]
        return learned_fake_quantize(x, grid, learned, lambda sums: self._gradients(sums, grid))

    def _gradients(self, sums: Sums, grid: Grid) -> Sequence[Tensor]:
        (found,) = rule(self._learner, grid, self.stub.scale_limit, [True])(sums)
        return (torch.where(grid.scale > self.least, found, found.clamp(max=0)),)

    @torch.no_grad()
    def finish(self) -> None:
        """Give the stub the learned scale, in place."""
        stub = self.stub
        if self.gain is not None:
            spec = stub.spec
            qparams = QParams(self.scale, self.zero_point, spec.axis, spec.block_size)
            stub.set_qparams(qparams, float(stub.scale_limit))
