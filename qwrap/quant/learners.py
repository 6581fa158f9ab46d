"""How the scale and zero point of a stub move in training: one class for each way."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from qwrap.config import QuantSpec, Training
from qwrap.learned import Grid, Rule, Sums
from qwrap.numerics import MIN_SCALE, round_scale

Kind = Literal["scale", "zero_point", "clip"]
LN2 = math.log(2.0)


class Learner(ABC):
    """What is trained of one scale and zero point, and by which gradient.

    A learner holds nothing: the parameters and the initial values are the stub's, and come as
    arguments. All tensors have the shape of the scale.

    Attributes:
        kinds: name of each parameter -> what it is.
    """

    kinds: Mapping[str, Kind] = {}

    @abstractmethod
    def start(self, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
        """Return the parameters with which the scale is exactly ``scale``."""

    def scale(
        self, initial: Tensor, zero_point: Tensor, spec: QuantSpec, own: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the scale, float32.

        Args:
            initial: the scale before training.
            zero_point: the zero point.
            spec: how scales are stored.
            own: the parameters by name.
        """
        del zero_point, spec, own
        return initial

    def zero_point(self, initial: Tensor, spec: QuantSpec, own: Mapping[str, Tensor]) -> Tensor:
        """Return the zero point, int32."""
        del spec, own
        return initial

    def gradients(
        self, sums: Sums, scale: Tensor, zero_point: Tensor, spec: QuantSpec
    ) -> Sequence[Tensor]:
        """Return the gradient for each parameter, in the order of ``kinds``."""
        del sums, scale, zero_point, spec
        return ()


