"""Layers that absorb what follows them: normalisation, scale and shift by output channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import Array, Constants, label
from qwrap.graph.index import infer_types, opset_of, walk_nodes

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm"})
BROADCASTING = 7  # the opset since which Add, Mul and Gemm broadcast as numpy does


class Affine(NamedTuple):
    """``y = x * scale + shift`` by output channel; float64[C]."""

    scale: Array
    shift: Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Normalization:
    """What a BatchNormalization does: ``(x - mean) * gamma / sqrt(variance + epsilon) + beta``.

    Attributes:
        gamma: float64[C], as the others.
        beta: shift.
        mean: of its input.
        variance: of its input.
        epsilon: added to the variance.
        momentum: weight of the old statistics in an update.
    """

    gamma: Array
    beta: Array
    mean: Array
    variance: Array
    epsilon: float
    momentum: float

    @property
    def affine(self) -> Affine:
        """The same as scale and shift."""
        scale = self.gamma / np.sqrt(self.variance + self.epsilon)
        return Affine(scale, self.beta - self.mean * scale)


@dataclass(frozen=True, slots=True)
class Folded:
    """A layer as it was before it absorbed a BatchNormalization.

    Attributes:
        weight: of the layer.
        norm: what came after it, with the bias of the layer taken off its mean, and with what was
            folded in later.
    """

    weight: ir.TensorProtocol
    norm: Normalization

    def then(self, affine: Affine) -> Folded:
        """Return the same with a scale and shift behind it."""
        gamma, beta = self.norm.gamma * affine.scale, self.norm.beta * affine.scale + affine.shift
        return replace(self, norm=replace(self.norm, gamma=gamma, beta=beta))


FoldedNorms = dict[ir.Node, Folded]


@dataclass(frozen=True, slots=True)
class Channels:
    """How the output channels of a layer lie in its weight.

    ``weight.reshape(view) * vector.reshape(vector_view)`` scales each of them.
    """

    view: tuple[int, ...]
    vector_view: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of output channels."""
        return prod(self.vector_view)


def fold_batch_norm(model: ir.Model, folded: FoldedNorms | None = None) -> list[str]:
    """Fold each constant BatchNormalization behind a layer into that layer, in place.

    The layer (Conv, ConvTranspose, Gemm, or MatMul of two matrices) keeps its name; its output
    takes the name of the BatchNormalization's. Behind a MatMul an Add of the shift remains, under
    the BatchNormalization's name.

    Args:
        model: what to edit.
        folded: takes what each Conv, ConvTranspose and Gemm was before.

    Returns:
        A line for each BatchNormalization that is gone.

    Source: Jacob et al., arXiv:1712.05877, section 3.2.
    """
    lines = _fold_followers(model, _batch_norm, folded)
    return lines + _fold_batch_norm_into_matmul(model)


def fold_scale_and_shift(model: ir.Model, folded: FoldedNorms | None = None) -> list[str]:
    """Fold Mul, Add and Sub by a constant per channel into the layer before, in place.

    Layers are Conv, ConvTranspose and Gemm. A MatMul stays as it is: its Add becomes a Gemm in
    onnxruntime only where that is faster.

    Args:
        model: what to edit.
        folded: BatchNormalizations that layers absorbed before, to be kept up to date.

    Returns:
        A line for each node that is gone.
    """
    return _fold_followers(model, _scale_or_shift, folded)


Reader = Callable[[Constants, ir.Node, ir.Value, int, int], Affine | Normalization | None]


def _fold_followers(model: ir.Model, read: Reader, folded: FoldedNorms | None) -> list[str]:
    """Let layers absorb, in place, followers that ``read`` knows."""
    lines: list[str] = []
    if opset_of(model, "") < BROADCASTING:
        return lines
    constants = Constants(model)
    for node in list(walk_nodes(model.graph)):
        if node.op_type not in LAYERS or node.domain:
            continue
        while (follower := _sole_reader(node)) is not None:
            line = f"{label(follower)}: folded into {label(node)}"
            if not _absorb_follower(constants, node, follower, read, folded):
                break
            lines.append(line)
    return lines


