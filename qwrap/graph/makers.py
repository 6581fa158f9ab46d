"""Nodes with constants of which the channels of a tensor come, or into which they go."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import label
from qwrap.graph.divisible import Layer
from qwrap.graph.index import ValueType
from qwrap.graph.kernel import LAYERS, Kernel, integer
from qwrap.graph.slots import Numbers
from qwrap.graph.trace import Rule, Trace

NORMS = {
    "BatchNormalization": (1, 2),
    "EmbedLayerNormalization": (5, 6),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
}
"""Normalisations to the inputs, one number a channel, that their first output is linear in."""
SECOND = ("BatchNormalization", "GroupNormalization", "InstanceNormalization")
"""Those of them whose channels are the second axis; of the others it is the last."""


def _layer(trace: Trace, node: ir.Node) -> None:
    tensor = trace.constants.tensor(node.inputs[1])
    if node.op_type == "MatMul" and _passes_product(trace, node):
        return
    shape = () if tensor is None else tuple(tensor.shape.numpy())
    kernel = Kernel.of(node, shape)
    reason = trace.obstacle(node, 1)
    if kernel is None or not trace.constants.is_float(node.inputs[1]):
        trace.pin_inputs(node, reason or f"is read by {label(node)}")
        return
    inputs = _taken(trace, node, kernel)
    outputs = _made(trace, node, kernel)
    if reason:
        trace.slots.pin(inputs[inputs >= 0], reason)
        trace.slots.pin(outputs, reason)
        return
    trace.layers.append(Layer(node, kernel, inputs, outputs))


def _taken(trace: Trace, node: ir.Node, kernel: Kernel) -> Numbers:
    """Return the slots of the input channels of a layer, -1 for none."""
    place, none = trace.place(node, 0), np.full(kernel.inputs, -1, np.int64)
    if place is None:
        return none
    axis = -1 if node.op_type in ("Gemm", "MatMul") else 1
    if node.op_type == "Gemm" and integer(node, "transA", 0):
        axis = 0
    if place.size != place.shape[axis]:
        trace.slots.pin(place, f"is no channel to {label(node)}")
        return none
    return np.asarray(np.broadcast_to(place.reshape(-1), (kernel.inputs,)), np.int64)


def _made(trace: Trace, node: ir.Node, kernel: Kernel) -> Numbers:
    """Number the output channels of a layer, and divide its bias."""
    outputs, of_rows = trace.fresh(node, kernel.outputs), node.op_type in ("Gemm", "MatMul")
    rank = trace.types.get(node.outputs[0], ValueType()).rank
    if node.op_type != "MatMul":
        rank = len(kernel.shape)
    if rank is None:
        trace.slots.pin(outputs, "its number of dimensions is not known")
        return outputs
    shape = [1] * rank
    shape[-1 if of_rows else 1] = kernel.outputs
    trace.places[node.outputs[0]] = outputs.reshape(shape)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        if node.inputs[2] in trace.places:
            trace.pin(node.inputs[2], f"is the bias of {label(node)}")
        trace.share(node, 2, outputs)
    return outputs


def _passes_product(trace: Trace, node: ir.Node) -> bool:
    """Let axes of an operand that a MatMul does not sum over be those of the product.

    Returns:
        Whether that, or that the operands have to stay, is all there is to do.
    """
    places = [trace.place(node, i) for i in range(2)]
    if places[1] is None and trace.constants.tensor(node.inputs[1]) is not None:
        of_rows = places[0] is not None and places[0].size > 1 and places[0].shape[-1] == 1
        if places[0] is None or not of_rows:
            return False
    elif places[0] is not None and places[1] is not None:
        trace.pin(node.inputs[0], f"is multiplied with another by {label(node)}")
    index = 0 if places[1] is None else 1
    place, summed = places[index], -1 if index == 0 else -2
    if place is None:
        trace.pin_inputs(node, f"is read by {label(node)}")
    elif place.ndim < 2 or place.shape[summed] != 1:
        trace.slots.pin(place, f"is summed over by {label(node)}")
    else:
        trace.passed(node, place, trace.rank(node))
    return True


def _norm(trace: Trace, node: ir.Node) -> None:
    indices = [i for i in NORMS[node.op_type] if i < len(node.inputs) and node.inputs[i]]
    gain = trace.constants.array(node.inputs[indices[0]]) if indices else None
    place = trace.place(node, 0) if node.op_type == "BatchNormalization" else None
    if place is not None and _passes_norm(trace, node, place):
        return
    trace.pin_inputs(node, f"is read by {label(node)}")
    last_alone = node.op_type in SECOND or integer(node, "axis", -1) in (-1, trace.rank(node) - 1)
    if gain is None or gain.ndim != 1 or not last_alone:
        return
    axis, shape = 1 if node.op_type in SECOND else -1, [1] * trace.rank(node)
    sizes = trace.types[node.outputs[0]].shape
    if sizes is not None and sizes[axis] != gain.size and isinstance(sizes[axis], int):
        return  # a number for each group of channels
    outputs, shape[axis] = trace.fresh(node, gain.size), gain.size
    trace.places[node.outputs[0]] = outputs.reshape(shape)
    for index in indices:
        trace.share(node, index, outputs)


def _passes_norm(trace: Trace, node: ir.Node, place: Numbers) -> bool:
    """Let divided channels go through a BatchNormalization, whose mean and shift are divided."""
    if place.ndim < 2 or place.size != place.shape[1] or integer(node, "training_mode", 0):
        return False
    for index in (2, 3):
        trace.share(node, index, place.reshape(-1))
    trace.passed(node, place)
    return True


MAKERS: dict[str, Rule] = {**dict.fromkeys(LAYERS, _layer), **dict.fromkeys(NORMS, _norm)}
