"""Train the rounding of one unit so that its outputs come close to the float ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qwrap.errors import ConfigError
from qwrap.model.part import part_of
from qwrap.model.wrapped import WrappedModel
from qwrap.reconstruct.drop import mix
from qwrap.reconstruct.stream import Batch, Stream
from qwrap.reconstruct.trainee import Choice, Trainee, frozen
from qwrap.reconstruct.units import Unit

BETAS = (20.0, 2.0)  # of the regularizer, first and last
WARM_UP = 0.2  # of the iterations are without it
EQUAL: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How units are trained.

    Attributes:
        iterations: for each unit.
        batch_size: samples in each.
        lr: of what decides on the rounding.
        scale_lr: of the scales of activations.
        bias_lr: of biases, in units of the noise of rounding.
        decisiveness: weight of the regularizer that makes choices clear, relative to the error to
            begin with and to the number of weights.
        choice: what is learned.
    """

    iterations: int
    batch_size: int
    lr: float
    scale_lr: float = 0.0
    bias_lr: float = 0.0
    decisiveness: float = 30.0
    choice: Choice = field(default_factory=Choice)

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 1 or more")
        for name in ("lr", "scale_lr", "bias_lr", "decisiveness"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a number from 0 on")


@dataclass(frozen=True, slots=True)
class Fitted:
    """What became of a unit.

    Attributes:
        kept: whether it is trained; else it is as it was.
        before: squared error of its outputs for held-back samples, relative to their power.
        after: the same as it was trained, infinite if nothing could be.
    """

    kept: bool
    before: float
    after: float


def fit(
    model: WrappedModel,
    reference: WrappedModel,
    unit: Unit,
    stream: Stream,
    recipe: Recipe,
    generator: torch.Generator,
    weights: Mapping[str, Tensor] = EQUAL,
) -> Fitted:
    """Train a unit that ``stream`` has entered, in place; undo it if held-back samples lose.

    Args:
        model: calibrated.
        reference: the float model.
        unit: of it.
        stream: stands before the unit.
        recipe: how to train.
        generator: draws samples, and what is not rounded.
        weights: activation -> how much the error of each element counts.
    """
    part = part_of(model, unit.inputs, unit.outputs, shared=True)
    task = _Task(part, unit, stream, weights)
    before, after = task.error(stream.deciding), math.inf
    if not before or not math.isfinite(before):
        return Fitted(False, before, before)
    with frozen(part):
        trainee = Trainee(model, reference, part, unit, recipe.choice, generator)
        saved = [(tensor, tensor.detach().clone()) for tensor in trainee.touched()]
        try:
            if _learn(task, trainee, before, recipe, generator):
                trainee.finish()
                after = task.error(stream.deciding)
        finally:
            if not after < before:
                with torch.no_grad():
                    for tensor, values in saved:
                        tensor.copy_(values)
    return Fitted(after < before, before, after)


class _Task:
    """What a unit is to learn.

    Args:
        part: the unit as a model.
        unit: where it is.
        stream: has the samples.
        weights: activation -> how much the error of each element counts.
    """

    def __init__(
        self, part: WrappedModel, unit: Unit, stream: Stream, weights: Mapping[str, Tensor]
    ) -> None:
        self.part, self.unit, self.stream = part, unit, stream
        self._weights = [weights.get(key) for key in unit.outputs]
        self._names = part.input_names
        first = next(self.batches(stream.learning))
        self._powers = [_power(target) for target in first.targets]

    def batches(self, ids: Iterable[int]) -> Iterator[Batch]:
        """Yield samples in batches."""
        return self.stream.batches(self.unit, self._names, ids)

    def loss(self, batch: Batch, inputs: Sequence[Any]) -> Tensor:
        """Return the mean squared error of the outputs, each relative to its power."""
        made = self.part(*inputs)
        outputs = made if isinstance(made, tuple) else (made,)
        total = torch.zeros(())
        each = zip(outputs, batch.targets, self._powers, self._weights, strict=True)
        for output, target, power, weight in each:
            if power:
                error = torch.where(target.isfinite(), output - target, 0).square()
                weighted = error if weight is None else error * weight
                total = total.to(error.device) + weighted.mean() / power
        return total

    @torch.no_grad()
    def error(self, ids: Sequence[int]) -> float:
        """Return the mean loss of samples."""
        losses = [
            float(self.loss(batch, batch.quantized)) * batch.size for batch in self.batches(ids)
        ]
        return sum(losses) / len(ids)


def _power(target: Any) -> float:
    """Return the mean square of a float tensor, 0 for what there is no error of."""
    if not isinstance(target, Tensor) or not target.is_floating_point() or not target.numel():
        return 0.0
    finite = torch.where(target.isfinite(), target, 0)
    return float(finite.square().mean(dtype=torch.float64))


def _learn(
    task: _Task, trainee: Trainee, error: float, recipe: Recipe, generator: torch.Generator
) -> bool:
    """Train; return False if nothing gets a gradient.

    Args:
        task: what to learn.
        trainee: what learns.
        error: of the outputs before.
        recipe: how.
        generator: draws samples.
    """
    groups = trainee.groups(recipe.lr, recipe.scale_lr, recipe.bias_lr)
    if not groups:
        return False
    optimizer = torch.optim.Adam(groups)
    ids = task.stream.learning
    pressure = recipe.decisiveness * error / trainee.size
    with task.part.running(trainee.program):
        for step in range(recipe.iterations):
            optimizer.zero_grad()
            drawn = torch.randperm(len(ids), generator=generator)[: recipe.batch_size]
            chosen = [ids[i] for i in drawn.tolist()]
            for batch in task.batches(chosen):
                loss = task.loss(batch, _mixed(batch, recipe.choice.drop, generator))
                if not loss.requires_grad:
                    return False
                (loss * (batch.size / len(chosen))).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            beta = _beta(step / recipe.iterations)
            if beta is not None:
                for rounding in trainee.roundings.values():
                    (pressure * rounding.regularizer(beta)).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
    return True


def _beta(progress: float) -> float | None:
    """Return the exponent of the regularizer, falling in half a cosine; None in the beginning."""
    if progress < WARM_UP:
        return None
    first, last = BETAS
    share = (progress - WARM_UP) / (1 - WARM_UP)
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def _mixed(batch: Batch, drop: float, generator: torch.Generator) -> list[Any]:
    """Return the inputs of a unit, each element with probability ``drop`` as in the float model."""
    if not drop:
        return batch.quantized
    return [_mix(x, y, drop, generator) for x, y in zip(batch.quantized, batch.floats, strict=True)]


def _mix(quantized: Any, exact: Any, drop: float, generator: torch.Generator) -> Any:
    is_float = isinstance(quantized, Tensor) and quantized.is_floating_point()
    if not is_float or quantized is exact or quantized.shape != exact.shape:
        return quantized
    return mix(exact, quantized, drop, generator)
