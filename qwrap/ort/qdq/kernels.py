"""What onnxruntime's integer kernels take of a weight, where its fusions do not look.

MatMul and Conv between QDQ pairs of 8 bits are fused whatever the shape of the weight's scale, and
some of these kernels then refuse to run. Such a node reads its other input as float, so that it is
not fused: a float operator on dequantized weights.

Source: what onnxruntime 1.31 on CPU ran and refused; MatMulNodeGroupSelector and
ConvNodeGroupSelector in onnxruntime/core/optimizer/qdq_transformer.
"""

from __future__ import annotations

from onnx import NodeProto, TensorProto

from qwrap.ort.quantization_params import QuantizationParams

_BYTES = {TensorProto.INT8, TensorProto.UINT8}


def kernel_takes(node: NodeProto, position: int, weight: QuantizationParams, rank: int) -> bool:
    """Whether the kernel that onnxruntime fuses ``node`` into runs with such a weight.

    Args:
        node: between pairs of 8 bits.
        position: of the weight among its inputs.
        weight: its parameters.
        rank: its dimensions.
    """
    if weight["scale"].ndim == 0 or weight["quant_type"] not in _BYTES:
        return True
    axis, block_size = weight.get("axis"), weight.get("block_size", 0)
    if node.op_type == "Conv":
        return axis == 0 and not block_size
    if node.op_type != "MatMul":
        return True
    if position == 0:
        return bool(weight["quant_type"] == TensorProto.INT8)  # is not fused
    if block_size:  # full blocks along the rows are one scale for each column
        return bool(rank > 1 and axis == rank - 2 and weight["scale"].shape[axis] == 1)
    return rank == 2 and axis == 1


def is_byte(data_type: int) -> bool:
    """Whether codes of that type are multiplied by those kernels."""
    return data_type in _BYTES
