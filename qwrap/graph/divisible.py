"""Which channels of which tensors can be divided, and which constants have to change for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import Array, Constants
from qwrap.graph.kernel import Kernel
from qwrap.graph.slots import Numbers


@dataclass(frozen=True, slots=True)
class Layer:
    """A node with a constant weight whose channels may be scaled.

    Attributes:
        node: Conv, ConvTranspose, Gemm or MatMul.
        kernel: how its weight lies.
        inputs: slot (once settled: class) of each channel of its input; -1 for none.
        outputs: the same of its output.
    """

    node: ir.Node
    kernel: Kernel
    inputs: Numbers
    outputs: Numbers


@dataclass(frozen=True, slots=True)
class Share:
    """A constant that is divided as the tensor that it becomes part of.

    Attributes:
        node: what reads it.
        index: of the input.
        place: slot (once settled: class) of each entry, broadcast; may widen it.
        multiplied: instead of divided.
    """

    node: ir.Node
    index: int
    place: Numbers
    multiplied: bool = False


@dataclass(frozen=True, slots=True)
class Divisible:
    """What can be divided in a model: channels of one class by the same positive number.

    Attributes:
        count: how many classes there are.
        layers: those that make or take such channels, in the order of the graph.
        shares: other constants to divide.
        places: value -> class of each of its entries, -1 where it must stay; size 1 along axes
            along which nothing changes.
        runs: channels that one node makes, classes each; those of nodes in order of the graph.
        left: for each of ``runs`` its node, and why some of it has to stay, "" for no reason.
    """

    count: int
    layers: list[Layer]
    shares: list[Share]
    places: dict[ir.Value, Numbers]
    runs: list[Numbers]
    left: list[tuple[ir.Node, str]]


def divide_classes(constants: Constants, divisible: Divisible, factors: Array) -> None:
    """Divide the channels of each class by its factor, in place, in weights and other constants.

    Args:
        constants: of the model that ``divisible`` was found in.
        divisible: what can be divided.
        factors: positive, float64, one for each class.
    """
    by = np.append(factors, 1.0)  # class -1: stays
    for layer in divisible.layers:
        inputs, outputs = by[layer.inputs], 1 / by[layer.outputs]
        if (inputs != 1).any() or (outputs != 1).any():
            weight = constants.array(layer.node.inputs[1])
            assert weight is not None
            constants.replace(layer.node, 1, layer.kernel.scaled(weight, inputs, outputs))
    for share in divisible.shares:
        divisor = by[share.place]
        if (divisor == 1).all():
            continue
        array = constants.array(share.node.inputs[share.index])
        assert array is not None
        exact = array.astype(np.float64)
        changed = exact * divisor if share.multiplied else exact / divisor
        constants.replace(share.node, share.index, changed.astype(array.dtype))
