"""What operators that move values make of the numbers of channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import Constants, integers
from qwrap.graph.index import ValueType
from qwrap.graph.kernel import integer
from qwrap.graph.slots import Numbers

Shape = Sequence[int | str | None] | None
Axes = list[int | str | None]
LARGEST = 1 << 22  # numbers that a Reshape may spread channels over


class Unclear(Exception):  # noqa: N818  # not an error: it says which way is not taken
    """Says why the channels cannot be followed."""


def moved(
    constants: Constants, node: ir.Node, place: Numbers, known: ValueType, made: Sequence[ValueType]
) -> list[Numbers]:
    """Return the numbers of each output of a node that only moves values of its first input.

    Args:
        constants: of the model.
        node: its operator is one of ``MOVES``.
        place: number of the channel of each entry of the input; axes along which it does not
            change have size 1.
        known: type of the input.
        made: types of the outputs.

    Raises:
        Unclear: that depends on what is not known.
    """
    return MOVES[node.op_type](constants, node, place, known, made)


def _reshape(
    constants: Constants, node: ir.Node, place: Numbers, known: ValueType, made: Sequence[ValueType]
) -> list[Numbers]:
    del constants, node
    return [reshaped(place, known.shape, made[0].shape)]


def reshaped(place: Numbers, before: Shape, after: Shape) -> Numbers:
    """Return the numbers of a tensor of shape ``before`` with the new shape ``after``."""
    if before is None or after is None:
        raise Unclear("goes through a Reshape of unknown shape")
    # The size of an axis is known where its entries have numbers of their own.
    old = [n if own == 1 else own for n, own in zip(before, place.shape, strict=True)]
    new = _with_sizes(old, list(after), place.shape)
    sizes: list[int] = []  # what entries along an axis are taken as: all of them, or one
    made: list[int] = []
    while any(n > 1 for n in place.shape[: len(old)]):
        group, target = _matching(old, new)
        is_uniform = all(n == 1 for n in place.shape[len(old) : len(old) + len(group)])
        sizes[:0] = [1] * len(group) if is_uniform else _whole(group)
        made[:0] = [1] * len(target) if is_uniform else _whole(target)
    sizes, made = [1] * len(old) + sizes, [1] * len(new) + made
    if prod(sizes) > LARGEST:
        raise Unclear("is spread too far by a Reshape")
    return squeezed_uniform(np.broadcast_to(place, sizes).reshape(made))


def _with_sizes(old: Axes, new: Axes, numbers: Sequence[int]) -> Axes:
    """Return ``new`` with the one size that follows from the others."""
    first = 0
    for a, b, own in zip(old, new, numbers, strict=False):
        if own > 1 or a != b or a is None:
            break
        first += 1
    total, known = _whole(old[first:], strict=False), _whole(new[first:], strict=False)
    is_one = len(total) == len(old) - first and len(known) == len(new) - first - 1
    size, rest = divmod(prod(total), prod(known) or 1)
    if is_one and not rest:
        return [*new[:first], *(n if isinstance(n, int) else size for n in new[first:])]
    return new


def _matching(old: Axes, new: Axes) -> tuple[Axes, Axes]:
    """Take the last axes off both shapes, in place, as few as hold the same entries."""
    group, target = [old.pop()], [new.pop() if new else 1]
    while group != target:
        total, made = prod(_whole(group)), prod(_whole(target))
        if total == made:
            break
        longer = old if total < made else new
        if not longer:
            raise Unclear("is mixed with other axes by a Reshape")
        (group if total < made else target).insert(0, longer.pop())
    return group, target


def _whole(axes: Axes, *, strict: bool = True) -> list[int]:
    whole = [n for n in axes if isinstance(n, int)]
    if strict and len(whole) < len(axes):
        raise Unclear("goes through a Reshape of unknown shape")
    return whole


def squeezed_uniform(place: Numbers) -> Numbers:
    """Return the same with size 1 along each axis along which nothing changes."""
    for axis in range(place.ndim):
        first = place.take([0], axis) if place.shape[axis] else place
        if place.shape[axis] > 1 and (place == first).all():
            place = first
    return place


def _transpose(
    constants: Constants, node: ir.Node, place: Numbers, known: ValueType, made: Sequence[ValueType]
) -> list[Numbers]:
    del constants, known, made
    perm = node.attributes.get("perm")
    return [place.transpose(None if perm is None else list(perm.as_ints()))]


def _squeeze(
    constants: Constants, node: ir.Node, place: Numbers, known: ValueType, made: Sequence[ValueType]
) -> list[Numbers]:
    del known
    axes, rank = integers(constants, node, "axes", 1), made[0].rank
    if axes is None and rank is not None and (place.shape.count(1) == place.ndim - rank):
        axes = [i for i, n in enumerate(place.shape) if n == 1]
    if axes is None:
        raise Unclear("goes through a Squeeze of unknown axes")
    return [place.squeeze(tuple(axes))]


def _unsqueeze(
    constants: Constants, node: ir.Node, place: Numbers, known: ValueType, made: Sequence[ValueType]
) -> list[Numbers]:
    del known, made
    axes = integers(constants, node, "axes", 1)
    if axes is None:
        raise Unclear("goes through an Unsqueeze of unknown axes")
    return [np.expand_dims(place, tuple(axes))]


def _expand(
    constants: Constants, node: ir.Node, place: Numbers, known: ValueType, made: Sequence[ValueType]
) -> list[Numbers]:
    del constants, node, known
    if made[0].rank is None:
        raise Unclear("goes through an Expand of unknown shape")
    return [place.reshape([1] * (made[0].rank - place.ndim) + list(place.shape))]


def _slice(
    constants: Constants, node: ir.Node, place: Numbers, known: ValueType, made: Sequence[ValueType]
) -> list[Numbers]:
    del made
    ends = [_slice_ends(constants, node, name, i) for i, name in enumerate(("starts", "ends"), 1)]
    axes = integers(constants, node, "axes", 3)
    steps = constants.array(node.inputs[4]) if len(node.inputs) > 4 else None
    for i in range(place.ndim):
        if place.shape[i] == 1:
            continue
        if axes is None and len(node.inputs) > 3 and node.inputs[3] is not None:
            raise Unclear("goes through a Slice of unknown axes")
        along = list(range(len(ends[0] or ()))) if axes is None else [a % place.ndim for a in axes]
        if (ends[0] is None and i in along) or (axes is None and ends[0] is None):
            raise Unclear("goes through a Slice of channels with unknown ends")
        if i not in along:
            continue
        at = along.index(i)
        computed_steps = len(node.inputs) > 4 and node.inputs[4] is not None and steps is None
        if ends[1] is None or computed_steps or known.rank is None:
            raise Unclear("goes through a Slice of channels with unknown ends")
        assert ends[0] is not None
        step = 1 if steps is None else int(steps.reshape(-1)[at])
        place = _cut(place, i, ends[0][at], ends[1][at], step)
    return [place]


def _slice_ends(constants: Constants, node: ir.Node, name: str, index: int) -> list[int] | None:
    return integers(constants, node, name, index)


def _cut(place: Numbers, axis: int, start: int, end: int, step: int) -> Numbers:
    size = place.shape[axis]
    bounds = slice(start, None if step < 0 and end < -size else end, step)
    return place.take(np.arange(size)[bounds], axis)


def _split(
    constants: Constants, node: ir.Node, place: Numbers, known: ValueType, made: Sequence[ValueType]
) -> list[Numbers]:
    del known
    axis = integer(node, "axis", 0) % place.ndim
    if place.shape[axis] == 1:
        return [place] * len(made)
    sizes = [None if kind.shape is None else kind.shape[axis] for kind in made]
    whole = [n for n in integers(constants, node, "split", 1) or sizes if isinstance(n, int)]
    if len(whole) != len(made) or sum(whole) != place.shape[axis]:
        raise Unclear("goes through a Split of unknown sizes")
    return np.split(place, np.cumsum(whole)[:-1], axis)


def _gather(
    constants: Constants, node: ir.Node, place: Numbers, known: ValueType, made: Sequence[ValueType]
) -> list[Numbers]:
    del known
    axis, rank = integer(node, "axis", 0) % place.ndim, made[0].rank
    if place.shape[axis] == 1 and rank is not None:
        inner = rank - place.ndim + 1
        return [place.reshape(*place.shape[:axis], *[1] * inner, *place.shape[axis + 1 :])]
    indices = constants.array(node.inputs[1])
    if indices is None:
        raise Unclear("goes through a Gather of computed channels")
    return [place.take(indices, axis)]


Move = Callable[[Constants, ir.Node, Numbers, ValueType, Sequence[ValueType]], list[Numbers]]
MOVES: dict[str, Move] = {
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
