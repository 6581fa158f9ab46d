"""Change the float graph of a prepared model, and its parameters with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from qwrap.graph.index import OnnxGraph
from qwrap.model.layout import Layout
from qwrap.model.materialize import changed_tensors, materialize
from qwrap.model.tensors import to_torch
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.held_out import float_model, outputs_of
from qwrap.quant.placement.overrides import has_range
from qwrap.quant.plan import QuantPlan
from qwrap.quant.prepare import config_of, decisions_of, device_of, plan_of, prepare
from qwrap.quant.snapshot import OWN

Edit = Callable[[ir.Model], None]
"""Changes a copy of a model's float graph in place; the same for each copy."""
Inputs = Mapping[str, Any]


def fixed_values(model: WrappedModel) -> dict[str, str]:
    """Return the tensors and weights whose values must not be scaled, by value key, and why.

    Such are those that the user gave a range, and weights that batch normalization computes.
    """
    plan, fixed = plan_of(model), dict[str, str]()
    for key, tensor in plan.tensors.items():
        source = plan.tensors.get(tensor.source, tensor)
        given = any(t.override is not None and has_range(t.override) for t in (tensor, source))
        if (
            given
            or source.fixed is not None
            or source.ends != (None, None)
            or any(c.fixed or c.ends != (None, None) for c in tensor.conversions)
        ):
            fixed[key] = f"the range of {key!r} is given"
    for constant in plan.constants.values():
        override = constant.override is not None and has_range(constant.override)
        if override or constant.given is not None:
            fixed[constant.value] = f"the range of {constant.value!r} is given"
    for key in model.remade:
        fixed[key] = f"the batch normalization behind {key!r} is live"
    return fixed


def edited(model: WrappedModel, edit: Edit) -> OnnxGraph:
    """Return the float graph of a prepared model with a change; the model stays as it is."""
    draft = model.graph.model.clone()
    edit(draft)
    return OnnxGraph(draft, model.graph.source)


@torch.no_grad()
def float_difference(model: WrappedModel, graph: OnnxGraph, batches: Iterable[Inputs]) -> float:
    """Return how far the float outputs of another graph are from those of a prepared model.

    It is the norm of the difference over that of the output, of the output where it is largest.
    """
    ours = float_model(model)
    theirs = WrappedModel(graph, model.layout.settings).eval().to(device_of(model))
    errors: dict[int, Tensor] = {}
    powers: dict[int, Tensor] = {}
    for inputs in batches:
        pairs = zip(outputs_of(ours, inputs), outputs_of(theirs, inputs), strict=True)
        for index, (wanted, found) in enumerate(pairs):
            if isinstance(wanted, Tensor) and wanted.is_floating_point():
                wanted = wanted.double()
                error, power = (found - wanted).square().sum(), wanted.square().sum()
                errors[index] = errors.get(index, 0) + error
                powers[index] = powers.get(index, 0) + power
    shares = [(errors[i] / powers[i].clamp(min=1e-300)).sqrt() for i in errors]
    largest = torch.stack(shares).max() if shares else torch.zeros(())
    return float(largest.nan_to_num(nan=float("inf")))


@torch.no_grad()
def edit_constants(model: WrappedModel, edit: Edit, graph: OnnxGraph | None = None) -> None:
    """Change constants of a prepared model, in place: in its float graph and in its parameters.

    Parameters that were changed since the graph was read, by training or rounding, change alike.
    What sits on the points of the graph stays there, and so does the plan.

    Args:
        model: prepared.
        edit: gives constants new contents; nodes stay as they are.
        graph: what ``edited`` made with it, if that was called before.
    """
    graph = graph or edited(model, edit)
    taps: dict[object, nn.Module] = {point: model.tap(point) for point in model.attached}
    kernels, own = dict(model.kernels), {name: getattr(model, name) for name in OWN}
    substitutes = {key: model.substitute(key) for key in model.replaced}
    decisions = decisions_of(model)
    _take(model, edit, graph)
    if substitutes:
        model.put_substitutes(substitutes)
    model.attach(taps, kernels)  # type: ignore[arg-type]  # they are points
    model.add_module("quantization", decisions)
    for name, value in own.items():
        setattr(model, name, value)


@torch.no_grad()
def edit_graph(model: WrappedModel, edit: Edit) -> None:
    """Change nodes and constants of a prepared model, in place, and prepare it again.

    It is not calibrated then. The plan keeps what it said of changes and outcomes.

    Args:
        model: prepared; has no live batch normalization.
        edit: changes the graph.
    """
    config, before, device = config_of(model), plan_of(model), device_of(model)
    _take(model, edit, edited(model, edit))
    trained = {key: tensor.clone() for key, tensor in _differing(model)}
    for key in trained:
        _stored(model, key).copy_(to_torch(model.layout.values.stored[key]))
    plan: QuantPlan = prepare(model, config)
    model.to(device)  # what is new was read anew
    plan.changes = [*before.changes, *(c for c in plan.changes if c not in before.changes)]
    plan.outcomes = before.outcomes
    for key, tensor in trained.items():
        stored = model.stored(key)
        if stored is not None and stored.shape == tensor.shape:
            stored.copy_(tensor)


def _take(model: WrappedModel, edit: Edit, graph: OnnxGraph) -> None:
    """Let a model become that of an edited graph, in place, with its own parameters edited too."""
    layout, before = Layout(graph, model.layout.settings), model.layout.values.stored
    device, source = device_of(model), graph
    if changed_tensors(model):
        own = materialize(model)
        edit(own)
        source = OnnxGraph(own)
    stored = Layout(source, model.layout.settings).values.stored
    kept, fresh = dict[str, Tensor](), dict[str, Tensor]()
    for key in layout.slots:
        tensor = model.stored(key)
        if tensor is None:
            continue
        if layout.values.stored[key] is before[key]:
            kept[key] = tensor
            continue
        values = to_torch(stored[key])
        if values.shape == tensor.shape:
            kept[key], fresh[key] = tensor, values
        else:
            values = values.to(tensor)
            kept[key] = _like(tensor, values)
    model.become(layout, kept)
    model.to(device)
    for key, values in fresh.items():
        kept[key].copy_(values)


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """Return a parameter or buffer with new contents of another shape."""
    values = values.to(tensor)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, tensor.requires_grad)
    return values


def _differing(model: WrappedModel) -> Iterable[tuple[str, Tensor]]:
    """Yield what is stored and is not what the graph says."""
    for key in changed_tensors(model):
        yield key, _stored(model, key)


def _stored(model: WrappedModel, key: str) -> Tensor:
    tensor = model.stored(key)
    assert tensor is not None
    return tensor
