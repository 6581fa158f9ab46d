"""What is learned of one unit, and what stands in for its stubs meanwhile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from qwrap.errors import ConfigError
from qwrap.model.points import Point, Program, UsePoint, ValuePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import fake_quantize
from qwrap.quant.constants import LARGEST_BIAS, deployed
from qwrap.quant.prepare import plan_of, stub_at
from qwrap.quant.stubs import BiasStub, Stub
from qwrap.reconstruct.drop import Drop, kernels_beside
from qwrap.reconstruct.learned_bias import LearnedBias
from qwrap.reconstruct.learned_scale import LearnedScale
from qwrap.reconstruct.soft_round import Rounding, SoftRound
from qwrap.reconstruct.units import Unit

Rounder = Callable[[Tensor, Stub, Tensor], Rounding]
"""Makes a rounding of a weight as it is stored, its stub, and the weight of the float model."""


def soft_round(weight: Tensor, stub: Stub, original: Tensor) -> Rounding:
    """Return AdaRound's rounding; a weight that is on its grid already starts at the float one."""
    qparams = stub.qparams
    rounded = fake_quantize(weight, qparams.scale, qparams.zero_point, stub.grid)
    start = original if torch.equal(rounded, weight) else None
    return SoftRound(weight, stub, start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to learn of a unit.

    Attributes:
        rounder: stands in for the stub of each weight.
        scales: whether the scales of activations are learned.
        biases: whether biases are.
        drop: probability with which an element of an activation is not rounded.
    """

    rounder: Rounder = soft_round
    scales: bool = False
    biases: bool = False
    drop: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ConfigError(f"drop={self.drop}: expected a probability below 1; QDrop has 0.5")


class Trainee:
    """The learned parts of one unit.

    Args:
        model: calibrated.
        reference: the float model.
        part: the unit as a model of its own; shares the tensors of ``model``.
        unit: where its weights are.
        choice: what is learned.
        generator: draws what is not rounded.

    Attributes:
        program: runs ``part`` with what is learned in place.
    """

    def __init__(
        self,
        model: WrappedModel,
        reference: WrappedModel,
        part: WrappedModel,
        unit: Unit,
        choice: Choice,
        generator: torch.Generator,
    ) -> None:
        self._model, self._part, self._unit = model, part, unit
        self.roundings: dict[str, Rounding] = {}
        self.scales: list[LearnedScale] = []
        self.biases: list[LearnedBias] = []
        taps: dict[Point, Any] = dict(part.program.taps)
        for weight in unit.weights:
            stored, original = model.stored(weight.value), reference.stored(weight.value)
            assert stored is not None
            assert original is not None
            stub = stub_at(model, UsePoint(*weight.uses[0]))
            rounding = choice.rounder(stored.detach(), stub, original.detach())
            self.roundings[weight.value] = rounding.to(stored.device)
            taps |= {UsePoint(*use): rounding for use in weight.uses}
        if choice.biases:
            taps |= self._learn_biases()
        kernels = part.program.kernels
        if choice.scales or choice.drop:
            inner, drops = self._activations(choice, generator)
            taps |= inner
            kernels = kernels_beside(kernels, drops)
        self.program = Program(taps, kernels)

    def _learn_biases(self) -> dict[Point, LearnedBias]:
        model, plan = self._model, plan_of(self._model)
        found: dict[Point, LearnedBias] = {}
        for (node, index), bias in plan.biases.items():
            stored, point = model.stored(bias.value), UsePoint(node, index)
            alone = len(list(model.graph.values[bias.value].uses())) == 1
            if node not in self._unit.nodes or not alone or not isinstance(stored, nn.Parameter):
                continue
            stub, weight = model.tap(point), model.stored(plan.constants[bias.weight].value)
            assert isinstance(stub, BiasStub)
            assert weight is not None
            if stub.scale.numel() not in (1, stored.numel()):
                continue  # one number for all channels, which have a scale each
            spec = stub_at(model, plan.point_of(bias.activation)).grid
            inputs = weight.numel() // max(stored.numel(), 1)
            learned = LearnedBias(stored, stub, inputs, spec.qmax - spec.qmin)
            found[point] = learned.to(stored.device)
        self.biases = list(found.values())
        return found

    def _activations(
        self, choice: Choice, generator: torch.Generator
    ) -> tuple[dict[Point, nn.Module], list[Drop]]:
        """Return what stands in for the stubs of activations that are this unit's alone."""
        least = _least_scales(self._model)
        taps: dict[Point, nn.Module] = {}
        drops = []
        outside = {*map(ValuePoint, self._unit.outputs)}
        for stub, points in _own_stubs(self._model, self._unit).items():
            tap: Stub | LearnedScale = stub
            if choice.scales:
                tap = LearnedScale(stub, least.get(stub, 0.0)).to(stub.initial_scale.device)
                self.scales.append(tap)
            if choice.drop and not outside.intersection(points):
                drops.append(Drop(tap, choice.drop, generator))
                taps |= dict.fromkeys(points, drops[-1])
            else:
                taps |= dict.fromkeys(points, tap)
        return {p: tap for p, tap in taps.items() if p in self._part.layout.points}, drops

    # --- training --------------------------------------------------------------------------------

    def groups(self, lr: float, scale_lr: float, bias_lr: float) -> list[dict[str, Any]]:
        """Return the parameters in groups for an optimizer, empty ones left out."""
        kinds = (
            (self.roundings.values(), lr),
            (self.scales, scale_lr),
            (self.biases, bias_lr),
        )
        groups = [
            {"params": [p for module in modules for p in module.parameters()], "lr": rate}
            for modules, rate in kinds
        ]
        return [group for group in groups if group["params"]]

    @property
    def size(self) -> int:
        """How many weights there are."""
        return sum(
            tensor.numel()
            for key in self.roundings
            if (tensor := self._model.stored(key)) is not None
        )

    def touched(self) -> Iterator[Tensor]:
        """Yield the tensors of the model that ``finish`` writes to."""
        stubs = {scale.stub for scale in self.scales}
        for weight in self._unit.weights:
            tensor = self._model.stored(weight.value)
            assert tensor is not None
            yield tensor
            stubs |= {stub_at(self._model, UsePoint(*use)) for use in weight.uses}
        for stub in stubs:
            yield from chain(stub.parameters(), stub.buffers())
        for bias in self.biases:
            yield bias.bias

    @torch.no_grad()
    def finish(self) -> None:
        """Write what was learned to the model, in place."""
        for key, rounding in self.roundings.items():
            self._model.assign(key, rounding.finish())
        for weight in self._unit.weights:  # those that are read in several places have a stub each
            first, *others = (stub_at(self._model, UsePoint(*use)) for use in weight.uses)
            for stub in others:
                stub.set_qparams(first.qparams, float(first.scale_limit))
        for scale in self.scales:
            scale.finish()
        for bias in self.biases:
            bias.finish()


@contextmanager
def frozen(part: WrappedModel) -> Iterator[None]:
    """Let no parameter of ``part`` get a gradient inside the ``with`` block."""
    stubs = [part.tap(point) for point in part.attached]
    parameters = {*part.parameters(), *(p for stub in stubs for p in stub.parameters())}
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def _own_stubs(model: WrappedModel, unit: Unit) -> Mapping[Stub, list[Point]]:
    """Return the stubs on activations that are in ``unit`` alone, with where they are."""
    places: dict[Stub, list[Point]] = defaultdict(list)
    for point in model.attached:
        stub = model.tap(point)
        if isinstance(stub, Stub) and not stub.stored:
            places[stub].append(point)
    nodes = set(unit.nodes)
    made = {
        model.graph.key(value)
        for node in unit.nodes
        for value in model.graph.nodes[node].outputs
        if value.name
    }

    def is_inside(point: Point) -> bool:
        if isinstance(point, UsePoint):
            return point.node in nodes
        return isinstance(point, ValuePoint) and point.value in made

    return {stub: points for stub, points in places.items() if all(map(is_inside, points))}


def _least_scales(model: WrappedModel) -> dict[Stub, float]:
    """Return how small the scales of activations may be, for biases to fit in 32 bits."""
    plan, found = plan_of(model), defaultdict[Stub, float](float)
    for bias in plan.biases.values():
        stub = stub_at(model, plan.point_of(bias.activation))
        scale = stub_at(model, UsePoint(*bias.weight)).scale
        least = deployed(model, bias.value).detach().abs() / (scale * LARGEST_BIAS)
        found[stub] = max(found[stub], float(least.max()))
    return found
