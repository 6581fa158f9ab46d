"""Scales of biases: those of the products that they are added to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto

from qwrap.ort.numbers.code_types import Array
from qwrap.ort.numbers.quantization_params import QuantizationParams


@dataclass(frozen=True)
class BiasLayout:
    """How the scales of a product's channels lie along a bias.

    Attributes:
        scale: ``[1]``, or one for each index of ``axis``.
        axis: of the bias; None for one scale.
    """

    scale: Array
    axis: int | None

    def along(self, rank: int) -> Array:
        """Return the scales in a shape that broadcasts to a bias of ``rank`` dimensions."""
        shape = [1] * rank
        if self.axis is not None:
            shape[self.axis] = -1
        return self.scale.reshape(shape)


def product_factor(node: NodeProto | None) -> float:
    """Return what an operator multiplies its product by before it adds the bias."""
    if node is None or node.op_type != "Gemm":
        return 1.0
    return next((a.f for a in node.attribute if a.name == "alpha"), 1.0)


def product_scale(input_scale: Array, weight_scale: Array, factor: float, dtype: Any) -> Array:
    """Return the scale of a product as the bias has it, in the bias's type; never 0."""
    scale = input_scale.reshape(()).astype(np.float32) * weight_scale.astype(np.float32)
    scale = np.asarray(scale * np.float32(factor)) if factor != 1.0 else np.asarray(scale)
    least = np.finfo(dtype).smallest_subnormal if dtype == np.float16 else np.finfo(dtype).tiny
    return np.asarray(np.maximum(scale.astype(dtype), least))


def layout(
    bias_shape: tuple[int, ...],
    scale: Array,
    weight: QuantizationParams | None,
    node: NodeProto | None,
) -> BiasLayout | None:
    """Return how int32 codes of a bias are to be scaled; None if no scale fits.

    Args:
        bias_shape: of the bias.
        scale: of the product: one, or one for each channel of the weight.
        weight: parameters of the weight; None if it was quantized before.
        node: that adds the bias.
    """
    if scale.size == 1:
        return BiasLayout(scale.reshape(-1), None)
    if scale.ndim != 1 or not bias_shape or not _along_outputs(node, weight):
        return None
    repeats = 1
    if node is not None and node.op_type == "ConvTranspose":
        # one scale for each output channel of a group, the same for all groups
        repeats = next((a.i for a in node.attribute if a.name == "group"), 1)
    if bias_shape[-1] != scale.size * repeats:
        return None
    return BiasLayout(np.tile(scale, repeats), len(bias_shape) - 1)


def _along_outputs(node: NodeProto | None, weight: QuantizationParams | None) -> bool:
    """Whether the channels of a weight are those of the output, to which a bias belongs."""
    if node is None or weight is None:
        return True
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    outputs = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if transposed else 1}
    return bool(outputs.get(node.op_type, weight.get("axis")) == weight.get("axis"))
