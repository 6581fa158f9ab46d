"""Initializers of codes, scales and zero points, made of arrays and of float initializers."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from qwrap.ort.errors import QuantizationError
from qwrap.ort.graphs.tensor_names import TENSOR_NAME_QUANT_SUFFIX
from qwrap.ort.numbers.blocked import join_blocks, split_blocks
from qwrap.ort.numbers.code_types import ONNX_TYPE_TO_NP_TYPE, Array, data_type_name
from qwrap.ort.numbers.codes import pack_bytes_to_4bit, quantize_nparray, refuse_nan

_NARROW = (TensorProto.INT4, TensorProto.UINT4)


def tensor_proto_to_array(initializer: TensorProto) -> Array:
    """Return the values of an initializer of float32 or float16.

    Raises:
        QuantizationError: it is of another type (a ``ValueError``).
    """
    if initializer.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
        return numpy_helper.to_array(initializer)
    raise QuantizationError(
        f"Only float type is supported. Weights {initializer.name} is "
        f"{data_type_name(initializer.data_type)}"
    )


def code_tensor(name: str, values: Array, data_type: int, shape: Any = None) -> TensorProto:
    """Return an initializer of codes, packed where two share a byte.

    Args:
        name: of the initializer.
        values: codes, in the type of ``data_type`` or any that casts to it.
        data_type: ``TensorProto.DataType``.
        shape: None for that of ``values``.
    """
    dtype = ONNX_TYPE_TO_NP_TYPE.get(data_type, np.dtype(np.int32))
    codes = np.ascontiguousarray(values.astype(dtype, copy=False))
    tensor = TensorProto(name=name, data_type=data_type)
    tensor.dims.extend(int(size) for size in (values.shape if shape is None else shape))
    if data_type in _NARROW:
        tensor.raw_data = bytes(pack_bytes_to_4bit(codes))
    else:
        swap = sys.byteorder == "big" and codes.itemsize > 1  # raw_data is little-endian
        tensor.raw_data = (codes.byteswap() if swap else codes).tobytes()
    return tensor


def scale_tensor(name: str, scale: Array, data_type: int, shape: Any = None) -> TensorProto:
    """Return an initializer of scales, of the type of the tensor that they belong to.

    Args:
        name: of the initializer.
        scale: floats.
        data_type: FLOAT or FLOAT16.
        shape: None for that of ``scale``.
    """
    dtype = np.float16 if data_type == TensorProto.FLOAT16 else np.float32
    values = np.asarray(scale, dtype)
    return numpy_helper.from_array(values if shape is None else values.reshape(shape), name)


def quantize_onnx_initializer(
    weight: TensorProto,
    quant_type: int,
    zero_point: Any,
    scale: Any,
    axis: int | None = None,
    quant_weight_name: str | None = None,
    block_size: int = 0,
) -> TensorProto:
    """Return an initializer of the codes of another one.

    Args:
        weight: of float32 or float16, any rank.
        quant_type: ``TensorProto.DataType`` of the codes.
        zero_point: one, one for each index of ``axis``, or one for each block.
        scale: of the same shape.
        axis: along which channels or blocks run, None for one scale; may be negative.
        quant_weight_name: of the new initializer; None for ``<name>_quantized``.
        block_size: elements of a block along ``axis``, 0 for channels.

    Raises:
        QuantizationError: the type is none of floats, or scales do not fit (a ``ValueError``).
        InvalidModelError: a code of float 8 is NaN (a ``RuntimeError``).
    """
    data = tensor_proto_to_array(weight)
    zero_point, scale = np.asarray(zero_point), np.asarray(scale)
    if axis is not None and block_size > 0:
        codes = quantize_blocks(data, quant_type, zero_point, scale, axis, block_size)
    else:
        codes = quantize_channels(data, quant_type, zero_point, scale, axis)
    if quant_type == TensorProto.FLOAT8E4M3FN:
        refuse_nan(codes, data)
    name = quant_weight_name or f"{weight.name}{TENSOR_NAME_QUANT_SUFFIX}"
    return code_tensor(name, codes, quant_type, weight.dims)


def quantize_channels(
    data: Array, quant_type: int, zero_point: Array, scale: Array, axis: int | None
) -> Array:
    """Return the codes of ``data``, with one scale or one for each index of ``axis``.

    Raises:
        QuantizationError: there are more or fewer scales than that (a ``ValueError``).
    """
    if axis is None:
        if scale.size != 1 or zero_point.size != 1:
            raise QuantizationError(
                f"{scale.size} scales and {zero_point.size} zero points, but no axis"
            )
        return quantize_nparray(quant_type, data, scale.reshape(()), zero_point.reshape(()))
    if not -data.ndim <= axis < data.ndim or scale.size != data.shape[axis]:
        raise QuantizationError(
            f"{scale.size} scales along axis {axis} of a tensor of shape {data.shape}"
        )
    along = [1] * data.ndim
    along[axis] = -1
    return quantize_nparray(quant_type, data, scale.reshape(along), zero_point.reshape(along))


def quantize_blocks(
    data: Array, quant_type: int, zero_point: Array, scale: Array, axis: int, block_size: int
) -> Array:
    """Return the codes of ``data``, with a scale for each block along ``axis``.

    Raises:
        QuantizationError: there are more or fewer scales than blocks (a ``ValueError``).
    """
    blocks, axis = split_blocks(data, axis, block_size)
    if scale.shape != (*blocks.shape[: axis + 1], *blocks.shape[axis + 2 :]):
        raise QuantizationError(
            f"scales of shape {scale.shape} for blocks of {block_size} along axis {axis} of a "
            f"tensor of shape {data.shape}"
        )
    scales, zeros = (np.expand_dims(values, axis + 1) for values in (scale, zero_point))
    return join_blocks(quantize_nparray(quant_type, blocks, scales, zeros), axis, data.shape[axis])
