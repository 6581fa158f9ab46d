"""How a node of one operator revision is written in the next, so that it computes the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwrap.graph.opset_early import BEFORE_8
from qwrap.graph.opset_edit import (
    Adapter,
    Editor,
    attribute,
    drop,
    each,
    graph_of,
    has,
    is_used,
    refuse,
    set_default,
    take,
    to_input,
)

FLOAT_LIMIT = float(np.finfo(np.float32).max)  # the default bounds of Clip-6, whatever the type


def _rename_mode(**modes: str) -> Adapter:
    def adapt(edit: Editor, node: ir.Node) -> bool:
        del edit
        mode = attribute(node, "mode")
        if mode not in modes:
            return False
        node.attributes.add(ir.AttrString("mode", modes[mode]))
        return True

    return adapt


def _only_floats(edit: Editor, node: ir.Node) -> bool:
    if edit.dtype_for(node).kind in "iu":
        raise refuse(node, "the next revision takes no integers")
    return False


# --- normalisation and dropout -------------------------------------------------------------


def _batch_norm_9(edit: Editor, node: ir.Node) -> bool:
    if attribute(node, "spatial", 1) != 1:
        raise refuse(node, "has statistics for each position (spatial=0)")
    return drop("spatial")(edit, node)


def _batch_norm_14(edit: Editor, node: ir.Node) -> bool:
    """More outputs than one meant training, with the statistics of the batch; now a flag does."""
    del edit
    count = len(node.outputs)
    if count == 1:
        return False
    if any(is_used(v) for v in node.outputs[3:]):
        raise refuse(node, "its saved statistics are used")
    training = any(v.name for v in node.outputs[1:])
    if training:
        node.attributes.add(ir.AttrInt64("training_mode", 1))
    node.resize_outputs(3 if training else 1)
    return True


def _no_mask(edit: Editor, node: ir.Node) -> bool:
    # Its type changed at 10; what it holds at inference was never said before 12.
    del edit
    if len(node.outputs) > 1 and is_used(node.outputs[1]):
        raise refuse(node, "its mask is used")
    return False


def _dropout_12(edit: Editor, node: ir.Node) -> bool:
    _no_mask(edit, node)
    if "ratio" not in node.attributes:
        return False
    edit.give(node, 1, "ratio", np.array(take(node, "ratio"), np.float32))
    return True


def _group_norm_21(edit: Editor, node: ir.Node) -> bool:
    """Scale and bias were one a group and are one a channel."""
    shape, groups = edit.type_of(node.inputs[0]).shape, attribute(node, "num_groups")
    channels = shape[1] if shape is not None and len(shape) > 1 else None
    if not isinstance(channels, int):
        raise refuse(node, "the number of channels of its input is unknown")
    if edit.dtype_for(node) != np.float32:
        raise refuse(node, "normalised in its own type, which only float32 still does")
    if channels == groups:
        return False
    for index, name in ((1, "scale"), (2, "bias")):
        _repeat_each(edit, node, index, name, channels // groups)
    return True


def _repeat_each(edit: Editor, node: ir.Node, index: int, name: str, times: int) -> None:
    old = node.inputs[index]
    array = edit.constants.array(old)
    if array is not None:
        edit.give(node, index, name, np.repeat(array, times))
        edit.constants.drop_unused([old])
        return
    edit.reshape_input(node, index, [-1, 1])
    shape = edit.constant(node, "shape", np.array([1, times], np.int64))
    repeated = edit.insert(node, "Expand", [node.inputs[index], shape], f"{name}_repeated")
    node.replace_input_with(index, repeated)
    edit.reshape_input(node, index, [-1])


# --- softmax -------------------------------------------------------------------------------


def _softmax_13(edit: Editor, node: ir.Node) -> bool:
    """Everything from ``axis`` on was one dimension; since then only ``axis`` is."""
    axis, shape = attribute(node, "axis", 1), edit.type_of(node.inputs[0]).shape
    if axis == -1:
        return False
    if shape is not None and all(n == 1 for n in shape[axis % len(shape) + 1 :]):
        if "axis" in node.attributes or axis == len(shape) - 1:  # the last is the default now
            return False
        node.attributes.add(ir.AttrInt64("axis", axis))
        return True
    _flatten_around(edit, node, axis)
    return True


def _flatten_around(edit: Editor, node: ir.Node, axis: int) -> None:
    # The node at hand becomes the Reshape, so that its output stays what it was to its readers.
    x, output = node.inputs[0], node.outputs[0]
    flat = edit.insert(node, "Flatten", [x], "flat", {"axis": axis})
    shape = edit.insert(node, "Shape", [x], "shape")
    inner = ir.node(
        node.op_type,
        [flat],
        {"axis": -1},
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    inner.outputs[0].name = edit.unique_name(node, "flat_output")
    inner.outputs[0].type = output.type
    graph_of(node).insert_before(node, inner)
    node.name = edit.unique_name(node, "unflat")
    node.op_type = "Reshape"
    node.attributes.clear()
    node.resize_inputs(2)
    node.replace_input_with(0, inner.outputs[0])
    node.replace_input_with(1, shape)


# --- attributes that became inputs ---------------------------------------------------------


def _clip_11(edit: Editor, node: ir.Node) -> bool:
    wide = edit.type_of(node.inputs[0]).dtype == ir.DataType.DOUBLE
    if not node.attributes and not wide:  # without bounds the type's own hold, as before
        return False
    dtype = edit.dtype_for(node)
    for index, name, default in ((1, "min", -FLOAT_LIMIT), (2, "max", FLOAT_LIMIT)):
        bound = take(node, name, default if wide else None)
        if bound is not None:
            with np.errstate(over="ignore"):
                edit.give(node, index, name, np.array(bound, np.float32).astype(dtype))
    return True


def _pad_11(edit: Editor, node: ir.Node) -> bool:
    edit.give(node, 1, "pads", np.array(take(node, "pads"), np.int64))
    fill = take(node, "value", 0.0)
    if fill != 0.0:
        edit.give(node, 2, "value", np.array(fill, edit.dtype_for(node)))
    return True


def _slice_10(edit: Editor, node: ir.Node) -> bool:
    for index, name in ((1, "starts"), (2, "ends"), (3, "axes")):
        to_input(name, index, keep_empty=True)(edit, node)
    return True


def _top_k_10(edit: Editor, node: ir.Node) -> bool:
    edit.give(node, 1, "k", np.array([take(node, "k")], np.int64))
    return True


def _split_18(edit: Editor, node: ir.Node) -> bool:
    del edit
    if has(node, 1):
        return False
    node.attributes.add(ir.AttrInt64("num_outputs", len(node.outputs)))
    return True


def _dft_20(edit: Editor, node: ir.Node) -> bool:
    edit.give(node, 2, "axis", np.array(take(node, "axis", 1), np.int64))
    return True


# --- resizing and regions ------------------------------------------------------------------


def _upsample_10(edit: Editor, node: ir.Node) -> bool:
    del edit
    node.op_type = "Resize"
    _align_first(node, "floor")  # an Upsample only ever enlarges
    return True


def _resize_11(edit: Editor, node: ir.Node) -> bool:
    """Before, the first elements were aligned, and nearest rounded up where it made smaller."""
    if "coordinate_transformation_mode" in node.attributes:  # an Upsample
        return False
    if attribute(node, "mode", "nearest") != "nearest":
        _align_first(node, "floor")
        return True
    scales = edit.constants.array(node.inputs[1])
    if scales is None:
        raise refuse(node, "whether it enlarges is unknown, as its scales are computed")
    # A position is whole where 1 / scale is, and then it does not matter which way it rounds.
    up, down = (scales > 1).any(), ((scales < 1) & (1 / scales % 1 != 0)).any()
    if up and down:
        raise refuse(node, "enlarges one axis and makes another smaller")
    _align_first(node, "ceil" if down else "floor")
    return True


def _align_first(node: ir.Node, nearest_mode: str) -> None:
    node.attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
    if attribute(node, "mode", "nearest") == "nearest":
        node.attributes.add(ir.AttrString("nearest_mode", nearest_mode))
    scales = node.inputs[1]
    node.resize_inputs(3)
    node.replace_input_with(1, None)  # roi, which only tf_crop_and_resize reads
    node.replace_input_with(2, scales)


def _resize_13(edit: Editor, node: ir.Node) -> bool:
    changed = False
    if attribute(node, "coordinate_transformation_mode") == "tf_half_pixel_for_nn":
        if attribute(node, "mode", "nearest") != "nearest" or attribute(node, "nearest_mode") != (
            "floor"
        ):
            raise refuse(node, "tf_half_pixel_for_nn remains only for nearest with floor")
        # floor(t) is t - 1/2 rounded with halves up
        node.attributes.add(ir.AttrString("coordinate_transformation_mode", "half_pixel"))
        node.attributes.add(ir.AttrString("nearest_mode", "round_prefer_ceil"))
        changed = True
    if has(node, 3) and has(node, 2):  # with sizes, scales had to be there and empty
        empty = node.inputs[2]
        node.replace_input_with(2, None)
        edit.constants.drop_unused([empty])
        changed = True
    return changed


def _scatter_11(edit: Editor, node: ir.Node) -> bool:
    del edit
    node.op_type = "ScatterElements"
    return True


ADAPTERS: dict[tuple[str, int], Adapter] = {
    **BEFORE_8,
    **each("Hardmax LogSoftmax Softmax", 13, _softmax_13),
    **each(
        "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
        "ReduceProd ReduceSumSquare",
        18,
        to_input("axes", 1),
    ),
    **each("ReduceLogSum ReduceLogSumExp", 28, _only_floats),
    ("BatchNormalization", 9): _batch_norm_9,
    ("BatchNormalization", 14): _batch_norm_14,
    ("Clip", 11): _clip_11,
    ("DFT", 20): _dft_20,
    ("Dropout", 10): _no_mask,
    ("Dropout", 12): _dropout_12,
    ("Erf", 13): _only_floats,
    ("GridSample", 20): _rename_mode(bilinear="linear", bicubic="cubic"),
    ("GroupNormalization", 21): _group_norm_21,
    ("Pad", 11): _pad_11,
    ("ReduceSum", 13): to_input("axes", 1),
    ("Resize", 11): _resize_11,
    ("Resize", 13): _resize_13,
    ("RoiAlign", 16): set_default(coordinate_transformation_mode="output_half_pixel"),
    ("Scatter", 11): _scatter_11,
    ("Slice", 10): _slice_10,
    ("Split", 13): to_input("split", 1),
    ("Split", 18): _split_18,
    ("Squeeze", 13): to_input("axes", 1),
    ("TopK", 10): _top_k_10,
    ("Unsqueeze", 13): to_input("axes", 1, keep_empty=True),
    ("Upsample", 9): to_input("scales", 1, np.float32),
    ("Upsample", 10): _upsample_10,
}