def _absorb_follower(
    constants: Constants,
    node: ir.Node,
    follower: ir.Node,
    read: Reader,
    folded: FoldedNorms | None,
) -> bool:
    weight = constants.tensor(node.inputs[1]) if constants.is_float(node.inputs[1]) else None
    if weight is None or follower.domain:
        return False
    shape = tuple(weight.shape.numpy())
    channels = _channels(node, shape)
    found = read(constants, follower, node.outputs[0], len(shape), channels.count)
    affine = found.affine if isinstance(found, Normalization) else found
    bias = constants.floats(node.inputs[2]) if len(node.inputs) > 2 else None
    if affine is None or not _absorb(constants, node, channels, affine):
        return False
    if folded is not None and isinstance(found, Normalization):
        mean = found.mean if bias is None else found.mean - bias.reshape(-1)
        folded[node] = Folded(weight, replace(found, mean=mean))
    elif folded is not None and node in folded:
        folded[node] = folded[node].then(affine)
    _splice_out(constants, follower, node.outputs[0])
    return True


def _sole_reader(node: ir.Node) -> ir.Node | None:
    """Return the one node that reads the output of ``node``, if it is in the same graph."""
    value, uses = node.outputs[0], tuple(node.outputs[0].uses())
    if value.is_graph_output() or len(uses) != 1:
        return None
    reader = uses[0].node
    return reader if reader.graph is node.graph else None


