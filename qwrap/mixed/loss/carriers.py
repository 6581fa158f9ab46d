"""Calibrated copies of a model, one for each choice of types, whose stubs are switched at will."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from qwrap.config import QConfig
from qwrap.errors import ConfigError
from qwrap.mixed.choices import Choice, Group, config_with
from qwrap.model.batches import count_batches, iterate
from qwrap.model.points import Point, UsePoint, ValuePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.samples import Samples, is_divisible
from qwrap.quant.calibrate import calibrating
from qwrap.quant.plan import QuantPlan
from qwrap.quant.prepare import config_of, plan_of, prepare, set_mode, stubs
from qwrap.quant.stubs import Switch


@dataclass(frozen=True, slots=True, order=True)
class NodeSwitch:
    """A node that is switched as a whole, to compute in half precision."""

    node: str


Place = Point | NodeSwitch
"""Where something can be switched."""


class Carrier:
    """A calibrated copy in which all has one choice of types; it computes in float until switched.

    Args:
        choice: of types.
        model: the copy, in ``eval`` mode; its stubs are switched off, in place.
    """

    def __init__(self, choice: Choice, model: WrappedModel) -> None:
        self.choice, self.model = choice, model
        taps: dict[Place, Any] = {point: model.tap(point) for point in model.attached}
        taps |= {NodeSwitch(key): model.substitute(key) for key in model.replaced}
        self._taps = {place: tap for place, tap in taps.items() if isinstance(tap, Switch)}
        self._on: frozenset[Place] = frozenset()
        set_mode(model, "float")

    @property
    def points(self) -> frozenset[Place]:
        """Where there is something to switch."""
        return frozenset(self._taps)

    def tap(self, point: Place) -> Switch:
        """Return what is switched at ``point``."""
        return self._taps[point]

    def switch(self, points: Iterable[Place]) -> None:
        """Quantize what is at ``points``, in place, and nothing else."""
        wanted = frozenset(points)
        for point in self._on - wanted:
            self._taps[point].mode = "float"
        for point in wanted - self._on:
            self._taps[point].mode = "quantize"
        self._on = wanted


def own_choice(model: WrappedModel) -> Choice:
    """Return the types that a model is prepared with."""
    config = config_of(model)
    activation = config.activation_spec
    return Choice(
        "float32" if activation is None else activation.dtype.name,
        config.weight_spec(None, 0).dtype.name,
    )


def as_prepared(model: WrappedModel, batches: Iterable[Any], samples: Samples) -> Carrier:
    """Return a copy with the scales that ``model`` has; ``samples`` takes in batches, in place.

    Raises:
        NotCalibratedError: it has none yet.
        InputError: a batch does not fit, or there is none.
    """
    for _, stub in stubs(model):
        _ = stub.qparams  # raises
    divisible = is_divisible(model)
    for inputs in iterate(batches, model):
        samples.take(inputs, divisible=divisible)
        if samples.is_full:
            break
    return Carrier(own_choice(model), copy.deepcopy(model).eval())


def calibrated(
    model: WrappedModel,
    configs: Mapping[Choice, QConfig],
    batches: Iterable[Any],
    samples: Samples,
    *,
    progress: bool,
) -> list[Carrier]:
    """Return a copy for each choice, prepared and calibrated; all data is read once.

    Args:
        model: what to copy, prepared or not.
        configs: how to prepare the copies.
        batches: as for ``calibrate``.
        samples: takes in the first ones, in place.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: a copy cannot be prepared so, or nothing of it is quantized.
        InputError: a batch does not fit, or there is none.
    """
    copies = {choice: _prepared(model, config) for choice, config in configs.items()}
    divisible = is_divisible(model)
    total, off = count_batches(batches), None if progress else True
    with torch.no_grad(), ExitStack() as stack:
        for copied in copies.values():
            stack.enter_context(calibrating(copied))
        each = iterate(batches, model)
        for inputs in tqdm(each, "calibrating", total, unit="batch", disable=off):
            samples.take(inputs, divisible=divisible)
            for copied in copies.values():
                copied(**inputs)
    _share_weights([*copies.values()])
    for copied in copies.values():
        copied.samples = None
    carriers = [Carrier(choice, copied) for choice, copied in copies.items()]
    for carrier in carriers:
        if not carrier.points:
            raise ConfigError(f"choice {carrier.choice}: nothing of the model is quantized in it")
    return carriers


def _prepared(model: WrappedModel, config: QConfig) -> WrappedModel:
    copied = copy.deepcopy(model).eval()
    prepare(copied, config)
    return copied


def configs_of(
    config: QConfig, groups: Sequence[Group], choices: Sequence[Choice]
) -> dict[Choice, QConfig]:
    """Return for each choice ``config`` with all ``groups`` in it.

    Raises:
        ConfigError: no region can have a choice.
    """
    every = [replace(group, choices=tuple(choices)) for group in groups]
    names = [group.name for group in groups]
    found = {c: config_with(config, every, dict.fromkeys(names, c)) for c in choices}
    methods = {config.method, *(override.method for _, override in config.overrides)}
    for asked in found.values():
        asked.kept_samples = config.kept_samples if "auto" in methods else 0
    return found


def _share_weights(models: Sequence[WrappedModel]) -> None:
    """Let copies have the tensors of the first one where they are equal, in place."""
    own = dict(models[0].named_parameters())
    for other in models[1:]:
        for name, parameter in other.named_parameters():
            first = own.get(name)
            if first is not None and first.shape == parameter.shape and first.equal(parameter):
                parameter.data = first.data


# --- what belongs to what ------------------------------------------------------------------------


def switches_of(carrier: Carrier, groups: Iterable[Group]) -> dict[str, frozenset[Place]]:
    """Return for each group what switches its nodes and quantizes what they read and make."""
    plan, places = plan_of(carrier.model), carrier.points
    constants: dict[str, list[Point]] = {}
    for node, index in plan.constants:
        constants.setdefault(node, []).append(UsePoint(node, index))
    for (node, index), bias in plan.biases.items():  # an Add may have the bias of a MatMul
        constants.setdefault(bias.weight[0], []).append(UsePoint(node, index))
    found: dict[str, frozenset[Place]] = {}
    for group in groups:
        points: set[Place] = set()
        points.update(NodeSwitch(key) for key in group.nodes if NodeSwitch(key) in places)
        for key in group.nodes:
            points.update(constants.get(key, ()), _activations(carrier.model, plan, key))
        found[group.name] = frozenset(points)
    return found


def _activations(model: WrappedModel, plan: QuantPlan, key: str) -> Iterator[Point]:
    """Yield the stubs on what a node reads and makes, conversions and what they are made of."""
    planned = plan.nodes.get(key)
    if planned is None or planned.role == "float":
        return
    node = model.graph.nodes[key]
    uses = [(v, i) for i, v in enumerate(node.inputs) if v is not None]
    for value, index in (*uses, *((v, None) for v in node.outputs if v.name)):
        tensor = plan.tensors.get(model.graph.key(value))
        if tensor is None:
            continue
        yield from _made_of(plan, tensor.source)
        if index is not None and tensor.read_by(key, index) is not None:
            yield UsePoint(key, index)


def _made_of(plan: QuantPlan, source: str) -> Iterator[Point]:
    """Yield the stub of a scale; of a conversion's, also that of the tensor."""
    for base, conversion in plan.conversions():
        if conversion.key == source:
            yield from conversion.points
            yield from _made_of(plan, plan.tensors[base].source)
            return
    yield ValuePoint(source)


def tensors_of(carrier: Carrier) -> dict[str, frozenset[Place]]:
    """Return the stubs of every tensor with a scale of its own.

    A bias goes with its weight, and a conversion with the tensor that is converted.
    """
    plan = plan_of(carrier.model)
    found: dict[str, set[Place]] = {key: {ValuePoint(key)} for key in plan.sources()}
    for key, conversion in plan.conversions():
        for point in _made_of(plan, plan.tensors[key].source):
            if isinstance(point, ValuePoint):
                found[point.value].update(conversion.points)
    for (node, index), constant in plan.constants.items():
        found.setdefault(constant.value, set()).add(UsePoint(node, index))
    for (node, index), bias in plan.biases.items():
        found[plan.constants[bias.weight].value].add(UsePoint(node, index))
    return {name: frozenset(points) for name, points in found.items()}
