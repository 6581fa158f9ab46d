"""Biases: int32 codes whose scale is that of the product that they are added to."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qwrap.ort.enums import QuantizedValueType
from qwrap.ort.graphs.tensor_names import (
    DEQUANT_OP_NAME,
    TENSOR_NAME_QUANT_SUFFIX,
    add_dequant_suffix,
)
from qwrap.ort.numbers.bias import bias_codes, weight_scale_for_bias
from qwrap.ort.numbers.code_types import FLOAT8_TYPES, Array
from qwrap.ort.numbers.initializers import tensor_proto_to_array
from qwrap.ort.numbers.quantized_values import QuantizedValue
from qwrap.ort.qdq.bias_scales import BiasLayout, layout, product_factor, product_scale
from qwrap.ort.qdq.marks import QDQBiasQuantInfo, QDQTensorQuantizedValue

if TYPE_CHECKING:
    from qwrap.ort.qdq.scope import QuantizedGraph
    from qwrap.ort.qdq_quantizer import QDQQuantizer

logger = logging.getLogger(__name__)


def fit_weights(quantizer: QuantizedGraph) -> None:
    """Enlarge, in place, scales of weights with which an int32 bias would overflow."""
    for name, info in quantizer.bias_to_quantize.items():
        owner = quantizer.owner_of(info.weight_name)
        weight = owner.initializer_quant_params.get(info.weight_name)
        input_scale = quantizer.scale_of(info.input_name, info.node_name)
        if weight is None or input_scale is None or input_scale.size != 1:
            continue
        if weight["quant_type"] in FLOAT8_TYPES or info.weight_name in owner.scales:
            continue
        bias = tensor_proto_to_array(quantizer.require_initializer(name))
        old = weight["scale"]
        if old.ndim > 1 or bias.size % max(old.size, 1):
            continue
        product = input_scale.astype(np.float64) * product_factor(info.node)
        new = weight_scale_for_bias(bias.astype(np.float64) * info.beta, product, old)
        if new is not None:
            logger.info("Increasing scale of weight `%s` for bias `%s`", info.weight_name, name)
            weight["scale"] = new


def mark_bias(
    quantizer: QDQQuantizer,
    node_name: str,
    bias_name: str,
    input_name: str,
    weight_name: str,
    beta: float,
) -> None:
    """Mark a bias of the quantizer's graph, in place; one with overrides becomes a weight.

    A bias that another node has too, or that a graph around this one owns, is copied, for its
    scale is that of its node.
    """
    if quantizer.tensor_quant_overrides.get(bias_name):
        logger.info("Quantizing bias '%s' as a weight: it has overrides", bias_name)
        per_channel, axis = quantizer.is_tensor_per_channel(bias_name, default_axis=0)
        if per_channel and axis is not None:
            quantizer.quantize_weight_tensor_per_channel(bias_name, axis)
        else:
            quantizer.quantize_weight_tensor(bias_name)
        return
    bias = quantizer.find_initializer(bias_name)
    if bias is None:
        logger.warning("Expected bias '%s' to be an initializer", bias_name)
        return
    if bias.data_type not in {TensorProto.FLOAT, TensorProto.FLOAT16}:
        logger.info("Expected bias '%s' to be an floating-point initializer", bias_name)
        return
    node, position = quantizer.reader_named(node_name, bias_name)
    name = bias_name
    if bias_name in quantizer.bias_to_quantize or not quantizer.uses.is_local(bias_name):
        name = quantizer.copy_initializer(bias)
        if node is not None:
            node.input[position] = name
            quantizer.uses.reread(node, bias_name, name)
    info = QDQBiasQuantInfo(node_name, input_name, weight_name, beta, node, position)
    quantizer.bias_to_quantize[name] = info


def write_bias(quantizer: QuantizedGraph, name: str, info: QDQBiasQuantInfo) -> str | None:
    """Write the codes of a bias and the node that makes floats of them; the float bias goes.

    Returns:
        The name of the initializer of the codes; None if the bias stays float, since no int32
        scale fits it.
    """
    initializer = quantizer.require_initializer(name)
    bias = tensor_proto_to_array(initializer)
    found = None
    if quantizer.weight_qType not in FLOAT8_TYPES:
        found = _layout_of(quantizer, name, bias, info)
        if found is None:
            return None
    target = quantizer.own_bias(name, info)
    if target is None:
        return None
    codes = target + TENSOR_NAME_QUANT_SUFFIX
    if found is None:
        node = _write_float8(quantizer, target, codes, bias, initializer.data_type)
    else:
        node = _write_int32(quantizer, target, codes, bias, info.beta, found)
        if info.node is not None and info.node.op_type == "Gemm":
            for attribute in info.node.attribute:
                if attribute.name == "beta":
                    attribute.f = 1.0
    quantizer.edit.insert(target, [node])
    return codes


def _layout_of(
    quantizer: QuantizedGraph, name: str, bias: Array, info: QDQBiasQuantInfo
) -> BiasLayout | None:
    factor = product_factor(info.node)
    weight_scale = quantizer.scale_of(info.weight_name, info.node_name)
    input_scale = quantizer.scale_of(info.input_name, info.node_name)
    if weight_scale is None or input_scale is None or input_scale.size != 1 or factor <= 0:
        return None
    scale = product_scale(input_scale, weight_scale, factor, bias.dtype)
    owner = quantizer.owner_of(info.weight_name)
    params = owner.initializer_quant_params.get(info.weight_name)
    found = layout(bias.shape, scale, params, info.node)
    if found is None:
        logger.info("bias '%s' stays float: its weight has no scale for each of its values", name)
    return found


def _write_int32(
    quantizer: QuantizedGraph,
    name: str,
    codes_name: str,
    bias: Array,
    beta: float,
    found: BiasLayout,
) -> NodeProto:
    codes, outside = bias_codes(bias, found.along(bias.ndim), beta)
    if outside:
        logger.warning(
            "Quantized bias `%s` exceeds the range of a int32. The bias scale is too small.", name
        )
    zero_shape = found.scale.shape if found.scale.size > 1 else ()
    scale_name, zero_name = f"{codes_name}_scale", f"{codes_name}_zero_point"
    quantizer.add_tensors(
        numpy_helper.from_array(codes, codes_name),
        numpy_helper.from_array(found.scale, scale_name),
        numpy_helper.from_array(np.zeros(zero_shape, np.int32), zero_name),
    )
    _record(quantizer, name, codes_name, DEQUANT_OP_NAME, found.axis)
    return helper.make_node(
        DEQUANT_OP_NAME,
        [codes_name, scale_name, zero_name],
        [name],
        add_dequant_suffix(name),
        domain=quantizer.qdq_op_domain,
        axis=found.axis,
    )


def _write_float8(
    quantizer: QuantizedGraph, name: str, codes_name: str, bias: Array, data_type: int
) -> NodeProto:
    """Write a bias next to float8 weights: kernels want a float one, that is cast."""
    quantizer.add_tensors(numpy_helper.from_array(bias.astype(np.float32), codes_name))
    _record(quantizer, name, codes_name, "Cast", None)
    return helper.make_node("Cast", [codes_name], [name], add_dequant_suffix(name), to=data_type)


def _record(
    quantizer: QuantizedGraph, name: str, codes_name: str, made_by: str, axis: int | None
) -> None:
    value = QuantizedValue(
        name,
        codes_name,
        f"{codes_name}_scale",
        f"{codes_name}_zero_point",
        QuantizedValueType.Initializer,
        axis,
        node_type=made_by,
        node_qtype=quantizer.weight_qType,
    )
    quantizer.quantized_value_map[name] = QDQTensorQuantizedValue(value, None, None)
