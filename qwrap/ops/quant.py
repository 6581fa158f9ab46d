"""QuantizeLinear and DequantizeLinear: integers of 2 to 32 bits and floats of 4 to 8.

The arithmetic of integer codes is that of ``qwrap.numerics``; here are the layouts: one scale per
tensor, one per index of an axis, one per block of an axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from onnx import TensorProto
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.dtypes import INT32, INTEGERS
from qwrap.errors import UnsupportedOpError
from qwrap.minifloat import FLOAT8, GRIDS
from qwrap.numerics import QParams, along_axis, dequantize, quantize
from qwrap.ops.cast import convert, data_type_of
from qwrap.ops.element_types import TORCH_DTYPES
from qwrap.ops.registry import op

TYPES: Mapping[int, QuantSpec] = MappingProxyType({
    t.onnx_type: QuantSpec(dtype=t, symmetric=False) for t in (*INTEGERS, INT32)
})
"""``onnx.TensorProto`` data type to the integer codes it holds."""

SINCE_23 = (23, 24, 25, 28)


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
    scale, zero_point = (_unfolded(v, x, axis, block_size) for v in (scale, zero_point))
    return QParams(scale.flatten(), zero_point.flatten(), 0)


def _unfolded(blocks: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """Return for each element of ``x`` the value of its block; the last block may be cut off."""
    return blocks.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])


def _placed(values: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """Return scales or zero points as float32 that broadcasts against ``x``."""
    values = values.to(torch.float32)
    if values.numel() == 1:
        return values.reshape(())
    return (
        _unfolded(values, x, axis, block_size) if block_size else along_axis(values, axis, x.ndim)
    )


def _float_codes(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    data_type: int,
    axis: int,
    block_size: int,
    saturate: bool,
) -> Tensor:
    """Return ``x / scale`` as a float type of at most 8 bits."""
    steps = x.detach().to(torch.float32) / _placed(scale.detach(), x, axis, block_size)
    if zero_point is not None:
        steps = steps + _placed(zero_point, x, axis, block_size)
    codes: Tensor = convert(steps, data_type, saturate)
    return codes


def quantize_as(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    data_type: int,
    axis: int = 1,
    block_size: int = 0,
    saturate: bool = True,
    precision: int = 0,
) -> Tensor:
    """Return codes of the ``onnx.TensorProto`` data type ``data_type``.

    The division is one of float32, as in onnxruntime, which makes nothing of ``precision``; it has
    no kernel for bfloat16 scales: those divide in bfloat16, as ONNX says.

    Raises:
        UnsupportedOpError: nothing is quantized to that type.
    """
    if scale.dtype == torch.bfloat16 and precision in (0, TensorProto.BFLOAT16):
        x = x.detach().to(torch.bfloat16) / _placed(scale, x, axis, block_size).to(torch.bfloat16)
        scale = torch.ones_like(scale)
    if data_type in FLOAT8 or data_type in GRIDS:
        return _float_codes(x, scale, zero_point, data_type, axis, block_size, saturate)
    if data_type not in TYPES:
        name = TensorProto.DataType.Name(data_type)
        raise UnsupportedOpError(f"nothing can be quantized to element type {name}")
    qparams = _qparams(x, scale, zero_point, axis, block_size)
    if qparams.axis is not None and block_size:  # every element has a scale of its own
        return quantize(x.flatten(), qparams, TYPES[data_type]).reshape(x.shape)
    return quantize(x, qparams, TYPES[data_type])


def code_type(zero_point: Tensor | None, output_dtype: int, element_type: int | None) -> int:
    """Return the type of the codes: what inference found, else what the node says itself."""
    if element_type or zero_point is None:
        return element_type or output_dtype or TensorProto.UINT8
    return data_type_of(zero_point)


@op("QuantizeLinear", since=(10,))
def quantize_per_tensor(x: Tensor, y_scale: Tensor, y_zero_point: Tensor | None = None) -> Tensor:
    """Return codes, of the type of the zero point, else uint8."""
    return quantize_along_axis(x, y_scale, y_zero_point)


@op("QuantizeLinear", since=(13,))
def quantize_along_axis(
    x: Tensor, y_scale: Tensor, y_zero_point: Tensor | None = None, *, axis: int = 1
) -> Tensor:
    """Return codes, with one scale or one per index of ``axis``."""
    return quantize_as(x, y_scale, y_zero_point, code_type(y_zero_point, 0, None), axis)


@op("QuantizeLinear", since=(19,))
def quantize_saturating(
    x: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    saturate: int = 1,
) -> Tensor:
    """Return codes; 8-bit floats out of range become the largest number only if ``saturate``."""
    data_type = code_type(y_zero_point, 0, None)
    return quantize_as(x, y_scale, y_zero_point, data_type, axis, saturate=bool(saturate))


@op("QuantizeLinear", since=(21,))
def quantize_blocks(
    x: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    saturate: int = 1,
    element_type: int | None = None,
) -> Tensor:
    """Return codes, with one scale, or one per index or block of ``axis``."""
    data_type = code_type(y_zero_point, output_dtype, element_type)
    return quantize_as(x, y_scale, y_zero_point, data_type, axis, block_size, bool(saturate))


@op("QuantizeLinear", since=SINCE_23)
def quantize_linear(
    x: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
    element_type: int | None = None,
) -> Tensor:
    """Return codes; ``precision`` says in which type to divide, see ``quantize_as``."""
    data_type = code_type(y_zero_point, output_dtype, element_type)
    return quantize_as(
        x, y_scale, y_zero_point, data_type, axis, block_size, bool(saturate), precision
    )


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


@op("DequantizeLinear", since=(21, *SINCE_23))
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
    dtype = TORCH_DTYPES[output_dtype] if output_dtype else x_scale.dtype
    if x.dtype.is_floating_point:
        values = x.to(torch.float32)
        if x_zero_point is not None:
            values = values - _placed(x_zero_point, x, axis, block_size)
        return (values * _placed(x_scale, x, axis, block_size)).to(dtype)
    qparams = _qparams(x, x_scale, x_zero_point, axis, block_size)
    if qparams.axis is not None and block_size:
        return dequantize(x.flatten(), qparams).reshape(x.shape).to(dtype)
    return dequantize(x, qparams).to(dtype)
