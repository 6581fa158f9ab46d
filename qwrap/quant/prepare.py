"""Put quantization on a wrapped model, and keep track of what sits where."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from qwrap.config import QConfig
from qwrap.errors import ConfigError
from qwrap.graph.canonical import canonicalize
from qwrap.graph.fold import FoldedNorms
from qwrap.graph.index import OnnxGraph, opset_of
from qwrap.graph.pads import fold_pads
from qwrap.model.layout import Layout
from qwrap.model.materialize import materialize
from qwrap.model.points import Point, UsePoint, ValuePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import scale_shape
from qwrap.quant.bounds import bounds_of
from qwrap.quant.clamp import Clamp
from qwrap.quant.exact import exact_program
from qwrap.quant.functions import check_functions
from qwrap.quant.half import half_nodes, put_half
from qwrap.quant.live import LIVE, LivePlan, keep, live_layers, live_notes, plan_live, put_live
from qwrap.quant.observe.observers import HistogramObserver, MinMaxObserver, Observer
from qwrap.quant.placement.opsets import let_carry
from qwrap.quant.placement.place import place
from qwrap.quant.placement.regions import Types
from qwrap.quant.plan import ConstantPlan, Conversion, QuantPlan, TensorPlan
from qwrap.quant.stubs import BiasStub, Mode, Stub


def prepare(model: WrappedModel, config: QConfig | None = None) -> QuantPlan:
    """Fold what onnxruntime would fold and put quantization stubs on ``model``, in place.

    The model goes on computing in float until it is calibrated. Preparing again starts afresh.

    Args:
        model: a wrapped model, trained or not; its current parameters are what is quantized.
        config: types, granularity, exclusions; by default uint8 activations and int8 weights per
            output channel, which onnxruntime runs fastest on CPUs.

    Returns:
        The plan; ``plan.summary()`` says what is quantized and, for the rest, why not. It is also
        ``model.plan``.

    Raises:
        ConfigError: a selector of ``config`` fits no node, or the model was loaded to compute in
            another type than float32.
    """
    if model.layout.settings.dtype not in (None, torch.float32):
        raise ConfigError(
            f"the model was loaded with dtype={model.layout.settings.dtype}, but scales and codes "
            "are those of float32; load it without dtype (torch.autocast may be used)"
        )
    config = copy.deepcopy(config) if config else QConfig()
    draft = materialize(model, lasting=True)  # it stays what the float model is held against
    before = {name: v.const_value for name, v in draft.graph.initializers.items()}
    changes = let_carry(draft, config)
    check_functions(config, opset_of(draft, ""))
    folded: FoldedNorms = {}
    changes += canonicalize(draft, folded) + fold_pads(draft, model.layout.values.constants)
    live = LivePlan()
    if config.bn == "live":
        live = plan_live(model, draft, folded, before, _in_half(model, draft, config))
    kept = {n for n, v in draft.graph.initializers.items() if before.get(n) is v.const_value}
    kept = (kept - model.remade.keys()) | live.weights
    model.rewrite(OnnxGraph(draft, model.graph.source), kept)
    put_live(model, live)
    changes += live.changes
    plan = place(model.layout, config)
    plan.changes = changes
    install(model, plan, config)
    return plan


def _in_half(model: WrappedModel, draft: ir.Model, config: QConfig) -> set[str]:
    """Return the keys of the nodes of a draft that are to compute in float16."""
    if not any(region.activation == "float16" for region in config.regions):
        return set()
    graph = OnnxGraph(draft)
    nodes = Types(Layout(graph, model.layout.settings), config).in_half()
    return {graph.node_key(node) for node in nodes}


def install(model: WrappedModel, plan: QuantPlan, config: QConfig) -> None:
    """Put the stubs of ``plan`` on ``model``, in place; those of an earlier plan stay where due.

    A tensor that had another one's scale before takes a copy of what was observed there.
    """
    stubs: dict[Point, nn.Module] = {}
    for key, tensor in plan.sources().items():
        stubs[ValuePoint(key)] = _activation_stub(model, key, tensor, config)
    for _, conversion in plan.conversions():
        stub = _conversion_stub(model, conversion)
        stubs |= dict.fromkeys(conversion.points, stub)
    for key, conversion in plan.conversions():
        made, base = stubs[conversion.points[0]], stubs[plan.point_of(plan.tensors[key].source)]
        assert isinstance(made, Stub)
        assert isinstance(base, Stub)
        made.convert(base)
    for (node, index), constant in plan.constants.items():
        point = UsePoint(node, index)
        shared = None if constant.shared is None else UsePoint(*constant.shared)
        stubs[point] = stubs[shared] if shared else _constant_stub(model, point, constant)
    for (node, index), bias in plan.biases.items():
        activation, weight = stubs[plan.point_of(bias.activation)], stubs[UsePoint(*bias.weight)]
        assert isinstance(activation, Stub)
        assert isinstance(weight, Stub)
        stubs[UsePoint(node, index)] = BiasStub(bias.value, activation, weight)
    live = [key for key, _ in live_layers(model)]
    decisions = Decisions(plan.without, *_left_out(model, stubs.values()), live)
    plan.notes = _with_live(plan.notes, model)
    device = next((p.device for p in model.parameters()), None)
    put_half(model, plan.half)
    for new in set(stubs.values()) - {model.tap(point) for point in model.attached}:
        new.train(model.training)  # else what follows the data would do so in ``eval`` mode too
    model.attach(
        {point: stub.to(device) for point, stub in stubs.items()},
        _clamps(model, plan, stubs),
    )
    model.add_module("quantization", decisions)
    model.plan, model.config = plan, config
    model.programs["exact"] = partial(exact_program, model)
    model.before_loading = follow_saved_decisions


class Decisions(nn.Module):
    """What calibration decided about the placement, as part of the ``state_dict``.

    Attributes:
        without: node key -> why the node was returned to float.
        batches: how many the observers saw.
        left_out: tensor -> observer, of those that nothing quantizes since then.
        live: keys of the nodes that have a batch normalization.
    """

    def __init__(
        self,
        without: Mapping[str, str],
        left_out: Mapping[str, Observer] | None = None,
        batches: int = 0,
        live: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.without, self.batches, self.live = dict(without), batches, sorted(live)
        self.left_out = dict(left_out or {})

    def get_extra_state(self) -> dict[str, Any]:
        """Return the decisions, and the statistics of what was left out."""
        left_out = {name: found.get_extra_state() for name, found in self.left_out.items()}
        return {
            "without": dict(self.without),
            "batches": self.batches,
            "left_out": left_out,
            "live": list(self.live),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over saved decisions, which ``follow_saved_decisions`` has carried out by now."""
        self.without, self.batches = dict(state["without"]), state["batches"]
        self.left_out = {name: _restored(name, saved) for name, saved in state["left_out"].items()}
        self.live = list(state.get("live", ()))


