"""QuantizeLinear and DequantizeLinear with more types than ai.onnx had at the time."""

from __future__ import annotations

from torch import Tensor

from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.quant import code_type, dequantize_linear, quantize_as


@microsoft("QuantizeLinear")
def quantize(
    x: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    element_type: int | None = None,
) -> Tensor:
    """Return codes of 4, 8 or 16 bits, with one scale or one per index of ``axis``."""
    return quantize_as(x, y_scale, y_zero_point, code_type(y_zero_point, 0, element_type), axis)


@microsoft("DequantizeLinear")
def dequantize(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor | None = None, *, axis: int = 1
) -> Tensor:
    """Return the values of codes, with one scale or one per index of ``axis``."""
    return dequantize_linear(x, x_scale, x_zero_point, axis=axis)
