"""Learned rounding: which of the two codes beside it each weight gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from qwrap.config import QuantSpec
from qwrap.errors import ConfigError, InputError
from qwrap.numerics import spread
from qwrap.quant.stubs import Stub

ZETA, GAMMA = 1.1, -0.1  # where the sigmoid is stretched to, so that 0 and 1 can be reached
EDGE = 1e-4  # of a step: a weight on the grid starts so far inside, for beyond are no gradients
FAR = 20.0  # a variable whose sigmoid is stretched far beyond 0 and 1


def unlearnable(spec: QuantSpec) -> str:
    """Return why the rounding of weights of a type cannot be learned, empty where it can be."""
    if spec.dtype.is_integer:
        return ""
    return f"{spec.dtype} has no integer codes to choose between"


class Rounding(nn.Module, ABC):
    """Stands in for the stub of a weight while its codes are learned.

    Args:
        weight: the float weight, as it is stored.
        stub: how it is quantized; calibrated, and left as it is.

    Attributes:
        stub: the same.

    Raises:
        ConfigError: codes of this type cannot be learned; see ``unlearnable``.
        InputError: the weight holds NaN.
        NotCalibratedError: the stub has no scale yet.
    """

    def __init__(self, weight: Tensor, stub: Stub) -> None:
        super().__init__()
        if reason := unlearnable(stub.spec):
            raise ConfigError(
                f"weight {stub.name!r}: {reason}; choose an integer type, or leave its rounding "
                "as it is"
            )
        if weight.isnan().any():
            raise InputError(f"weight {stub.name!r} holds NaN and cannot be rounded")
        self._stub = (stub,)  # in a tuple, so that it is no submodule of this one

    @property
    def stub(self) -> Stub:
        """What it stands in for."""
        return self._stub[0]

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """Return what the weight is now, in its dtype, with gradients for what is learned.

        Args:
            weight: the tensor that this was made for; gets no gradient.
        """

    @abstractmethod
    def hard(self) -> Tensor:
        """Return the weight that is deployed: float32, exactly on the grid that was learned."""

    def finish(self) -> Tensor:
        """Give the stub what was learned of its scale, in place, and return ``hard()``.

        Quantizing the result by the stub gives it again, bit for bit.
        """
        return self.hard()

    def regularizer(self, beta: float) -> Tensor:
        """Return what is added to the loss so that choices become clear; 0 where they are."""
        del beta
        return next(self.parameters()).new_zeros((), requires_grad=True)


class SoftRound(Rounding):
    """Lets each weight lie anywhere between the codes below and above it, and end at one of both.

    The weight is ``scale * (floor(w / scale) + h(V))``, with the rectified sigmoid ``h``. At first
    it is the float weight. A weight beyond the range stays at the last code, without gradient.

    Args:
        weight: the float weight. Where it lies on the grid already, as after ``round_weights``,
            nothing says which other code it is near to; then give ``start``.
        stub: how it is quantized.
        start: float weights to begin at instead; of the two codes of a weight, one is still that
            of ``weight``, and where ``start`` lies further away it begins at the nearer end.

    Attributes:
        variable: ``V``, float32 of the weight's shape.

    Source: Nagel et al., arXiv:2004.10568, section 3.3.
    """

    lower: Tensor
    step: Tensor

    @torch.no_grad()
    def __init__(self, weight: Tensor, stub: Stub, start: Tensor | None = None) -> None:
        super().__init__(weight, stub)
        qparams, grid = stub.qparams, stub.grid
        step, zero_point = (
            spread(values, weight.shape, qparams) for values in (qparams.scale, qparams.zero_point)
        )
        steps = weight.detach().to(torch.float32) / step
        low, high = grid.qmin - zero_point, grid.qmax - zero_point
        nearest = torch.minimum(torch.maximum(steps.round(), low), high)
        if start is not None:
            steps = start.detach().to(torch.float32) / step
        lower = torch.minimum(torch.maximum(steps.floor(), nearest - 1), nearest)
        share = (steps - lower).clamp_(EDGE, 1 - EDGE)
        variable = unrectified(share)
        # Both ends of the range have one neighbour only: they stay, by what has no gradient.
        variable.masked_fill_(lower < low, FAR).masked_fill_(lower >= high, -FAR)
        self.variable = nn.Parameter(variable)
        self.register_buffer("lower", lower, persistent=False)
        self.register_buffer("step", step, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight between its two codes."""
        soft: Tensor = _Soft.apply(self.variable, self.lower, self.step)  # type: ignore[no-untyped-call]  # torch has no stub
        return soft.to(weight.dtype)

    @torch.no_grad()
    def hard(self) -> Tensor:
        """Return the weight at the nearer of its two codes."""
        # h(V) is half where V is 0.
        return (self.lower + (self.variable >= 0)) * self.step

    def regularizer(self, beta: float) -> Tensor:
        """Return ``sum(1 - |2 h(V) - 1|^beta)``: 0 where all choices are made.

        Args:
            beta: above 1; the larger, the less it minds undecided ones.
        """
        result: Tensor = _Undecided.apply(self.variable, beta)  # type: ignore[no-untyped-call]  # torch has no stub
        return result


def rectified(variable: Tensor) -> Tensor:
    """Return the sigmoid, stretched to ``GAMMA`` … ``ZETA`` and cut off at 0 and 1."""
    return torch.sigmoid(variable).mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def unrectified(share: Tensor) -> Tensor:
    """Return the variable whose ``rectified`` is ``share``, of numbers from 0 to 1."""
    return (share - GAMMA).reciprocal_().mul_(ZETA - GAMMA).sub_(1).log_().neg_()


def _slope(share: Tensor) -> Tensor:
    """Return the derivative of ``rectified`` where it is ``share``: 0 at both ends."""
    # (share - GAMMA) * (ZETA - share) without brackets, for GAMMA + ZETA = 1; the fewer passes.
    bulge = torch.addcmul(share, share, share, value=-1)
    torch.threshold_(bulge, 0, GAMMA * ZETA)
    return bulge.sub_(GAMMA * ZETA).div_(ZETA - GAMMA)


class _Soft(torch.autograd.Function):
    """``step * (lower + rectified(variable))``, in half the time and memory of its parts."""

    @staticmethod
    def forward(ctx: Any, variable: Tensor, lower: Tensor, step: Tensor) -> Tensor:
        share = rectified(variable)
        ctx.save_for_backward(share, step)
        return (lower + share).mul_(step)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        share, step = ctx.saved_tensors
        return _slope(share).mul_(gradients[0]).mul_(step), None, None


class _Undecided(torch.autograd.Function):
    """The regularizer; raises to a power once, for both the value and the gradient."""

    @staticmethod
    def forward(ctx: Any, variable: Tensor, beta: float) -> Tensor:
        share = rectified(variable)
        side = 2 * share - 1
        power = side.abs().pow_(beta - 1)
        value = (power * side.abs()).neg_().add_(1).sum()
        ctx.save_for_backward(power.mul_(side.sign_()).mul_(-2 * beta).mul_(_slope(share)))
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * gradients[0], None
