"""Biases of int32, at the scale of the activation times that of the weight."""

from __future__ import annotations

import onnx_ir as ir
import torch

from qwrap.dtypes import INT32
from qwrap.graph.constants import label
from qwrap.graph.nodes import STANDARD
from qwrap.importing.reading import Reading, UnreadableError, constant_of
from qwrap.importing.strip import Stripper
from qwrap.importing.stripped import Stripped, Tap, Use, moves_reals
from qwrap.model.tensors import to_torch
from qwrap.numerics import dequantize, quantize_bias
from qwrap.ops.traits import WEIGHTED

ROUNDING = 1e-6  # of a product of two float32 numbers, whatever a tool multiplied them in
PRODUCTS = ("MatMul", "Gemm")


def take_biases(stripper: Stripper) -> None:
    """Let the operators with an int32 bias read it as floats, in place, where its scale allows.

    A bias whose scale does not follow those of activation and weight stays codes behind its
    DequantizeLinear, and a note says so.
    """
    for node, reading in stripper.found.stored.items():
        if reading.spec.dtype is not INT32:
            continue
        if reason := _take(stripper, node, reading):
            stripper.found.notes.append(f"{label(node)} stays as it is: {reason}")


def _take(stripper: Stripper, node: ir.Node, reading: Reading) -> str:
    """Take one bias, in place; return why it cannot be, if so."""
    try:
        use, source, weight = _partners(stripper.result, node)
        _check_scale(stripper.result, node, reading, source, weight)
        stripper.result.biases[use] = stripper.take_codes(node, reading), source, weight
    except UnreadableError as error:
        return str(error)
    return ""


def _partners(result: Stripped, node: ir.Node) -> tuple[Use, Tap, Use]:
    """Return what reads a bias, the tap it goes with, and where the weight is read."""
    uses = tuple(node.outputs[0].uses())
    if len(uses) != 1:
        raise UnreadableError("its int32 codes have more than one reader")
    user, index = uses[0].node, uses[0].idx
    known = WEIGHTED.get(user.op_type) if user.domain in STANDARD else None
    layer: ir.Node | None = user
    if known is None or known.bias != index:
        layer = None
        if user.op_type == "Add" and user.domain in STANDARD:
            other = user.inputs[1 - index]
            layer = None if other is None else other.producer()
            layer = layer if layer is not None and layer.op_type in PRODUCTS else None
    if layer is None:
        raise UnreadableError("its int32 codes are no bias of a layer")
    source, weight = _source(result, layer, 0), result.stored_use(layer, 1)
    if source is None or weight is None:
        raise UnreadableError("activation and weight of its layer are not both quantized")
    return (user, index), source, weight


def _source(result: Stripped, node: ir.Node, index: int) -> Tap | None:
    """Return the tap whose scale an input has, perhaps from where its value was moved."""
    while (tap := result.read_by(node, index)) is None:
        value = node.inputs[index]
        maker = None if value is None else value.producer()
        if maker is None or value is None or not moves_reals(maker, value):
            return None
        node, index = maker, 0
    return tap


def _check_scale(
    result: Stripped, node: ir.Node, reading: Reading, source: Tap, weight: Use
) -> None:
    """Refuse a bias that a ``BiasStub`` would round to other codes.

    Raises:
        UnreadableError: with the reason.
    """
    activation, other = source.reading, result.constants[weight].reading
    scale = activation.qparams.scale * other.qparams.scale
    mine, zeros = reading.qparams.scale, reading.qparams.zero_point
    fits = activation.spec.axis is None and other.spec.block_size is None and not zeros.any()
    if not fits or mine.shape != scale.shape or not torch.allclose(mine, scale, ROUNDING, 0.0):
        raise UnreadableError("its scale is not that of its activation times that of its weight")
    tensor = constant_of(node.inputs[0])
    assert tensor is not None
    codes = to_torch(tensor)
    exact = codes.abs() < 2**24  # what float32 holds
    again = quantize_bias(dequantize(codes, reading.qparams), scale)
    if not torch.equal(again[exact], codes[exact]):
        raise UnreadableError(
            "its codes are not those of its activation's scale times its weight's"
        )
