"""From what was observed, and from weights, to every scale of a prepared model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwrap.model.points import Point, UsePoint, ValuePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams, choose_qparams, shrink_into
from qwrap.quant.bounds import bounds_of
from qwrap.quant.observers import Observer
from qwrap.quant.prepare import config_of, plan_of, stubs
from qwrap.quant.ranges import choose_ranges, choose_weight_range
from qwrap.quant.stubs import Stub
from qwrap.quant.unify import unify_joined

LARGEST_BIAS = 2**30  # codes; half of int32, so that the accumulator has room beside it


def fix_scales(model: WrappedModel) -> None:
    """Choose the scale of every quantized tensor, in place."""
    _set_activations(model)
    _set_constants(model)
    _set_tables(model)
    _fit_biases(model)


def stored(model: WrappedModel, value: str) -> Tensor:
    """Return a constant of the model as it is now."""
    tensor = model.stored(value)
    assert tensor is not None
    return tensor


def _set_activations(model: WrappedModel) -> None:
    plan, config = plan_of(model), config_of(model)
    watched: list[tuple[Stub, Observer]] = []
    for _, stub in stubs(model):
        tensor = plan.tensors.get(stub.name)
        if stub.observer is not None:
            watched.append((stub, stub.observer))
        elif tensor is not None and tensor.fixed is not None:
            scale, zero_point = tensor.fixed
            stub.set_qparams(QParams(torch.tensor([scale]), torch.tensor([zero_point])))
    if not watched:
        return
    found = choose_ranges(
        [o for _, o in watched],
        [s.spec for s, _ in watched],
        [config.method] * len(watched),
        [config.percentile] * len(watched),
    )
    ends = [(low.item(), high.item()) for low, high in found]
    ranges = {stub.name: pair for (stub, _), pair in zip(watched, ends, strict=True)}
    ranges = unify_joined(plan, model.graph, ranges)
    for stub, _ in watched:
        low, high = ranges[stub.name]
        qparams = choose_qparams(torch.tensor(low), torch.tensor(high), stub.spec)
        low_bound, high_bound = _bounds(model, stub.name)
        stub.set_qparams(shrink_into(qparams, low_bound, high_bound, stub.grid))


def _bounds(model: WrappedModel, key: str) -> tuple[float, float]:
    """Return where the activation that tensor ``key`` comes out of cuts, if it was absorbed.

    onnxruntime removes it only if none of the output's codes lies outside.
    """
    node = model.graph.values[key].producer()
    if node is None or plan_of(model).nodes[model.graph.node_key(node)].role != "absorbed":
        return -math.inf, math.inf
    bounds = bounds_of(model.layout.values, node)
    assert bounds is not None
    return bounds


@torch.no_grad()
def _set_constants(model: WrappedModel) -> None:
    for point, constant in plan_of(model).constants.items():
        stub = _stub(model, UsePoint(*point))
        value, method = stored(model, constant.value), config_of(model).weight_method
        low, high = choose_weight_range(value, stub.spec, method)
        stub.set_qparams(choose_qparams(low, high, stub.spec))


def _set_tables(model: WrappedModel) -> None:
    """Give what is looked up in a constant table the scale of the table, in place."""
    for key, tensor in plan_of(model).tensors.items():
        if tensor.table is not None:
            table = _stub(model, UsePoint(*tensor.table))
            _stub(model, ValuePoint(key)).set_qparams(table.qparams)


@torch.no_grad()
def _fit_biases(model: WrappedModel) -> None:
    """Enlarge the weight scale of channels whose bias would overflow int32, in place."""
    for bias in plan_of(model).biases.values():
        weight = _stub(model, UsePoint(*bias.weight))
        activation = _stub(model, ValuePoint(bias.activation))
        least = stored(model, bias.value).abs() / (activation.scale * LARGEST_BIAS)
        if weight.scale.numel() == 1:
            least = least.max().reshape(1)
        weight.scale.copy_(torch.maximum(weight.scale, least))


def _stub(model: WrappedModel, point: Point) -> Stub:
    stub = model.tap(point)
    assert isinstance(stub, Stub)
    return stub
