"""What onnxruntime's integer kernels take of a weight, where its fusions do not look.

MatMul and Conv between QDQ pairs of 8 bits are fused whatever the shape of the weight's scale, and
some of these kernels then refuse to run. A Sum of one operand before such a node keeps it from
being fused: it computes in float what the pairs say. So it is with a Concat of float16 tensors.

Past float operators that only move values it moves pairs. From opset 21 on it names the type of the
new ones, int8, then makes uint8 of the zero point, and refuses what it made; a Sum stops it too.

Source: what onnxruntime 1.31 on CPU ran and refused; MatMulNodeGroupSelector and
ConvNodeGroupSelector in onnxruntime/core/optimizer/qdq_transformer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import NodeProto, TensorProto, helper

from qwrap.ort.numbers.quantization_params import QuantizationParams

if TYPE_CHECKING:
    from qwrap.ort.qdq.scope import QuantizedGraph

_MOVES = frozenset({
    "Flatten",
    "Identity",
    "MaxPool",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
})
_TYPED_PAIRS = 21  # opset from which a QuantizeLinear may name its type
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


def find_unfused(quantizer: QuantizedGraph) -> None:
    """Note the nodes of a graph, and the inputs of theirs, that are not to be fused, in place."""
    for node in quantizer.quantized_nodes:
        if node.op_type == "Concat" and _is_half(quantizer, node.input[0]):
            quantizer.unfused[id(node)] = 0
        elif node.op_type in {"MatMul", "Conv"}:
            for weight, other in ((1, 0), (0, 1)):
                if not _is_taken(quantizer, node, weight, other):
                    quantizer.unfused[id(node)] = other


def _is_half(quantizer: QuantizedGraph, name: str) -> bool:
    """Whether a tensor has codes of 8 bits and a scale of float16, which QLinearConcat refuses."""
    found = quantizer.scales.find(name)
    if found is None or found.original.zero_point.data_type not in _BYTES:
        return False
    return bool(found.original.scale.data_type == TensorProto.FLOAT16)


def _is_taken(quantizer: QuantizedGraph, node: NodeProto, weight: int, other: int) -> bool:
    name = node.input[weight]
    params = quantizer.owner_of(name).initializer_quant_params.get(name)
    found = None if params is None else quantizer.scales.find(node.input[other])
    if params is None or found is None:
        return True
    codes = found.get_for_consumer(node.name).zero_point.data_type
    rank = len(quantizer.require_initializer(name).dims)
    return codes not in _BYTES or kernel_takes(node, weight, params, rank)


def keep_unfused(quantizer: QuantizedGraph) -> None:
    """Put a node that changes nothing before each input that was noted, into the graph's edit."""
    for node in quantizer.quantized_nodes:
        if id(node) in quantizer.unfused:
            name = quantizer.free_name(f"{node.output[0]}_unfused_input")
            barrier = helper.make_node("Sum", [""], [name], f"{node.name}_unfused_input")
            quantizer.edit.insert_before(node, quantizer.unfused[id(node)], barrier)


def keep_behind(quantizer: QuantizedGraph) -> None:
    """Put such a node behind int8 pairs that would be moved past float operators, in place."""
    if quantizer.opset_version < _TYPED_PAIRS or quantizer.qdq_op_domain:
        return
    for node in quantizer.uses.nodes():
        if node.op_type not in _MOVES or node.domain or quantizer.is_excluded(node):
            continue
        found = quantizer.scales.find(node.input[0])
        if found is None or quantizer.scales.find(node.output[0]) is not None:
            continue
        if found.get_for_consumer(node.name).zero_point.data_type == TensorProto.INT8:
            name = quantizer.free_name(f"{node.output[0]}_unmoved_input")
            barrier = helper.make_node("Sum", [""], [name], f"{node.name}_unmoved_input")
            quantizer.edit.insert_before(node, 0, barrier)