class Fixed(Learner):
    """Nothing is trained: the straight-through estimator of Bengio et al., arXiv:1308.3432."""

    def start(self, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
        """Return no parameters."""
        del scale, zero_point, spec
        return {}


class Lsq(Learner):
    """The scale is ``initial * exp(gain)``, by the gradient of learned step size quantization.

    The gradient is ``g / scale * dL/dscale`` with ``g = 1 / sqrt(count * qmax)``, and straight
    through where a scale is rounded to be stored. To first order a step of plain gradient descent
    then moves the scale as it does in the paper, where the scale itself is the parameter; a step of
    Adam, which does not care for the size of gradients, moves it by so many per mille, whether it
    is 1e-4 or 10; and it stays positive.

    Source: Esser et al., arXiv:1902.08153, sections 2.1 and 2.2.
    """

    kinds: Mapping[str, Kind] = {"gain": "scale"}

    def start(self, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
        """Return no gain."""
        del zero_point, spec
        return {"gain": torch.zeros_like(scale)}

    def scale(
        self, initial: Tensor, zero_point: Tensor, spec: QuantSpec, own: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the scale as it can be stored."""
        del zero_point
        return _grown(initial, own["gain"], spec)

    def gradients(
        self, sums: Sums, scale: Tensor, zero_point: Tensor, spec: QuantSpec
    ) -> Sequence[Tensor]:
        """Return the gradient of the gain."""
        return (_by_gain(sums, scale, zero_point, spec),)


class LsqPlus(Learner):
    """The zero point is learned too: ``initial + codes * shift``, rounded straight through.

    ``codes`` is how many steps the type has, so that a shift of .01 moves the range by a hundredth
    of its width. Inside the range the zero point has no gradient; where a code is clamped, moving
    it by one moves the value by ``-scale``. As for the gain, one step of gradient descent moves
    ``-scale * zero_point`` as in the paper, where this offset is the parameter.

    Source: Bhalgat et al., arXiv:2004.09576, section 3.1, with an integer zero point.
    """

    kinds: Mapping[str, Kind] = {"gain": "scale", "shift": "zero_point"}

    def start(self, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
        """Return no gain and no shift."""
        del zero_point, spec
        return {"gain": torch.zeros_like(scale), "shift": torch.zeros_like(scale)}

    def scale(
        self, initial: Tensor, zero_point: Tensor, spec: QuantSpec, own: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the scale as it can be stored."""
        del zero_point
        return _grown(initial, own["gain"], spec)

    def zero_point(self, initial: Tensor, spec: QuantSpec, own: Mapping[str, Tensor]) -> Tensor:
        """Return the zero point that the shift rounds to."""
        moved = initial + own["shift"] * (spec.qmax - spec.qmin)
        return moved.round().clamp(spec.qmin, spec.qmax).to(torch.int32)

    def gradients(
        self, sums: Sums, scale: Tensor, zero_point: Tensor, spec: QuantSpec
    ) -> Sequence[Tensor]:
        """Return the gradients of gain and shift."""
        clamped = (sums.below + sums.above) * _balance(sums.count, zero_point, spec)
        by_shift = -clamped / (scale * (spec.qmax - spec.qmin))
        return (_by_gain(sums, scale, zero_point, spec), by_shift)


class Pact(Learner):
    """The clip is learned, in real units, from what it cuts off; rounding has no say in it.

    ``alpha`` is the end of the range that lies further from 0; the scale is ``alpha`` over the
    codes up to there. Weight decay on it is part of the method.

    Source: Choi et al., arXiv:1805.06085, section 3.
    """

    kinds: Mapping[str, Kind] = {"alpha": "clip"}

    def start(self, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
        """Return the present clip."""
        return {"alpha": scale * _reach(zero_point, spec)}

    def scale(
        self, initial: Tensor, zero_point: Tensor, spec: QuantSpec, own: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the scale that goes with the clip; the initial one where that did not move."""
        reach = _reach(zero_point, spec)
        moved = torch.where(own["alpha"] == initial * reach, initial, own["alpha"] / reach)
        return _stored(moved, initial, spec)

    def gradients(
        self, sums: Sums, scale: Tensor, zero_point: Tensor, spec: QuantSpec
    ) -> Sequence[Tensor]:
        """Return the gradient of the clip."""
        del scale
        down, up = spec.qmin - zero_point, spec.qmax - zero_point
        return ((sums.below * down + sums.above * up) / _reach(zero_point, spec),)


class Tqt(Learner):
    """Powers of two: the scale is ``initial * 2^ceil(gain)``, learned in the log domain.

    The gain starts half an octave below where the scale would double.

    Source: Jain et al., arXiv:1903.08066, section 3.3.
    """

    kinds: Mapping[str, Kind] = {"gain": "scale"}

    def start(self, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
        """Return a gain that rounds up to 0."""
        del zero_point, spec
        return {"gain": torch.full_like(scale, -0.5)}

    def scale(
        self, initial: Tensor, zero_point: Tensor, spec: QuantSpec, own: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the power of two."""
        del zero_point
        return _stored(initial * own["gain"].ceil().exp2(), initial, spec)

    def gradients(
        self, sums: Sums, scale: Tensor, zero_point: Tensor, spec: QuantSpec
    ) -> Sequence[Tensor]:
        """Return the gradient of the logarithm of the threshold."""
        return (_by_scale(sums, zero_point, spec) * scale * LN2,)


LEARNERS: Mapping[Training, Learner] = {
    "fixed": Fixed(),
    "follow": Fixed(),
    "lsq": Lsq(),
    "lsq+": LsqPlus(),
    "pact": Pact(),
    "tqt": Tqt(),
}


def rule(learner: Learner, grid: Grid, limit: Tensor, learns: Sequence[bool]) -> Rule:
    """Return how gradients follow from the sums of a backward pass.

    Args:
        learner: what is trained.
        grid: scale and zero point of the forward pass.
        limit: largest scale; there, what would enlarge it further gets no gradient.
        learns: for each parameter whether it has a gradient other than 0.
    """

    def gradients(sums: Sums) -> Sequence[Tensor]:
        found = list(learner.gradients(sums, grid.scale, grid.zero_point, grid.spec))
        found[0] = torch.where(grid.scale < limit, found[0], found[0].clamp(min=0))
        pairs = zip(found, learns, strict=True)
        return [value if on else torch.zeros_like(value) for value, on in pairs]

    return gradients


def _grown(initial: Tensor, gain: Tensor, spec: QuantSpec) -> Tensor:
    """Return ``initial * exp(gain)`` as it can be stored."""
    return _stored(initial * gain.exp(), initial, spec)


def _by_gain(sums: Sums, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return the gradient of the logarithm of the scale, as ``Lsq`` says."""
    step = _by_scale(sums, zero_point, spec)
    return step * _balance(sums.count, zero_point, spec) / scale


def _by_scale(sums: Sums, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return the gradient of the scale."""
    down, up = spec.qmin - zero_point, spec.qmax - zero_point
    return sums.inside + sums.below * down + sums.above * up


def _reach(zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return the most codes that there are on one side of zero."""
    return torch.maximum(spec.qmax - zero_point, zero_point - spec.qmin).to(torch.float32)


def _balance(count: int, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return the factor that makes relative steps of scales and weights alike."""
    return (count * _reach(zero_point, spec)).rsqrt()


def _stored(scale: Tensor, initial: Tensor, spec: QuantSpec) -> Tensor:
    """Return a scale as it can be stored, no smaller than the initial one or ``MIN_SCALE``."""
    scale = scale.maximum(initial.clamp(max=MIN_SCALE))
    if spec.scale_type == "float32" and not spec.power_of_two:
        return scale
    return round_scale(scale, spec).to(torch.float32)