def _restored(name: str, state: dict[str, Any]) -> Observer:
    observer = HistogramObserver(name) if "bins" in state else MinMaxObserver(name)
    observer.set_extra_state(state)
    return observer


def decisions_of(model: WrappedModel) -> Decisions:
    """Return what calibration decided about a prepared model.

    Raises:
        ConfigError: the model is not prepared.
    """
    plan_of(model)
    decisions = model.get_submodule("quantization")
    assert isinstance(decisions, Decisions)
    return decisions


def observers(model: WrappedModel) -> dict[str, Observer]:
    """Return what watches or watched tensors of a prepared model, by the tensor's name.

    A copy that was made for a tensor which lost its source has the name of that source.

    Raises:
        ConfigError: the model is not prepared.
    """
    found = {stub.observer.name: stub.observer for _, stub in stubs(model) if stub.observer}
    return decisions_of(model).left_out | found


def _left_out(model: WrappedModel, taps: Iterable[nn.Module]) -> tuple[dict[str, Observer], int]:
    """Return the observers that will be on none of ``taps``, and how many batches they saw."""
    if not isinstance(model.plan, QuantPlan):
        return {}, 0
    kept = {tap.observer.name for tap in taps if isinstance(tap, Stub) and tap.observer}
    left_out = {name: found for name, found in observers(model).items() if name not in kept}
    return left_out, decisions_of(model).batches


def place_without(model: WrappedModel, without: Mapping[str, str]) -> None:
    """Place again, in place, with the nodes ``without`` in float.

    Raises:
        ConfigError: it is a quantized file that says where quantization is.
    """
    if model.origin is not None:
        if without:
            listed = "; ".join(f"node {key!r}: {reason}" for key, reason in without.items())
            raise ConfigError(
                f"{listed}. The file that the model came from quantizes them all the same; call "
                "qwrap.prepare(model) to place quantization anew"
            )
        return
    earlier = plan_of(model)
    plan = place(model.layout, config_of(model), without=without)
    plan.changes, plan.outcomes = earlier.changes, earlier.outcomes
    install(model, plan, config_of(model))


def follow_saved_decisions(model: WrappedModel, state: Mapping[str, Any]) -> None:
    """Put stubs where the model had them whose ``state_dict`` is about to be loaded, in place."""
    saved = state.get("quantization._extra_state", {})
    live = saved.get("live", decisions_of(model).live)
    if live != decisions_of(model).live:
        keep_live(model, live)
    without = saved.get("without", {})
    if without != plan_of(model).without:
        place_without(model, without)


def keep_live(model: WrappedModel, nodes: Iterable[str]) -> None:
    """Let exactly ``nodes`` have a batch normalization, in place; new ones change nothing."""
    keep(model, nodes)
    decisions_of(model).live = sorted(key for key, _ in live_layers(model))
    plan_of(model).notes = _with_live(plan_of(model).notes, model)


