"""Nodes that measure the range of a tensor at run time, where DynamicQuantizeLinear cannot.

That operator makes uint8 codes, and came with opset 11.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qwrap.ort.errors import QuantizationError
from qwrap.ort.quant_utils import get_qrange_for_qType

if TYPE_CHECKING:
    from qwrap.ort.qoperator.code_values import CodeValues

Measured = tuple[str, str, list[int], list[int]]


def measure(
    quantizer: CodeValues, name: str, nodes: list[NodeProto], kind: int, initial_type: int
) -> Measured:
    """Append nodes that compute scale and zero point of a tensor, in place.

    Args:
        quantizer: takes the constants.
        name: of a float tensor.
        nodes: get the new ones.
        kind: INT8 for a symmetric range, UINT8 for one with zero point.
        initial_type: type of the tensor, which the scale will have.

    Returns:
        Names of the scale and of the zero point, and their shapes.

    Raises:
        QuantizationError: another type (a ``ValueError``).
    """
    if kind == TensorProto.INT8:
        return _symmetric(quantizer, name, nodes, initial_type)
    if kind == TensorProto.UINT8:
        return _asymmetric(quantizer, name, nodes, initial_type)
    raise QuantizationError(f"Unexpected value for qType={kind}: INT8 or UINT8 can be measured")


def _symmetric(
    quantizer: CodeValues, name: str, nodes: list[NodeProto], initial_type: int
) -> Measured:
    low, high = f"{name}_ReduceMin", f"{name}_ReduceMax"
    divisor = float(get_qrange_for_qType(TensorProto.INT8)) / 2.0
    _constant(quantizer, quantizer.fixed_qrange_int8_name, initial_type, divisor)
    _constant(quantizer, quantizer.fixed_zero_zp_name, TensorProto.INT8, 0)
    nodes += [
        helper.make_node("ReduceMin", [name], [f"{low}:0"], low, keepdims=0),
        helper.make_node("ReduceMax", [name], [f"{high}:0"], high, keepdims=0),
        _node("Abs", [f"{low}:0"], f"{low}_Abs"),
        _node("Abs", [f"{high}:0"], f"{high}_Abs"),
        _node("Max", [f"{low}_Abs:0", f"{high}_Abs:0"], f"{name}_Abs_Max"),
        _node(
            "Div",
            [f"{name}_Abs_Max:0", quantizer.fixed_qrange_int8_name],
            f"{name}scale_Div",
            f"{name}_scale",
        ),
    ]
    return f"{name}_scale", quantizer.fixed_zero_zp_name, [], []


def _asymmetric(
    quantizer: CodeValues, name: str, nodes: list[NodeProto], initial_type: int
) -> Measured:
    """Measure a range that is widened to hold 0, without which the zero point would not fit."""
    low, high, zero = f"{name}_ReduceMin", f"{name}_ReduceMax", quantizer.fixed_zero_name
    steps = float(get_qrange_for_qType(TensorProto.UINT8))
    _constant(quantizer, quantizer.fixed_qrange_uint8_name, initial_type, steps)
    _constant(quantizer, zero, initial_type, 0.0)
    scale, zero_point = f"{name}_scale", f"{name}_zero_point"
    nodes += [
        helper.make_node("ReduceMin", [name], [f"{low}:0"], low, keepdims=0),
        helper.make_node("ReduceMax", [name], [f"{high}:0"], high, keepdims=0),
        _node("Min", [f"{low}:0", zero], f"{low}_Zero"),
        _node("Max", [f"{high}:0", zero], f"{high}_Zero"),
        _node("Sub", [f"{high}_Zero:0", f"{low}_Zero:0"], f"{scale}_Sub"),
        _node("Div", [f"{scale}_Sub:0", quantizer.fixed_qrange_uint8_name], f"{scale}_Div", scale),
        _node("Sub", [zero, f"{low}_Zero:0"], f"{zero_point}_Sub"),
        _node("Div", [f"{zero_point}_Sub:0", scale], f"{zero_point}_Div"),
        _node("Floor", [f"{zero_point}_Div:0"], f"{zero_point}_Floor"),
        helper.make_node(
            "Cast",
            [f"{zero_point}_Floor:0"],
            [zero_point],
            f"{zero_point}_Cast",
            to=TensorProto.UINT8,
        ),
    ]
    return scale, zero_point, [], []


def _node(op_type: str, inputs: list[str], name: str, output: str = "") -> NodeProto:
    return helper.make_node(op_type, inputs, [output or f"{name}:0"], name)


def _constant(quantizer: CodeValues, name: str, data_type: int, value: float) -> None:
    """Add a scalar to the main graph, once for all that read it."""
    while quantizer.parent is not None:
        quantizer = quantizer.parent
    array = np.array(value, helper.tensor_dtype_to_np_dtype(data_type))
    quantizer.model.add_initializer(numpy_helper.from_array(array, name))
