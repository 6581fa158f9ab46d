"""Biases as int32 codes with the scale of the products that they are added to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from qwrap.ort.enums import QuantizedValueType
from qwrap.ort.errors import QuantizationError
from qwrap.ort.numbers.bias import bias_codes, weight_scale_for_bias
from qwrap.ort.qoperator.code_inputs import float32_tensor, value_type
from qwrap.ort.quant_utils import (
    TENSOR_NAME_QUANT_SUFFIX,
    QuantizedValue,
    quantize_onnx_initializer,
    tensor_proto_to_array,
)

if TYPE_CHECKING:
    from qwrap.ort.qoperator.code_graph import CodeGraph
    from qwrap.ort.qoperator.code_values import CodeValues


def quantize_bias(
    quantizer: CodeValues,
    bias_name: str,
    input_name: str,
    weight_name: str,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> str:
    """Add the int32 codes of a bias, and return their name.

    A kernel computes ``alpha * s_x * s_w * (sum of products + codes)``, so the codes are
    ``round(beta * bias / (alpha * s_x * s_w))``. Where int32 cannot hold them the scale of the
    weight grows first; a weight that another bias was computed with gets codes of its own.

    Args:
        quantizer: of the graph that has the node.
        bias_name: a float constant; scalars and single columns stand for all columns.
        input_name: the activation, quantized.
        weight_name: the weight, quantized.
        beta: factor of the bias.
        alpha: factor of the products.

    Raises:
        QuantizationError: the bias is not constant, or the activation has no codes.
    """
    bias = quantizer.find_initializer(bias_name)
    value = quantizer.find_quantized_value(input_name)
    if bias is None or value is None:
        missing = "a constant" if bias is None else "quantized"
        name = bias_name if bias is None else input_name
        raise QuantizationError(f"the bias '{bias_name}' needs '{name}' to be {missing}")
    input_scale, factor = _array(quantizer, value.scale_name), np.float64(alpha / beta)
    weight_scale = _weight_scale(quantizer, weight_name)
    if value_type(quantizer, value) == TensorProto.FLOAT8E4M3FN:
        return _left_float(quantizer, bias, input_scale, weight_scale, beta)
    size = input_scale * np.abs(factor)
    owner = quantizer.find_owner(weight_name)
    if owner is not None:
        grown, scale = grown_scale(bias, size, weight_scale, weight_scale.ndim == 1)
        if grown:
            _grow(owner, weight_name, scale)
            weight_scale = scale
        owner.biased_weights.add(owner.quantized_value_map[weight_name].q_name)
    product = np.asarray(input_scale * weight_scale, np.float64)  # float32, as kernels have it
    return _added(quantizer, bias, product * factor)


def _left_float(
    quantizer: CodeValues, bias: TensorProto, input_scale: Any, weight_scale: Any, beta: float
) -> str:
    """Add a bias to products of float8, which stays float."""
    known = quantizer.quantized_value_map.get(bias.name)
    if known is None:
        names = quantizer.quantize_bias_static_impl(bias.name, input_scale, weight_scale, beta)
        known = QuantizedValue(
            bias.name,
            *names[:3],
            QuantizedValueType.Initializer,
            node_type=names[4],
            node_qtype=names[5],
        )
        quantizer.quantized_value_map[bias.name] = known
    return str(known.q_name)


def _added(quantizer: CodeValues, bias: TensorProto, scale: NDArray[Any]) -> str:
    """Add codes of a bias to the graph that reads them, or find those of the same scale."""
    known = quantizer.quantized_value_map.get(bias.name)
    count, name = 0, bias.name
    while known is not None:
        stored = _array(quantizer, known.scale_name)
        same = known.node_qtype == TensorProto.INT32 and stored.size == scale.size
        if same and np.allclose(stored.ravel(), scale.ravel(), 1e-6, 0):
            return str(known.q_name)
        name, count = f"{bias.name}{count}", count + 1
        known = quantizer.quantized_value_map.get(name)
    tensor = _expanded(bias, scale.size, name)
    if name != bias.name or quantizer.model.get_initializer(name) is None:
        quantizer.model.add_initializer(tensor)  # unread once it is quantized, and cleaned away
    return _stored(quantizer, tensor, scale)


def _stored(quantizer: CodeValues, bias: TensorProto, scale: NDArray[Any]) -> str:
    data = tensor_proto_to_array(bias).astype(np.float64)
    codes, _ = bias_codes(data, scale.reshape(-1) if scale.size > 1 else scale)
    name = quantizer.free_name(bias.name + TENSOR_NAME_QUANT_SUFFIX)
    names = name, quantizer.free_name(f"{name}_scale"), quantizer.free_name(f"{name}_zero_point")
    zeros = np.zeros(scale.shape if scale.size > 1 else (), np.int32)
    scales = scale.astype(np.float32).reshape(-1)
    for array, stored in zip((codes, scales, zeros), names, strict=True):
        quantizer.model.add_initializer(numpy_helper.from_array(array, stored))
    quantizer.quantized_value_map[bias.name] = QuantizedValue(
        bias.name,
        *names,
        QuantizedValueType.Initializer,
        0 if scale.size > 1 else None,
        node_type="DequantizeLinear",
        node_qtype=TensorProto.INT32,
    )
    return name


def _expanded(bias: TensorProto, channels: int, name: str) -> TensorProto:
    """Return a copy of a bias as float32, with a column for each scale."""
    tensor = float32_tensor(bias)
    data = numpy_helper.to_array(tensor)
    if channels > 1 and data.shape[-1:] != (channels,):
        columns = data.shape[:-1] if data.ndim else ()
        data = np.broadcast_to(data, (*columns, channels))
    return numpy_helper.from_array(np.ascontiguousarray(data), name)


def grown_scale(
    bias: TensorProto, input_scale: Any, weight_scale: NDArray[Any], per_channel: bool
) -> tuple[bool, NDArray[Any]]:
    """Return whether scales of a weight must grow for int32 to hold a bias, and the scales."""
    largest = np.abs(tensor_proto_to_array(bias))
    if per_channel and weight_scale.size > 1:
        columns = np.broadcast_to(largest, (*largest.shape[:-1], weight_scale.size))
        largest = columns.reshape(-1, weight_scale.size).max(axis=0)
    scale = weight_scale_for_bias(largest.reshape(-1), np.asarray(input_scale), weight_scale)
    return (False, weight_scale) if scale is None else (True, scale)


def _grow(owner: CodeGraph, name: str, scale: NDArray[Any]) -> None:
    """Give a weight new scales, in place, or under another name where a bias needs the old."""
    value = owner.quantized_value_map[name]
    if value.q_name in owner.biased_weights:
        value = _doubled(owner, value)
        owner.constant_codes.setdefault(name, []).append(value)
        owner.quantized_value_map[name] = value
    requantize(owner, name, scale)


def _doubled(owner: CodeGraph, value: QuantizedValue) -> QuantizedValue:
    """Add a second copy of the codes, the scale and the zero point of a weight."""
    codes, scale, zero_point = (
        _copied(owner, name) for name in (value.q_name, value.scale_name, value.zp_name)
    )
    return QuantizedValue(
        value.original_name,
        codes,
        scale,
        zero_point,
        value.value_type,
        value.axis,
        node_qtype=value.node_qtype,
    )


def _copied(owner: CodeGraph, name: str) -> str:
    """Add a copy of an initializer, and return its name."""
    tensor = TensorProto()
    found = owner.model.get_initializer(name)
    if found is not None:
        tensor.CopyFrom(found)
    tensor.name = owner.free_name(name)
    owner.model.add_initializer(tensor)
    return tensor.name


def requantize(quantizer: CodeGraph, name: str, scale: NDArray[Any]) -> None:
    """Replace the scale and the codes of a constant, in place."""
    value = quantizer.quantized_value_map.get(name)
    weight = quantizer.model.get_initializer(name)
    if value is None or weight is None:
        return
    stored = quantizer.model.get_initializer(value.scale_name)
    codes = quantizer.model.get_initializer(value.q_name)
    zero_point = quantizer.model.get_initializer(value.zp_name)
    if stored is None or codes is None or zero_point is None:
        return
    scale = np.asarray(scale, np.float32).reshape(tuple(stored.dims))
    stored.CopyFrom(numpy_helper.from_array(scale, value.scale_name))
    zeros = numpy_helper.to_array(zero_point)
    codes.CopyFrom(
        quantize_onnx_initializer(
            float32_tensor(weight), codes.data_type, zeros, scale, value.axis, value.q_name
        )
    )


def _weight_value(quantizer: CodeValues, name: str) -> QuantizedValue:
    value = quantizer.find_quantized_value(name)
    if value is None:
        raise QuantizationError(f"the weight '{name}' is to be quantized before its bias")
    return value


def _weight_scale(quantizer: CodeValues, name: str) -> NDArray[Any]:
    return _array(quantizer, _weight_value(quantizer, name).scale_name)


def _array(quantizer: CodeValues, name: str) -> NDArray[Any]:
    tensor = quantizer.find_initializer(name)
    if tensor is None:
        raise QuantizationError(f"the scale '{name}' is not constant")
    return numpy_helper.to_array(float32_tensor(tensor))
