"""The initializers that stand for a quantized constant or bias."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from qwrap.ort.graphs.tensor_names import TENSOR_NAME_QUANT_SUFFIX
from qwrap.ort.numbers.bias import bias_codes, bias_scale
from qwrap.ort.numbers.code_types import Array
from qwrap.ort.numbers.initializers import (
    code_tensor,
    quantize_onnx_initializer,
    scale_tensor,
    tensor_proto_to_array,
)

logger = logging.getLogger(__name__)


def constant_tensors(
    weight: TensorProto, quant_type: int, zero_point: Any, scale: Any, axis: int | None
) -> list[TensorProto]:
    """Return ``<name>_quantized``, ``<name>_zero_point`` and ``<name>_scale`` of a constant.

    Args:
        weight: an initializer of float32 or float16.
        quant_type: ``TensorProto.DataType`` of the codes.
        zero_point: 0-d, or one for each channel.
        scale: of the same shape.
        axis: along which channels run; None for one scale.
    """
    return [
        quantize_onnx_initializer(weight, quant_type, zero_point, scale, axis),
        code_tensor(weight.name + "_zero_point", zero_point, quant_type),
        scale_tensor(weight.name + "_scale", scale, weight.data_type),
    ]


def bias_tensors(
    bias: TensorProto, input_scale: Any, weight_scale: Any, beta: float = 1.0
) -> tuple[list[TensorProto], Array]:
    """Return int32 codes of ``beta`` times a bias, zero point and scale, and the scales, flat.

    The zero point is a scalar where there is one scale. Codes that leave int32 are cut, with a
    warning.
    """
    values = tensor_proto_to_array(bias)
    name = bias.name + TENSOR_NAME_QUANT_SUFFIX
    scale = bias_scale(values, input_scale, weight_scale)
    codes, outside = bias_codes(values, scale, beta)
    if outside:
        logger.warning(
            "Quantized bias `%s` exceeds the range of a int32. The bias scale is too small.",
            bias.name,
        )
    zeros = np.zeros(scale.shape if scale.size > 1 else ())
    tensors = [
        code_tensor(name, codes.reshape(values.shape), TensorProto.INT32),
        code_tensor(name + "_zero_point", zeros, TensorProto.INT32),
        numpy_helper.from_array(scale, name + "_scale"),
    ]
    return tensors, scale


def float_bias_tensors(
    bias: TensorProto, float8_type: int, beta: float = 1.0
) -> tuple[list[TensorProto], Array]:
    """Return what stands for a bias beside float8 weights: its float32 values, and scale 1."""
    values = tensor_proto_to_array(bias)
    name, scale = bias.name + TENSOR_NAME_QUANT_SUFFIX, np.ones(1, np.float32)
    tensors = [
        numpy_helper.from_array((values.astype(np.float64) * beta).astype(np.float32), name),
        code_tensor(name + "_zero_point", np.zeros(1), float8_type),
        numpy_helper.from_array(scale, name + "_scale"),
    ]
    return tensors, scale
