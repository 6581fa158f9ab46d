"""Put quantization on a wrapped model, and keep track of what sits where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import onnx_ir as ir
from torch import nn

from qwrap.config import QConfig
from qwrap.errors import ConfigError
from qwrap.graph.canonical import canonicalize
from qwrap.graph.index import OnnxGraph, opset_of
from qwrap.graph.opset import raise_opset
from qwrap.graph.pads import fold_pads
from qwrap.model.materialize import materialize
from qwrap.model.points import Point, UsePoint, ValuePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.exact import exact_program
from qwrap.quant.observers import HistogramObserver, MinMaxObserver, Observer
from qwrap.quant.placement import place
from qwrap.quant.plan import QuantPlan
from qwrap.quant.stubs import BiasStub, Stub

PER_AXIS_OPSET = 13  # QuantizeLinear-13 brought ``axis``


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
        ConfigError: a selector of ``config`` fits no node.
    """
    config = config or QConfig()
    draft = materialize(model)
    before = {name: id(v.const_value) for name, v in draft.graph.initializers.items()}
    changes = _raise_opset(draft, config)
    changes += canonicalize(draft) + fold_pads(draft, model.layout.values.constants)
    kept = {
        name
        for name, v in draft.graph.initializers.items()
        if before.get(name) == id(v.const_value)
    }
    model.rewrite(OnnxGraph(draft), kept)
    plan = place(model.layout, config)
    plan.changes = changes
    install(model, plan, config, {})
    return plan


def _raise_opset(draft: ir.Model, config: QConfig) -> list[str]:
    """Let ``draft`` import an opset that carries what ``config`` asks for, in place."""
    specs = (config.activation_spec, config.weight_spec(0))
    needed = max(spec.dtype.opset for spec in specs)
    needed = max(needed, PER_AXIS_OPSET if config.per_channel else 0)
    before = opset_of(draft, "")
    if before >= needed:
        return []
    lines = raise_opset(draft, max(needed, PER_AXIS_OPSET))
    return [f"opset {before} raised to {opset_of(draft, '')}", *lines]


def install(
    model: WrappedModel, plan: QuantPlan, config: QConfig, observers: Mapping[str, Observer]
) -> None:
    """Put the stubs of ``plan`` on ``model``, in place; tensors keep the observers given."""
    stubs: dict[Point, nn.Module] = {}
    for key, tensor in plan.sources().items():
        observer = observers.get(key) or _new_observer(key, config)
        stubs[ValuePoint(key)] = Stub(key, tensor.spec, observer=None if tensor.fixed else observer)
    for (node, index), constant in plan.constants.items():
        value = model.stored(constant.value)
        assert value is not None
        axis = constant.spec.axis
        channels = 1 if axis is None else value.shape[axis]
        stubs[UsePoint(node, index)] = Stub(constant.value, constant.spec, channels)
    for (node, index), bias in plan.biases.items():
        activation, weight = stubs[ValuePoint(bias.activation)], stubs[UsePoint(*bias.weight)]
        assert isinstance(activation, Stub)
        assert isinstance(weight, Stub)
        stubs[UsePoint(node, index)] = BiasStub(bias.value, activation, weight)
    device = next((p.device for p in model.parameters()), None)
    model.attach({point: stub.to(device) for point, stub in stubs.items()})
    model.plan, model.config = plan, config
    model.programs["exact"] = partial(exact_program, model)


def _new_observer(name: str, config: QConfig) -> Observer:
    return MinMaxObserver(name) if config.method == "minmax" else HistogramObserver(name)


def plan_of(model: WrappedModel) -> QuantPlan:
    """Return the plan of a prepared model.

    Raises:
        ConfigError: the model is not prepared.
    """
    if not isinstance(model.plan, QuantPlan):
        raise ConfigError("the model is not prepared; call qwrap.prepare(model) first")
    return model.plan


def stubs(model: WrappedModel) -> Iterator[tuple[Point, Stub]]:
    """Yield the stubs on activations and weights."""
    for point in model.attached:
        module = model.tap(point)
        if isinstance(module, Stub):
            yield point, module


def bias_stubs(model: WrappedModel) -> Iterator[tuple[UsePoint, BiasStub]]:
    """Yield the stubs on biases."""
    for point in model.attached:
        module = model.tap(point)
        if isinstance(module, BiasStub) and isinstance(point, UsePoint):
            yield point, module
