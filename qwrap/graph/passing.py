"""What operators make of tensors with divided channels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import Constants, integers, label
from qwrap.graph.divisible import Divisible
from qwrap.graph.index import ValueType
from qwrap.graph.kernel import integer
from qwrap.graph.makers import MAKERS
from qwrap.graph.moves import MOVES, Unclear, moved, squeezed_uniform
from qwrap.graph.slots import Numbers
from qwrap.graph.trace import Rule, Trace

PLAIN = frozenset({
    *("Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", "Abs", "Neg"),
    *("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "LpPool", "GlobalLpPool"),
})  # fmt: skip
"""What makes of a tensor with a channel divided its result with that channel divided."""
REDUCTIONS = frozenset({
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2"),
})  # fmt: skip
BOUND = "cut off at its upper bound by "


def _plain(trace: Trace, node: ir.Node) -> None:
    place = trace.place(node, 0)
    if place is None:
        return
    if len(node.inputs) > 1 and node.op_type == "PRelu":
        trace.pin(node.inputs[1], f"is the slope of {label(node)}")
    elif node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        mode = trace.constants.array(node.inputs[2])
        if mode is None or mode.any():
            raise Unclear("goes through a Dropout that may be training")
    elif node.op_type.endswith("Pool") and place.size != place.shape[:2][-1]:
        raise Unclear("has channels along the axes of a pool")
    trace.passed(node, place)


def _clip(trace: Trace, node: ir.Node) -> None:
    ends = clip_ends(trace.constants, node)
    if ends is None or ends[0] not in (0.0, -np.inf) or ends[1] != np.inf:
        raise Unclear(f"{BOUND}a Clip")
    _plain(trace, node)


def clip_ends(constants: Constants, node: ir.Node) -> tuple[float, float] | None:
    """Return lower and upper bound of a Clip, None if they are computed."""
    ends = [-np.inf, np.inf]
    for i, name in enumerate(("min", "max")):  # attributes up to opset 10, inputs since
        if name in node.attributes:
            value = node.attributes[name].as_float()
            ends[i] = ends[i] if abs(value) >= np.finfo(np.float32).max else value
        if len(node.inputs) > i + 1 and node.inputs[i + 1] is not None:
            array = constants.floats(node.inputs[i + 1])
            if array is None or array.size != 1:
                return None
            ends[i] = float(array.item())
    return ends[0], ends[1]


def _joined(trace: Trace, node: ir.Node) -> None:
    """All operands of an Add, Sub, Max or Min have to be divided alike."""
    places = [trace.place(node, i) for i in range(len(node.inputs))]
    if all(place is None for place in places):
        return
    if "broadcast" in node.attributes:  # until opset 6: aligned in another way
        raise Unclear("is broadcast as in early opsets")
    rank, kept = trace.rank(node), None
    for value, place in zip(node.inputs, places, strict=True):
        if place is None and trace.constants.tensor(value) is None:
            raise Unclear(f"is joined with {'' if value is None else value.name!r}, which stays")
        if place is not None:
            aligned = place.reshape([1] * (rank - place.ndim) + [*place.shape])
            if kept is not None:
                trace.slots.unite(kept, aligned)
            kept = aligned if kept is None else np.broadcast_arrays(kept, aligned)[0]
    assert kept is not None
    kept = squeezed_uniform(kept)
    trace.places[node.outputs[0]] = kept
    for index, place in enumerate(places):
        if place is None:
            _operand(trace, node, index, kept)


def _operand(trace: Trace, node: ir.Node, index: int, place: Numbers) -> None:
    array = trace.constants.array(node.inputs[index])
    assert array is not None
    if node.op_type in ("Max", "Min") and array.size == 1:
        if array.any():
            raise Unclear(f"{BOUND}a {node.op_type}")
        return
    leading = max(place.ndim - max(array.ndim, 1), 0)
    if all(n == 1 for n in place.shape[:leading]):
        place = place.reshape(place.shape[leading:])
    trace.share(node, index, place)


def _times(trace: Trace, node: ir.Node) -> None:
    """A Mul or Div passes the channels of one operand on, or makes some with a constant."""
    places = [trace.place(node, i) for i in range(2)]
    if "broadcast" in node.attributes:
        raise Unclear("is broadcast as in early opsets")
    if node.inputs[0] is node.inputs[1] or (node.op_type == "Div" and places[1] is not None):
        raise Unclear("is not linear in it:")
    first = 0 if places[0] is not None else 1
    place = places[first]
    if place is not None:
        if first == 0:
            trace.pin(node.inputs[1], f"is multiplied with another by {label(node)}")
        trace.passed(node, place, trace.rank(node))
        return
    for index in (1, 0) if node.op_type == "Mul" else (1,):
        array = trace.constants.array(node.inputs[index])
        if (
            array is None
            or trace.obstacle(node, index)
            or array.size != max(array.shape, default=0)
        ):
            continue
        if array.size > 1:
            slots = trace.fresh(node, array.size).reshape(array.shape)
            trace.passed(node, slots, trace.rank(node))
            trace.share(node, index, slots, multiplied=node.op_type == "Div")
            return


def _is_vector(shape: tuple[int, ...]) -> bool:
    return sum(n > 1 for n in shape) == 1 and 0 not in shape


def _moves(trace: Trace, node: ir.Node) -> None:
    place = trace.place(node, 0)
    if place is None:
        trace.pin_inputs(node, f"is read by {label(node)}")
        return
    value = node.inputs[0]
    assert value is not None
    known = trace.types.get(value, ValueType())
    made = [trace.types.get(output, ValueType()) for output in node.outputs]
    found = moved(trace.constants, node, place, known, made)
    for output, slots in zip(node.outputs, found, strict=True):
        trace.places[output] = slots


def _concat(trace: Trace, node: ir.Node) -> None:
    places = [trace.place(node, i) for i in range(len(node.inputs))]
    if all(place is None for place in places):
        return
    rank = trace.rank(node)
    axis = integer(node, "axis", 1) % rank
    parts: list[Numbers] = []
    for value, place in zip(node.inputs, places, strict=True):
        assert value is not None
        shape = trace.types.get(value, ValueType()).shape
        size = None if shape is None else shape[axis]
        if not isinstance(size, int):
            raise Unclear("is joined with a tensor of unknown size")
        if place is None:
            place = trace.fresh(node, 1).reshape([1] * rank)
            trace.slots.pin(place, f"{value.name!r} stays")
        parts.append(np.repeat(place, size, axis) if place.shape[axis] == 1 else place)
    shape_of_others = np.broadcast_shapes(*[
        (*p.shape[:axis], 1, *p.shape[axis + 1 :]) for p in parts
    ])
    wide = [
        np.broadcast_to(p, (*shape_of_others[:axis], p.shape[axis], *shape_of_others[axis + 1 :]))
        for p in parts
    ]
    trace.places[node.outputs[0]] = np.concatenate(wide, axis)


def _pad(trace: Trace, node: ir.Node) -> None:
    place = trace.place(node, 0)
    pads = integers(trace.constants, node, "pads", 1)
    if place is None:
        return
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    value = node.attributes["value"].as_float() if "value" in node.attributes else 0.0
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        fill = trace.constants.array(node.inputs[2])
        value = 1.0 if fill is None else float(fill.any())
    if mode == "constant" and value:
        raise Unclear("is padded with other numbers than 0")
    axes = trace.constants.array(node.inputs[3]) if len(node.inputs) > 3 else None
    along = list(range(place.ndim)) if axes is None else [int(a) % place.ndim for a in axes]
    if pads is None or (axes is None and len(node.inputs) > 3 and node.inputs[3] is not None):
        raise Unclear("is padded by unknown amounts")
    half = len(along)
    for axis, before, after in zip(along, pads[:half], pads[half:], strict=True):
        if place.shape[axis] == 1 or (before == 0 and after == 0):
            continue
        if mode != "constant" or min(before, after) < 0:
            raise Unclear("has its channels padded")
        # Channels that are 0 may be divided by whatever suits what they are joined with.
        zeros = trace.fresh(node, before + after)
        sides, shape = np.split(zeros, [before]), [1] * place.ndim
        shape[axis] = -1
        wide = [np.broadcast_to(z.reshape(shape), _but(place, axis, z.size)) for z in sides]
        place = np.concatenate([wide[0], place, wide[1]], axis)
    trace.passed(node, place)


def _but(place: Numbers, axis: int, size: int) -> tuple[int, ...]:
    return *place.shape[:axis], size, *place.shape[axis + 1 :]


def _reduce(trace: Trace, node: ir.Node) -> None:
    place, axes = trace.place(node, 0), integers(trace.constants, node, "axes", 1)
    if place is None:
        return
    if axes is None and (place.size > 1 or len(node.inputs) > 1):
        raise Unclear("is reduced over unknown axes")
    along = [a % place.ndim for a in axes] if axes is not None else list(range(place.ndim))
    if any(place.shape[a] > 1 for a in along):
        raise Unclear("has its channels reduced")
    keep = integer(node, "keepdims", 1)
    trace.places[node.outputs[0]] = place if keep else place.squeeze(tuple(along))


def _resize(trace: Trace, node: ir.Node) -> None:
    place, value = trace.place(node, 0), node.inputs[0]
    if place is None or value is None:
        return
    mode = node.attributes.get("coordinate_transformation_mode")
    if mode is not None and mode.as_string() == "tf_crop_and_resize":
        raise Unclear("may be filled up by a Resize")
    before = trace.types.get(value, ValueType()).shape
    after = trace.types.get(node.outputs[0], ValueType()).shape
    scales = trace.constants.array(node.inputs[-1]) if node.inputs[-1] is not None else None
    for i, n in enumerate(place.shape):
        same = before is not None and after is not None and before[i] == after[i] is not None
        kept = scales is not None and scales.dtype.kind == "f" and scales[i : i + 1].tolist() == [1]
        if n > 1 and not (same or kept):
            raise Unclear("has its channels resized")
    trace.passed(node, place)


RULES: dict[str, Rule] = {
    **MAKERS,
    **dict.fromkeys(PLAIN, _plain),
    **dict.fromkeys(MOVES, _moves),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(("Add", "Sub", "Max", "Min", "Sum", "Mean"), _joined),
    **dict.fromkeys(("Mul", "Div"), _times),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "Clip": _clip,
    "Concat": _concat,
    "Pad": _pad,
}


def find_divisible(model: ir.Model, fixed: Mapping[ir.Value, str] | None = None) -> Divisible:
    """Return which channels can be divided without changing what a model computes.

    They are made by a layer with a constant weight, or by the gains of a normalisation, and go
    through operators that are positively homogeneous, move values or join tensors, into layers
    with constant weights alone. Graph outputs, and what anything else reads, stay.

    Args:
        model: its nodes in bodies of control flow count; those of its functions do not.
        fixed: tensors and constants that have to stay as they are, and why.
    """
    return Trace(model, fixed or {}, RULES).run()
