"""Products of codes with measured scales: int32 sums, cast and multiplied by both scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qwrap.ort.quant_utils import get_mul_node

if TYPE_CHECKING:
    from qwrap.ort.onnx_quantizer import ONNXQuantizer
    from qwrap.ort.operators.base_operator import QuantOperatorBase


def scaled_product(
    operator: QuantOperatorBase,
    op_type: str,
    result: str,
    reduce_range: bool,
    per_channel: bool,
) -> list[NodeProto]:
    """Return the nodes of a product of an activation and a weight.

    Args:
        operator: of the float node, whose first two inputs are multiplied.
        op_type: ConvInteger or MatMulInteger.
        result: name of the float product.
        reduce_range: weights of 7 bits where the quantizer is asked for them.
        per_channel: one scale per column where it is asked for them.
    """
    quantizer, node = operator.quantizer, operator.node
    nodes: list[NodeProto]
    codes, zero_points, scales, nodes = quantizer.quantize_activation(node, [0])
    weight, zeros, factors, made = quantizer.quantize_weight(
        node, [1], reduce_range=reduce_range, op_level_per_channel=per_channel
    )
    nodes += made
    zeros, factors = (spread(quantizer, node.input[1], names[0]) for names in (zeros, factors))
    kind = quantizer.get_tensor_type(node.output[0], mandatory=True)
    sums, name = f"{node.output[0]}_output_quantized", operator.quantized_name
    inputs = [*codes, *weight, *zero_points, zeros]
    nodes.append(helper.make_node(op_type, inputs, [sums], name, **operator.attributes()))
    half = kind == TensorProto.FLOAT16  # which int32 sums would overflow
    target = TensorProto.FLOAT if half else kind
    cast = f"{sums}_cast_output"
    nodes.append(helper.make_node("Cast", [sums], [cast], f"{sums}_cast", to=target))
    product = _product_of_scales(quantizer, [scales[0], factors], name, nodes)
    scaled = quantizer.free_name(f"{result}_float32") if half else result
    nodes.append(get_mul_node([cast, product], scaled, f"{name}_output_scale_mul" if name else ""))
    if half:
        to = TensorProto.FLOAT16
        nodes.append(helper.make_node("Cast", [scaled], [result], f"{result}_Cast", to=to))
    return nodes


def _product_of_scales(
    quantizer: ONNXQuantizer, scales: list[str], name: str, nodes: list[NodeProto]
) -> str:
    """Append the product of two scales, in place, unless an unnamed node has it already."""
    base = f"{name}_scales_mul" if name else f"{scales[0]}_{scales[1]}_mul"
    known = quantizer.scale_products.get(base)
    if known is not None and not name:
        return known
    output = quantizer.free_name(f"{base}:0")
    quantizer.scale_products[base] = output
    nodes.append(get_mul_node(scales, output, base))
    return output


def spread(quantizer: ONNXQuantizer, weight: str, name: str) -> str:
    """Return scales or zero points in the shape that kernels ask of a batch of matrices.

    For a constant ``[..., K, N]`` of more than two axes that is ``[..., 1, N]``.
    """
    tensor, per_column = quantizer.find_initializer(weight), quantizer.find_initializer(name)
    if tensor is None or per_column is None or len(tensor.dims) < 3:
        return name
    values = numpy_helper.to_array(per_column)
    if values.ndim != 1:
        return name
    shape = (*tensor.dims[:-2], 1, values.size)
    spread = numpy_helper.from_array(np.array(np.broadcast_to(values, shape)), f"{name}_batched")
    quantizer.find_owner(name).model.add_initializer(spread)
    return spread.name
