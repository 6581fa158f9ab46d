"""The constant of a MatMul, Gemm or Conv as a matrix of outputs and inputs, and back."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.nbits.draft import Weight
from qwrap.nbits.unfit import Unfit
from qwrap.quant.unfold import Unfold

WEIGHT_INPUT = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}
"""Operators whose weights can be quantized, and which input that is."""
PRODUCTS = ("MatMul", "Gemm", "Conv")


def attribute(node: ir.Node, name: str, default: float) -> float:
    """Return a number that a node may have as an attribute."""
    found = node.attributes.get(name)
    return default if found is None else float(found.value)


def outputs_first(node: ir.Node) -> bool:
    """Whether a node reads its weight with the outputs along the first axis."""
    return node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0) != 0)


def check_matrix(node: ir.Node, weight: Weight) -> None:
    """Refuse a weight that is not one matrix, or of a type that nothing takes.

    Raises:
        Unfit: it is one.
    """
    shape = weight.shape
    if weight.tensor.dtype == ir.DataType.DOUBLE:
        raise Unfit(f"weight {weight.name!r} is of float64, which MatMulNBits does not take")
    if node.op_type == "MatMul":
        is_one = len(shape) >= 2 and all(n == 1 for n in shape[:-2])
    else:
        is_one = len(shape) == 2 if node.op_type == "Gemm" else len(shape) > 2
    if not is_one:
        raise Unfit(f"weight {weight.name!r} {list(shape)} is not one matrix")
    if 0 in shape:
        raise Unfit(f"weight {weight.name!r} {list(shape)} is empty")


def matrix_of(node: ir.Node, weight: Weight) -> Tensor:
    """Return the weight of a node as ``[N, K]``; of a Conv, one group after the other.

    Raises:
        Unfit: some of its values are not finite.
    """
    values = weight.read()
    low, high = values.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise Unfit(f"weight {weight.name!r} has values that are not finite")
    if outputs_first(node):
        return values.flatten(1)
    return values.reshape(values.shape[-2:]).mT


def as_read(node: ir.Node, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return ``[N, K]`` in the ``shape`` in which the node reads its weight."""
    matrix = matrix if outputs_first(node) else matrix.mT
    return matrix.reshape(shape).contiguous()


def unfold_of(node: ir.Node, shape: tuple[int, ...]) -> Unfold:
    """Return how the input of a node falls into rows that its matrix multiplies."""
    if node.op_type == "MatMul":
        return Unfold()
    return Unfold.of(node, torch.empty(shape, device="meta"))
