"""Which layers keep their batch normalization while they are trained."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from qwrap.errors import QwrapWarning
from qwrap.graph.constants import Constants, label
from qwrap.graph.fold import LAYERS, Folded, FoldedNorms, add_bias
from qwrap.graph.index import OnnxGraph, walk_nodes
from qwrap.model.attributes import attributes_of
from qwrap.model.tensors import to_torch
from qwrap.model.wrapped import WrappedModel
from qwrap.ops.traits import WEIGHTED
from qwrap.quant.batch_norm import BIAS, WEIGHT, Channels, LiveBatchNorm
from qwrap.quant.moments import Moments, merge_moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # missing where torch was built without

RESTORED = ("Conv", "ConvTranspose")
LIVE = "batch normalization is live in"
ENDS = (*LAYERS, "MatMul")


@dataclass(slots=True)
class LivePlan:
    """The layers of a graph that are to keep a batch normalization.

    Attributes:
        folded: key of a node whose BatchNormalization was folded -> what it was before.
        kept: key of a node that has been live before -> its module.
        restored: keys of nodes that came folded, and get a normalization back.
        weights: initialisers that stay the parameters they are.
        changes: what to tell, one line each.
    """

    folded: dict[str, Folded] = field(default_factory=dict)
    kept: dict[str, LiveBatchNorm] = field(default_factory=dict)
    restored: list[str] = field(default_factory=list)
    weights: set[str] = field(default_factory=set)
    changes: list[str] = field(default_factory=list)


def plan_live(
    model: WrappedModel,
    draft: ir.Model,
    folded: FoldedNorms,
    before: Mapping[str, ir.TensorProtocol | None],
    without: Collection[str] = (),
) -> LivePlan:
    """Choose the layers that stay live, and give each of them a bias in ``draft``, in place.

    They are those that a BatchNormalization was folded into. Where there are none, the model came
    folded, and they are the Conv and ConvTranspose that have another layer behind them.

    Args:
        model: before it is rewritten.
        draft: its graph in canonical form.
        folded: layers that absorbed a BatchNormalization.
        before: initialisers of ``draft`` as they were before it got that form.
        without: keys of nodes that compute in float16, and cannot have one.
    """
    plan, constants, graph = LivePlan(), Constants(draft), OnnxGraph(draft)
    earlier = dict(live_layers(model))
    chosen = {graph.node_key(node): node for node in folded}
    chosen |= {key: graph.nodes[key] for key in earlier if key in graph.nodes}
    if not chosen:
        chosen = {graph.node_key(node): node for node in _inner_layers(draft)}
    for key, node in chosen.items():
        obstacle = "it is to compute in float16" if key in without else None
        obstacle = obstacle or _obstacle(constants, node)
        if obstacle is not None:
            plan.changes.append(f"{label(node)}: stays without batch normalization: {obstacle}")
            continue
        if len(node.inputs) <= BIAS or node.inputs[BIAS] is None:
            _add_zeros(constants, node)
            plan.changes.append(f"{label(node)}: a bias added for its batch normalization")
        _sort(plan, key, node, folded.get(node), earlier.get(key), before)
    if not (plan.folded or plan.kept or plan.restored):
        plan.changes.append("no layer can have a batch normalization of its own")
    return plan


def _sort(
    plan: LivePlan,
    key: str,
    node: ir.Node,
    folded: Folded | None,
    earlier: LiveBatchNorm | None,
    before: Mapping[str, ir.TensorProtocol | None],
) -> None:
    """Add one node to ``plan``, in place."""
    values = {_name(node, i): node.inputs[i] for i in (WEIGHT, BIAS)}
    same = {n for n, v in values.items() if v is not None and before.get(n) is v.const_value}
    if folded is not None:
        plan.folded[key] = folded
        if before.get(_name(node, WEIGHT)) is folded.weight:
            plan.weights.add(_name(node, WEIGHT))
    elif earlier is not None and len(same) == len(values):
        plan.kept[key] = earlier
        plan.weights |= same
    else:
        plan.restored.append(key)


def _inner_layers(draft: ir.Model) -> Iterator[ir.Node]:
    """Yield the convolutions from which no graph output is reached but through another layer."""
    for node in walk_nodes(draft.graph):
        if node.op_type in RESTORED and not node.domain and not _is_last(node):
            yield node


def _is_last(layer: ir.Node) -> bool:
    seen, waiting = {layer}, [layer]
    while waiting:
        for value in waiting.pop().outputs:
            if value.is_graph_output():
                return True
            for user in value.consumers():
                if user not in seen and user.op_type not in ENDS:
                    seen.add(user)
                    waiting.append(user)
    return False


def _obstacle(constants: Constants, node: ir.Node) -> str | None:
    """Return why a layer cannot have a normalization of its own."""
    for index, what in ((WEIGHT, "weight"), (BIAS, "bias")):
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is None:
            continue
        if not constants.is_float(value):
            return f"its {what} is computed"
        if len(value.uses()) > 1 or value.is_graph_output():
            return f"its {what} {value.name!r} is used elsewhere too"
    bias = constants.tensor(node.inputs[BIAS]) if len(node.inputs) > BIAS else None
    if bias is not None and tuple(bias.shape.numpy()) != (_count(constants, node),):
        return f"its bias of shape {list(bias.shape.numpy())} has not one number for each channel"
    return None


def _count(constants: Constants, node: ir.Node) -> int:
    weight = constants.tensor(node.inputs[WEIGHT])
    assert weight is not None
    channels = _channels(node)
    return int(weight.shape.numpy()[channels.axis]) * channels.groups


def _channels(node: ir.Node) -> Channels:
    attributes = attributes_of(node)
    axis = WEIGHTED[node.op_type].axis(attributes)
    return Channels(axis, attributes.get("group", 1) if node.op_type == "ConvTranspose" else 1)


def _add_zeros(constants: Constants, node: ir.Node) -> None:
    weight = constants.array(node.inputs[WEIGHT])
    assert weight is not None
    add_bias(constants, node, np.zeros(_count(constants, node), weight.dtype))


def _name(node: ir.Node, index: int) -> str:
    value = node.inputs[index]
    assert value is not None
    return value.name or ""


# --- on a model ----------------------------------------------------------------------------------


def live_layers(model: WrappedModel) -> Iterator[tuple[str, LiveBatchNorm]]:
    """Yield the layers of a prepared model with batch normalization, by node key."""
    for key in model.replaced:
        layer = model.substitute(key)
        if isinstance(layer, LiveBatchNorm):
            yield key, layer


@torch.no_grad()
def put_live(model: WrappedModel, plan: LivePlan) -> None:
    """Carry out ``plan`` on a model that was rewritten for it, in place."""
    layers = dict(plan.kept)
    for key in (*plan.folded, *plan.restored):
        layers[key] = new_layer(model, key)
    model.put_substitutes(layers)
    for key, folded in plan.folded.items():
        layers[key].take(folded.norm)
        weight, bias = (stored_at(model, key, index) for index in layers[key].indices)
        if _name(model.graph.nodes[key], WEIGHT) not in plan.weights:
            weight.copy_(to_torch(folded.weight))
        bias.copy_(torch.from_numpy(folded.norm.beta))


def new_layer(model: WrappedModel, key: str) -> LiveBatchNorm:
    """Return a normalization for a node that does not change it, without statistics."""
    weight, bias = stored_at(model, key, WEIGHT), stored_at(model, key, BIAS)
    channels = _channels(model.graph.nodes[key])
    is_trained = isinstance(weight, torch.nn.Parameter)
    layer = LiveBatchNorm(key, channels, len(bias), is_trained=is_trained)
    return layer.to(weight.device).train(model.training)


def stored_at(model: WrappedModel, key: str, index: int) -> torch.Tensor:
    """Return the parameter or buffer that a node reads as input ``index``."""
    value = model.graph.nodes[key].inputs[index]
    assert value is not None
    tensor = model.stored(model.graph.key(value))
    assert tensor is not None
    return tensor


@torch.no_grad()
def fold(model: WrappedModel, keys: Collection[str]) -> None:
    """Write what the normalizations of these nodes fold to over weight and bias, in place.

    The normalizations have to go then, see ``keep``.
    """
    for key in keys:
        layer = model.substitute(key)
        for index in layer.indices:
            tensor = stored_at(model, key, index)
            tensor.copy_(layer.made(index, tensor))


def keep(model: WrappedModel, keys: Iterable[str]) -> None:
    """Let exactly these nodes have a normalization, in place; new ones change nothing."""
    known: Mapping[str, LiveBatchNorm] = dict(live_layers(model))
    others = {key: model.substitute(key) for key in model.replaced if key not in known}
    layers = {key: known.get(key) or new_layer(model, key) for key in keys}
    model.put_substitutes({**others, **layers})


def live_notes(model: WrappedModel) -> list[str]:
    """Return what to tell of the layers with batch normalization."""
    keys = [key for key, _ in live_layers(model)]
    if not keys:
        return []
    return [f"{LIVE} {len(keys)} layers: {', '.join(keys)}"]


# --- statistics of what came folded --------------------------------------------------------------


def watch_unknown(model: WrappedModel) -> None:
    """Let each layer without statistics add up what passes, in place."""
    for _, layer in live_layers(model):
        layer.moments = None if layer.known else Moments(len(layer.gamma))


def merge_live(model: WrappedModel, group: ProcessGroup | None) -> None:
    """Let the layers of every rank have added up what all ranks saw, in place."""
    found = [layer for _, layer in live_layers(model) if layer.moments is not None]
    home = next((layer.running_mean.device for layer in found), torch.device("cpu"))
    merge_moments([layer.moments for layer in found if layer.moments is not None], home, group)


def end_watching(model: WrappedModel, *, use: bool) -> None:
    """Stop adding up, in place; make statistics of what was seen, if it is to be used."""
    without = []
    for key, layer in live_layers(model):
        if layer.moments is not None and layer.moments.count > 1 and use:
            layer.renew(stored_at(model, key, BIAS))
        elif not layer.known:
            without.append(key)
        layer.moments = None
    if without and use:
        warnings.warn(
            f"{len(without)} layers have no statistics for their batch normalization, and stay "
            "folded until qwrap.train.reestimate_batch_norm() has run: "
            f"{', '.join(map(repr, without))}",
            QwrapWarning,
            stacklevel=2,
        )
