"""Layers whose output may be shifted by channel, for a shift in the bias of what reads it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import Array, Constants
from qwrap.graph.divisible import Layer
from qwrap.graph.index import OnnxGraph
from qwrap.graph.moves import MOVES
from qwrap.graph.nodes import STANDARD
from qwrap.graph.passing import find_divisible

MAKERS = ("Conv", "ConvTranspose", "Gemm")
POSITIVE = ("Relu", "LeakyRelu", "PRelu", "Identity", "Dropout")
"""What is the identity for values from 0 up."""
POOLS = ("MaxPool", "GlobalMaxPool", "GlobalAveragePool", "AveragePool")


@dataclass(frozen=True, slots=True)
class Shift:
    """A layer, and those that read what an activation makes of its output.

    Attributes:
        key: of the layer's node.
        value: key of its output.
        axis: of the channels in that.
        channels: how many there are.
        layer: the layer.
        readers: layers behind it.
    """

    key: str
    value: str
    axis: int
    channels: int
    layer: Layer
    readers: tuple[Layer, ...]


class _Stays(Exception):  # noqa: N818  # it says why a layer is left alone
    pass


def find_shifts(graph: OnnxGraph, fixed: Mapping[str, str]) -> tuple[list[Shift], list[str]]:
    """Return the layers whose output can be shifted, and a line for each reason against others.

    Args:
        graph: where.
        fixed: value keys of tensors and constants that have to stay, and why.
    """
    values = {graph.values[key]: why for key, why in fixed.items() if key in graph.values}
    divisible = find_divisible(graph.model, values)
    layers = {layer.node: layer for layer in divisible.layers}
    found, left = [], defaultdict[str, list[str]](list)
    for layer in divisible.layers:
        key = graph.node_key(layer.node)
        try:
            found.append(_shift_of(graph, layers, layer))
        except _Stays as reason:
            left[re.sub(r" '[^']*'", "", str(reason))].append(key)
    lines = [
        f"{len(keys)} left: {why} [{', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}]"
        for why, keys in left.items()
    ]
    return found, lines


def _shift_of(graph: OnnxGraph, layers: Mapping[ir.Node, Layer], layer: Layer) -> Shift:
    node, constants = layer.node, Constants(graph.model)
    if (layer.outputs < 0).any() or np.unique(layer.outputs).size < layer.outputs.size:
        raise _Stays("what its output becomes is not followed, or has to stay")
    if node.op_type not in MAKERS or not _own_bias(constants, node):
        raise _Stays("it has no bias of its own")
    readers: list[Layer] = []
    _follow(node.outputs[0], layers, readers)
    for reader in readers:
        if not _own_bias(constants, reader.node):
            raise _Stays("a layer behind it has no bias of its own")
    value = graph.key(node.outputs[0])
    axis = -1 if node.op_type == "Gemm" else 1
    key = graph.node_key(node)
    return Shift(key, value, axis, layer.kernel.outputs, layer, tuple(readers))


def _own_bias(constants: Constants, node: ir.Node) -> bool:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return bias is not None and constants.is_float(bias) and len(bias.uses()) == 1


def _follow(value: ir.Value, layers: Mapping[ir.Node, Layer], readers: list[Layer]) -> None:
    """Collect the layers that read a shifted value, through what passes shifts on."""
    if value.is_graph_output():
        raise _Stays("its output is one of the graph")
    if not value.uses():
        raise _Stays("nothing reads its output")
    for use in value.uses():
        node = use.node
        if use.idx == 0 and node in layers:
            if not _takes(node):
                raise _Stays("a layer behind it is padded, or takes no shift")
            readers.append(layers[node])
        elif use.idx == 0 and node.domain in STANDARD and _passes(node):
            for output in node.outputs:
                if output.uses() or output.is_graph_output():
                    _follow(output, layers, readers)
        elif node.op_type not in ("Shape", "Size"):
            raise _Stays(f"a {node.op_type} behind it takes no shift")


def _takes(node: ir.Node) -> bool:
    return node.op_type == "Gemm" or (node.op_type == "Conv" and not _is_padded(node))


def _is_padded(node: ir.Node) -> bool:
    auto, pads = node.attributes.get("auto_pad"), node.attributes.get("pads")
    if auto is not None and auto.as_string() not in ("NOTSET", "VALID", ""):
        return True
    return pads is not None and any(pads.as_ints())


def _passes(node: ir.Node) -> bool:
    if node.op_type == "AveragePool":  # with zeros that count, the shift is less at the border
        include = node.attributes.get("count_include_pad")
        return not _is_padded(node) or include is None or include.as_int() == 0
    if node.op_type == "MaxPool" and len([o for o in node.outputs if o.uses()]) > 1:
        return False
    return node.op_type in (*POSITIVE, *POOLS, *MOVES)


def shift(graph: OnnxGraph, found: Shift, amount: Array) -> None:
    """Take a number from each channel of a layer's output, and add it behind, in place.

    Args:
        graph: that ``found`` is of; its constants are replaced.
        found: the layer.
        amount: float64, one for each channel.
    """
    constants = Constants(graph.model)
    _add(constants, found.layer.node, -amount)
    of_class = dict(zip(found.layer.outputs.tolist(), amount.tolist(), strict=True))
    for reader in found.readers:
        weight = constants.floats(reader.node.inputs[1])
        assert weight is not None
        taken = np.array([of_class.get(c, 0.0) for c in reader.inputs.tolist()])
        sums = reader.kernel.sums(weight)
        made = np.einsum("goi,gi->go", sums, taken.reshape(sums.shape[0], -1)).reshape(-1)
        alpha = reader.node.attributes.get("alpha")
        _add(constants, reader.node, made * (1.0 if alpha is None else alpha.as_float()))


def _add(constants: Constants, node: ir.Node, amount: Array) -> None:
    bias = constants.array(node.inputs[2])
    assert bias is not None
    beta = node.attributes.get("beta")
    by = amount / (1.0 if beta is None else beta.as_float())
    constants.replace(node, 2, (bias.astype(np.float64) + by).astype(bias.dtype))
