"""QuantizeLinear and DequantizeLinear of 8 and 16 bits; reads also 32-bit codes.

The arithmetic is that of ``qwrap.numerics``; here are the layouts: one scale per tensor, one per
index of an axis, one per block of an axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwrap.dtypes import INT8, INT16, INT32, UINT8, UINT16, QuantType
from qwrap.errors import UnsupportedOpError
from qwrap.numerics import QParams, dequantize, quantize
from qwrap.ops.element_types import torch_dtype
from qwrap.ops.registry import op

TYPES = {t.torch_dtype: t for t in (UINT8, INT8, UINT16, INT16, INT32)}
SINCE_21 = (21, 23, 24, 25, 28)


def _quant_type(dtype: torch.dtype) -> QuantType:
    if dtype not in TYPES:
        raise UnsupportedOpError(f"quantized tensor of type {dtype}")
    return TYPES[dtype]


def _qparams(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block_size: int
) -> QParams:
    """Return scale and zero point as the arithmetic wants them, laid out along one axis."""
    if zero_point is None:
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    scale, zero_point = scale.float(), zero_point.to(torch.int32)
    if scale.numel() == 1:
        return QParams(scale.reshape(1), zero_point.reshape(1))
    if not block_size:
        return QParams(scale, zero_point, axis)
    n = x.shape[axis]  # the last block may be cut off
    scale, zero_point = (
        v.repeat_interleave(block_size, axis).narrow(axis, 0, n).flatten()
        for v in (scale, zero_point)
    )
    return QParams(scale, zero_point, 0)


def _quantized(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: QuantType, axis: int, block: int
) -> Tensor:
    qparams = _qparams(x, scale, zero_point, axis, block)
    if qparams.axis is not None and block:  # every element has a scale of its own
        return quantize(x.flatten(), qparams, dtype).reshape(x.shape)
    return quantize(x, qparams, dtype)


@op("QuantizeLinear", since=(10,))
def quantize_per_tensor(x: Tensor, y_scale: Tensor, y_zero_point: Tensor | None = None) -> Tensor:
    """Return codes, of the type of the zero point, else uint8."""
    return quantize_along_axis(x, y_scale, y_zero_point)


@op("QuantizeLinear", since=(13, 19), ignored=("saturate",))
def quantize_along_axis(
    x: Tensor, y_scale: Tensor, y_zero_point: Tensor | None = None, *, axis: int = 1
) -> Tensor:
    """Return codes, with one scale or one per index of ``axis``."""
    dtype = torch.uint8 if y_zero_point is None else y_zero_point.dtype
    return _quantized(x, y_scale, y_zero_point, _quant_type(dtype), axis, 0)


@op("QuantizeLinear", since=SINCE_21, ignored=("saturate", "precision"))
def quantize_linear(
    x: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """Return codes, with one scale, or one per index or block of ``axis``."""
    dtype = torch_dtype(output_dtype) if output_dtype else torch.uint8
    dtype = dtype if y_zero_point is None else y_zero_point.dtype
    return _quantized(x, y_scale, y_zero_point, _quant_type(dtype), axis, block_size)


@op("DequantizeLinear", since=(10,))
def dequantize_per_tensor(x: Tensor, x_scale: Tensor, x_zero_point: Tensor | None = None) -> Tensor:
    """Return the values of codes."""
    return dequantize_linear(x, x_scale, x_zero_point)


@op("DequantizeLinear", since=(13, 19))
def dequantize_along_axis(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor | None = None, *, axis: int = 1
) -> Tensor:
    """Return the values of codes, with one scale or one per index of ``axis``."""
    return dequantize_linear(x, x_scale, x_zero_point, axis=axis)


@op("DequantizeLinear", since=SINCE_21)
def dequantize_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """Return the values of codes, of the type of the scale unless ``output_dtype`` says another."""
    qparams = _qparams(x, x_scale, x_zero_point, axis, block_size)
    if qparams.axis is not None and block_size:
        values = dequantize(x.flatten(), qparams).reshape(x.shape)
    else:
        values = dequantize(x, qparams)
    return values.to(torch_dtype(output_dtype) if output_dtype else x_scale.dtype)
