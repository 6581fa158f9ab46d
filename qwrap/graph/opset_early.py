"""How a node is brought to opset 7, from before ONNX settled on numpy's broadcasting."""

from __future__ import annotations

import onnx_ir as ir

from qwrap.graph.opset_edit import (
    Adapter,
    Editor,
    attribute,
    drop,
    each,
    has,
    refuse,
    set_default,
    take,
    to_input,
)


def _broadcast(edit: Editor, node: ir.Node) -> bool:
    """``axis`` said where in the first input the dimensions of the second begin."""
    given = "broadcast" in node.attributes or "axis" in node.attributes
    enabled, axis = take(node, "broadcast", 0), take(node, "axis")
    if not enabled or axis is None:  # equal shapes, or aligned to the right as numpy does
        return given
    left, right = (edit.type_of(v).rank for v in node.inputs)
    if left is None or right is None:
        raise refuse(node, "broadcasts along an axis of tensors of unknown rank")
    if trailing := left - (axis + left if axis < 0 else axis) - right:
        edit.reshape_input(node, 1, [0] * right + [1] * trailing)
    return True


def _prelu_7(edit: Editor, node: ir.Node) -> bool:
    """One slope a channel was [C]; since then it broadcasts."""
    slope = edit.type_of(node.inputs[1]).shape
    if slope is not None and (len(slope) != 1 or slope[0] == 1):
        return False
    rank = edit.type_of(node.inputs[0]).rank
    if slope is None or rank is None:
        raise refuse(node, "the rank of its input or slope is unknown")
    if rank > 2:
        edit.reshape_input(node, 1, [-1] + [1] * (rank - 2))
    return rank > 2


def _cast_6(edit: Editor, node: ir.Node) -> bool:
    del edit
    node.attributes.add(ir.AttrInt64("to", ir.DataType[take(node, "to").upper()]))
    return True


def _p_to_int(edit: Editor, node: ir.Node) -> bool:
    del edit
    p = take(node, "p")
    if p is not None and p != int(p):
        raise refuse(node, f"p={p} is not an integer")
    if p is not None:
        node.attributes.add(ir.AttrInt64("p", int(p)))
    if node.op_type == "LpPool" and "kernel_shape" not in node.attributes:
        raise refuse(node, "has no kernel_shape")
    return p is not None


def _pad_2(edit: Editor, node: ir.Node) -> bool:
    del edit
    node.attributes.add(ir.AttrInt64s("pads", take(node, "paddings")))
    return True


def _reshape_5(edit: Editor, node: ir.Node) -> bool:
    take(node, "consumed_inputs")
    return to_input("shape", 1, keep_empty=True)(edit, node)


def _split_2(edit: Editor, node: ir.Node) -> bool:
    if not has(node, 1):
        return False
    sizes = edit.constants.array(node.inputs[1])
    if sizes is None:
        raise refuse(node, "the sizes of its parts are computed")
    old = node.inputs[1]
    node.resize_inputs(1)
    edit.constants.drop_unused([old])
    node.attributes.add(ir.AttrInt64s("split", [int(n) for n in sizes]))
    return True


def _upsample_7(edit: Editor, node: ir.Node) -> bool:
    del edit
    scales = [1.0, 1.0, take(node, "height_scale"), take(node, "width_scale")]
    node.attributes.add(ir.AttrFloat32s("scales", scales))
    if attribute(node, "mode") == "bilinear":
        node.attributes.add(ir.AttrString("mode", "linear"))
    return True


BEFORE_8: dict[tuple[str, int], Adapter] = {
    **each(
        "Abs Add BatchNormalization Ceil Clip Div Dropout Elu Exp Floor HardSigmoid "
        "InstanceNormalization LeakyRelu Log Max Mean Min Mul Neg PRelu Reciprocal Relu Sigmoid "
        "Sqrt Sub Sum Tanh",
        6,
        drop("consumed_inputs"),
    ),
    **each("Add And Div Equal Greater Less Mul Or Pow Sub Xor", 7, _broadcast),
    **each("GRU LSTM RNN", 7, drop("output_sequence")),
    **each("GlobalLpPool LpPool", 2, _p_to_int),
    ("BatchNormalization", 7): drop("is_test"),
    ("Cast", 6): _cast_6,
    ("Concat", 4): set_default(axis=1),
    ("Dropout", 7): drop("is_test"),
    ("Gemm", 7): drop("broadcast"),
    ("PRelu", 7): _prelu_7,
    ("Pad", 2): _pad_2,
    ("Reshape", 5): _reshape_5,
    ("Selu", 6): set_default(alpha=1.6732, gamma=1.0507),
    ("Split", 2): _split_2,
    ("Upsample", 7): _upsample_7,
}