def _with_live(notes: Iterable[str], model: WrappedModel) -> list[str]:
    return [*(line for line in notes if not line.startswith(LIVE)), *live_notes(model)]


def _clamps(
    model: WrappedModel, plan: QuantPlan, stubs: Mapping[Point, nn.Module]
) -> dict[str, Clamp]:
    """Return what computes the activations that are absorbed into the clamp of a stub."""
    found: dict[str, Clamp] = {}
    for key, node in plan.nodes.items():
        if node.role != "absorbed":
            continue
        output = model.graph.key(model.graph.nodes[key].outputs[0])
        stub, bounds = (
            stubs[ValuePoint(output)],
            bounds_of(model.layout.values, model.graph.nodes[key]),
        )
        assert isinstance(stub, Stub)
        assert bounds is not None
        found[key] = Clamp(stub, *bounds)
    return found


def _activation_stub(model: WrappedModel, key: str, tensor: TensorPlan, config: QConfig) -> Stub:
    if not tensor.is_observed:
        return Stub(key, tensor.spec, tensor.shape, training_by=tensor.training)
    source, earlier = key, model.plan
    if isinstance(earlier, QuantPlan) and key in earlier.tensors:
        source = earlier.observed_as(key)
    stub = model.tap(ValuePoint(source)) if ValuePoint(source) in model.attached else None
    if not isinstance(stub, Stub):
        observer: Observer | None = new_observer(key, config, tensor.spec.axis)
    elif source == key and stub.training_by == tensor.training:
        return stub
    else:
        observer = copy.deepcopy(stub.observer)
    return Stub(key, tensor.spec, tensor.shape, observer, training_by=tensor.training)


def _conversion_stub(model: WrappedModel, conversion: Conversion) -> Stub:
    """Return what gives some readers of a tensor another type; its range needs no observer."""
    point = conversion.points[0]
    stub = model.tap(point) if point in model.attached else None
    way = conversion.training
    wanted = conversion.key, conversion.spec, way
    if isinstance(stub, Stub) and (stub.name, stub.spec, stub.training_by) == wanted:
        return stub
    return Stub(conversion.key, conversion.spec, conversion.shape, training_by=way)


def _constant_stub(model: WrappedModel, point: UsePoint, constant: ConstantPlan) -> Stub:
    stub = model.tap(point) if point in model.attached else None
    if isinstance(stub, Stub):
        return stub
    value = model.stored(constant.value)
    assert value is not None
    shape = scale_shape(value.shape, constant.spec)
    way = constant.training
    return Stub(constant.value, constant.spec, shape, stored=True, training_by=way)


def new_observer(name: str, config: QConfig, axis: int | None = None) -> Observer:
    """Return what watches activation ``name`` for the range methods that ``config`` asks for.

    Args:
        name: the tensor.
        config: what the model was prepared with.
        axis: the axis of the channels that have a scale each, None for one scale.
    """
    methods = {config.method, *(o.method for _, o in config.overrides if o.method)}
    kind = MinMaxObserver if methods <= {"minmax", "ema"} else HistogramObserver
    return kind(name, axis, config.ema)


def plan_of(model: WrappedModel) -> QuantPlan:
    """Return the plan of a prepared model.

    Raises:
        ConfigError: the model is not prepared.
    """
    if not isinstance(model.plan, QuantPlan):
        raise ConfigError("the model is not prepared; call qwrap.prepare(model) first")
    return model.plan


def config_of(model: WrappedModel) -> QConfig:
    """Return what a prepared model was asked for.

    Raises:
        ConfigError: the model is not prepared.
    """
    plan_of(model)
    assert isinstance(model.config, QConfig)
    return model.config


def stubs(model: WrappedModel) -> Iterator[tuple[Point, Stub]]:
    """Yield the stubs on activations and weights, each once, with the first point it is on."""
    taken: set[Stub] = set()
    for point in model.attached:
        module = model.tap(point)
        if isinstance(module, Stub) and module not in taken:
            taken.add(module)
            yield point, module


def bias_stubs(model: WrappedModel) -> Iterator[tuple[UsePoint, BiasStub]]:
    """Yield the stubs on biases."""
    for point in model.attached:
        module = model.tap(point)
        if isinstance(module, BiasStub) and isinstance(point, UsePoint):
            yield point, module


def stub_at(model: WrappedModel, point: Point) -> Stub:
    """Return the stub on a point of a prepared model."""
    stub = model.tap(point)
    assert isinstance(stub, Stub)
    return stub


def set_mode(model: WrappedModel, mode: Mode) -> None:
    """Switch every stub, and every node of float16, to ``mode``, in place."""
    for _, switch in (*stubs(model), *bias_stubs(model), *half_nodes(model)):
        switch.mode = mode
    for kernel in model.kernels.values():
        if isinstance(kernel, Clamp):
            kernel.look()


def device_of(model: WrappedModel) -> torch.device:
    """Return where the model's parameters or buffers are."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