def _splice_out(constants: Constants, follower: ir.Node, value: ir.Value) -> None:
    """Remove ``follower`` in place; ``value`` takes over the name and type of its output."""
    output, inputs, graph = follower.outputs[0], tuple(follower.inputs), follower.graph
    assert isinstance(graph, ir.Graph)
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(follower, safe=True)
    value.name = output.name
    value.type, value.shape = output.type or value.type, output.shape or value.shape
    value.metadata_props.update(output.metadata_props)
    constants.drop_unused(v for v in inputs if v is not value)


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _float(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def _channels(node: ir.Node, shape: tuple[int, ...]) -> Channels:
    if node.op_type == "Conv":  # [M, C/group, ...]
        return Channels((shape[0], prod(shape[1:])), (shape[0], 1))
    if node.op_type == "ConvTranspose":  # [C, M/group, ...], channels of a group side by side
        group = _int(node, "group", 1)
        view = (group, shape[0] // group, shape[1], prod(shape[2:]))
        return Channels(view, (group, 1, shape[1], 1))
    if _int(node, "transB", 0):
        return Channels(shape, (shape[0], 1))
    return Channels(shape, (1, shape[1]))


def _absorb(constants: Constants, node: ir.Node, channels: Channels, affine: Affine) -> bool:
    """Apply ``affine`` to weight and bias of ``node``, in place; say whether that was possible."""
    values = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    weight = _scaled(constants, values[0], channels, affine.scale)
    bias = np.zeros(channels.count) if values[1] is None else constants.floats(values[1])
    if weight is None or bias is None or _float(node, "beta", 1.0) != 1.0:
        return False
    vector = _per_channel(bias, 2 if node.op_type == "Gemm" else 1, -1, channels.count)
    if vector is None:
        return False
    vector = _narrowed(constants, values[1] or values[0], vector * affine.scale + affine.shift)
    if vector is None:
        return False
    constants.replace(node, 1, weight)
    if values[1] is not None:
        constants.replace(node, 2, vector)
    elif vector.any():
        add_bias(constants, node, vector)
    return True


def _scaled(
    constants: Constants, value: ir.Value | None, channels: Channels, scale: Array
) -> Array | None:
    weight = constants.floats(value)
    if weight is None:
        return None
    scaled = weight.reshape(channels.view) * scale.reshape(channels.vector_view)
    return _narrowed(constants, value, scaled.reshape(weight.shape))


def _narrowed(constants: Constants, like: ir.Value | None, array: Array) -> Array | None:
    """Return ``array`` in the type of the constant ``like``, None if it does not fit in there."""
    original = constants.array(like)
    assert original is not None
    with np.errstate(over="ignore", invalid="ignore"):
        narrow: Array = array.astype(original.dtype)
    return narrow if np.isfinite(narrow.astype(np.float64)).all() else None


def add_bias(constants: Constants, node: ir.Node, bias: Array) -> None:
    """Give a layer without a bias one, in place."""
    assert isinstance(node.graph, ir.Graph)
    assert node.inputs[1] is not None
    weight = node.inputs[1].name or ""
    stem = weight.removesuffix("weight")
    name = constants.unique_name(f"{stem}bias" if stem != weight else f"{weight}_bias")
    node.resize_inputs(3)
    node.replace_input_with(2, constants.add(node.graph, name, bias))


def _batch_norm(
    constants: Constants, node: ir.Node, value: ir.Value, rank: int, count: int
) -> Normalization | None:
    del rank
    further = any(v.name or v.uses() for v in node.outputs[1:])  # until opset 13: training
    if node.op_type != "BatchNormalization" or node.inputs[0] is not value or further:
        return None
    if _int(node, "training_mode", 0) or not _int(node, "spatial", 1):
        return None
    parameters = [constants.floats(v) for v in node.inputs[1:5]]
    gamma, beta, mean, variance = (None if p is None else p.reshape(-1) for p in parameters)
    if gamma is None or beta is None or mean is None or variance is None:
        return None
    epsilon = _float(node, "epsilon", 1e-5)
    if gamma.size != count or not (variance + epsilon > 0).all():
        return None
    return Normalization(
        gamma=gamma,
        beta=beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        momentum=_float(node, "momentum", 0.9),
    )


def _scale_or_shift(
    constants: Constants, node: ir.Node, value: ir.Value, rank: int, count: int
) -> Affine | None:
    if node.op_type not in ("Add", "Mul", "Sub"):
        return None
    if node.op_type == "Sub" and node.inputs[0] is not value:
        return None
    other = constants.floats(node.inputs[1] if node.inputs[0] is value else node.inputs[0])
    vector = None if other is None else _per_channel(other, rank, 1, count)
    if vector is None:
        return None
    if node.op_type == "Mul":
        return Affine(vector, np.zeros(count))
    return Affine(np.ones(count), -vector if node.op_type == "Sub" else vector)


def _per_channel(array: Array, rank: int, axis: int, count: int) -> Array | None:
    """Return ``array`` as [count] if it broadcasts along ``axis`` of a tensor of ``rank`` alone."""
    if array.ndim > rank:
        return None
    shape = [1] * (rank - array.ndim) + list(array.shape)
    along = shape.pop(axis)
    if along not in (1, count) or any(n != 1 for n in shape):
        return None
    return np.broadcast_to(array.reshape(-1), (count,))


def _fold_batch_norm_into_matmul(model: ir.Model) -> list[str]:
    lines: list[str] = []
    nodes = [n for n in walk_nodes(model.graph) if n.op_type == "MatMul" and not n.domain]
    pairs = [(n, f) for n in nodes if (f := _sole_reader(n)) and f.op_type == "BatchNormalization"]
    if not pairs or opset_of(model, "") < BROADCASTING:
        return lines
    constants, types = Constants(model), infer_types(model)
    for node, norm in pairs:
        # With more dimensions the channels of the BatchNormalization are not the columns.
        known = types.get(node.outputs[0])
        if known is not None and known.rank == 2 and _absorb_scale(constants, node, norm):
            lines.append(f"{label(norm)}: scale folded into {label(node)}, shift left as Add")
            norm.op_type = "Add"
    return lines


def _absorb_scale(constants: Constants, node: ir.Node, norm: ir.Node) -> bool:
    """Move the scale of ``norm`` into a MatMul and leave its shift, in place, if possible."""
    weight = constants.floats(node.inputs[1])
    if weight is None or weight.ndim != 2 or norm.domain:
        return False
    found = _batch_norm(constants, norm, node.outputs[0], 2, weight.shape[1])
    if found is None:
        return False
    affine = found.affine
    scaled = _scaled(constants, node.inputs[1], _channels(node, weight.shape), affine.scale)
    shift = _narrowed(constants, node.inputs[1], affine.shift)
    if scaled is None or shift is None:
        return False
    constants.replace(node, 1, scaled)
    parameters = tuple(norm.inputs[1:])
    assert isinstance(norm.graph, ir.Graph)
    name = constants.unique_name(f"{norm.name or norm.outputs[0].name}_shift")
    norm.resize_inputs(2)
    norm.replace_input_with(1, constants.add(norm.graph, name, shift))
    norm.resize_outputs(1)
    norm.attributes.clear()
    constants.drop_unused(parameters)
    return True
