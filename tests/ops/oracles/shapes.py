"""Operators that move elements or make them from numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto

from oracles.variants import Make, Variant, draw, i64, scalar, types_of, variants

# Every type whose elements are moved in another way, not every type there is.
MOVED = (np.float32, np.float64, np.int64, np.int8, np.uint8, np.bool_, np.float16)


def moved(op_type: str, revision: int) -> list[type]:
    allowed = types_of(onnx.defs.get_schema(op_type, revision))
    return [t for t in MOVED if t in allowed]


def each_type(op_type: str, revision: int, shape: Make, **attributes: object) -> Iterator[Variant]:
    """A variant for every type; ``shape`` gives the shape and what follows the first input."""
    for t in moved(op_type, revision):
        yield Variant(
            lambda n, t=t: [draw.of(t, *shape(n)[0]), *shape(n)[1:]],  # type: ignore[misc]
            attributes,
        )


@variants("Concat")
def concat(revision: int) -> Iterator[Variant]:
    axis = [{}] if revision == 1 else []
    for attributes in (
        *axis,
        {"axis": 1},
        {"axis": 0},
        *([{"axis": -1}] if revision >= 11 else []),
    ):
        for t in moved("Concat", revision):
            yield Variant(lambda n, t=t: [draw.of(t, n, 4), draw.of(t, n, 4)], attributes)
    yield Variant(lambda n: [draw(n, 2), draw(n, 5), draw(n, 0)], {"axis": 1})


@variants("Flatten")
def flatten(revision: int) -> Iterator[Variant]:
    yield from each_type("Flatten", revision, lambda n: [(n, 2, 3)])
    for axis in (0, 2, 3, *((-1, -3) if revision >= 11 else ())):
        yield Variant(lambda n: [draw(n, 2, 3)], {"axis": axis})


@variants("Reshape")
def reshape(revision: int) -> Iterator[Variant]:
    if revision == 1:
        for shape in ([-1, 2], [0, 6], [0, -1, 1]):
            yield Variant(lambda n: [draw(n, 2, 3)], {"shape": shape})
        return
    yield from each_type("Reshape", revision, lambda n: [(n, 2, 3), i64(-1, 2)])
    for shape in ((0, 6), (0, -1, 1), (-1,), (3, 2, -1)):
        yield Variant(lambda n, s=shape: [draw(n, 2, 3), i64(*s)])
    yield Variant(lambda _: [draw(1, 1), np.zeros(0, np.int64)])
    if revision >= 14:
        yield Variant(lambda n: [draw(n, 0, 3), i64(3, 0, n)], {"allowzero": 1})


@variants("Transpose")
def transpose(revision: int) -> Iterator[Variant]:
    yield from each_type("Transpose", revision, lambda n: [(n, 2, 3)])
    yield Variant(lambda n: [draw(n, 2, 3)], {"perm": [1, 2, 0]})


@variants("Identity")
def identity(revision: int) -> Iterator[Variant]:
    yield from each_type("Identity", revision, lambda n: [(n, 2)])


@variants("Squeeze")
def squeeze(revision: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(1, n, 1)])
    if revision < 13:
        for axes in ([0], [0, 2], *([[-1]] if revision == 11 else [])):
            yield Variant(lambda n: [draw(1, n, 1)], {"axes": axes})
        return
    yield from each_type("Squeeze", revision, lambda n: [(1, n, 1), i64(0)])
    yield Variant(lambda n: [draw(1, n, 1), i64(0, -1)])


@variants("Unsqueeze")
def unsqueeze(revision: int) -> Iterator[Variant]:
    choices = ([0], [1, 3], [3, 0], *([[-1], [-2, 0]] if revision >= 11 else []))
    for axes in choices:
        if revision < 13:
            yield Variant(lambda n: [draw(n, 2)], {"axes": axes})
        else:
            yield Variant(lambda n, a=axes: [draw(n, 2), i64(*a)])


@variants("Expand")
def expand(_: int) -> Iterator[Variant]:
    for t in (np.float32, np.int64, np.bool_):
        for shape in ((2, 1, 6), (1, 6), (1,), ()):
            yield Variant(lambda n, t=t, s=shape: [draw.of(t, n, 1), i64(*s)])


@variants("Tile")
def tile(revision: int) -> Iterator[Variant]:
    if revision == 1:
        yield Variant(lambda n: [draw(n, 2), scalar(3), scalar(1)])
        return
    for t in (np.float32, np.int64, np.bool_):
        yield Variant(lambda n, t=t: [draw.of(t, n, 2), i64(2, 3)])
    yield Variant(lambda n: [draw(n, 2), i64(0, 1)])


@variants("Split")
def split(revision: int) -> Iterator[Variant]:
    if revision < 13:
        if revision == 1:
            yield Variant(lambda n: [draw(n, 4), np.array([1, 3], np.float32)], {"axis": 1}, 2)
        for attributes in ({"axis": 1}, {"axis": 1, "split": [1, 3]}):
            yield Variant(lambda n: [draw(n, 4)], attributes, 2)
        return
    uneven = {"num_outputs": 2} if revision >= 18 else {}
    for t in moved("Split", revision):
        yield Variant(lambda n, t=t: [draw.of(t, n, 4), i64(1, 3)], {"axis": 1}, 2)
    yield Variant(lambda n: [draw(n, 4)], {"axis": -1, **uneven}, 2)
    yield Variant(lambda n: [draw(4, n), i64(0, 3, 1)], {}, 3)
    if revision >= 18:
        yield Variant(lambda n: [draw(n, 5)], {"axis": 1, "num_outputs": 3}, 3)


@variants("Slice")
def slices(revision: int) -> Iterator[Variant]:
    if revision == 1:
        for attributes in (
            {"starts": [1, 0], "ends": [3, -1]},
            {"starts": [-2], "ends": [1000], "axes": [1]},
            {"starts": [0, 1], "ends": [2, 9], "axes": [2, 0]},
        ):
            yield Variant(lambda n: [draw(n, 4, 3)], attributes)
        return
    for t in moved("Slice", revision):
        yield Variant(lambda n, t=t: [draw.of(t, n, 4), i64(1), i64(-1)])
    for starts, ends, axes, steps in (
        ((1, 0), (3, -1), None, None),
        ((-2,), (1000,), (1,), (1,)),
        ((0, 1), (2, 9), (2, 0), (1, 2)),
        ((-1,), (-1000,), (1,), (-1,)),
        ((3,), (0,), (1,), (-2,)),
        ((2,), (2,), (-1,), None),
        ((2**40,), (-(2**62),), (0,), (-1,)),
    ):
        optional = [None if v is None else i64(*v) for v in (axes, steps)]
        while optional and optional[-1] is None:
            optional.pop()
        yield Variant(lambda n, s=starts, e=ends, o=optional: [draw(n, 4, 3), i64(*s), i64(*e), *o])
    yield Variant(lambda n: [draw(n, 4), *(np.array([v], np.int32) for v in (1, 3, 1, 1))])


@variants("Pad")
def pad(revision: int) -> Iterator[Variant]:
    modes = ["constant", "reflect", "edge", *(["wrap"] if revision >= 19 else [])]
    for mode in modes:
        for pads in ([0, 1, 2, 1], [1, 0, 0, 2], *([[0, -1, 1, 2]] if mode == "constant" else [])):
            if revision < 11:
                name = "paddings" if revision == 1 else "pads"
                yield Variant(lambda n: [draw(n, 4)], {"mode": mode, name: pads, "value": 0.5})
            else:
                yield Variant(lambda n, p=pads: [draw(n, 4), i64(*p)], {"mode": mode})
    if revision < 11:
        return
    types = (np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_)
    for t in types if revision >= 13 else types[:4]:
        yield Variant(lambda n, t=t: [draw.of(t, n, 4), i64(0, 1, 2, 1), scalar(1, t)])
    if revision >= 18:
        yield Variant(lambda n: [draw(n, 4, 2), i64(1, 2), scalar(0.5), i64(1)])
        yield Variant(
            lambda n: [draw(n, 4, 2), i64(1, 0, 0, 1), None, i64(-1, 0)], {"mode": "edge"}
        )


@variants("DepthToSpace")
def depth_to_space(revision: int) -> Iterator[Variant]:
    modes = [{}, {"mode": "CRD"}, {"mode": "DCR"}] if revision >= 11 else [{}]
    for mode in modes:
        yield Variant(lambda n: [draw(n, 8, 2, n)], {"blocksize": 2, **mode})
    yield Variant(lambda n: [draw(n, 9, 2, 3, dtype=np.float64)], {"blocksize": 3})


@variants("SpaceToDepth")
def space_to_depth(_: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(n, 2, 4, 2 * n)], {"blocksize": 2})
    yield Variant(lambda n: [draw(n, 2, 6, 3, dtype=np.float64)], {"blocksize": 3})


@variants("Trilu")
def trilu(_: int) -> Iterator[Variant]:
    for t in (np.float32, np.int64, np.bool_):
        yield Variant(lambda n, t=t: [draw.of(t, 2, n, 4)])
    for upper in (0, 1):
        for k in (-1, 2, 9, -9):
            yield Variant(lambda n, k=k: [draw(2, n, 4), scalar(k, np.int64)], {"upper": upper})


@variants("CenterCropPad")
def center_crop_pad(_: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(n, 6), i64(4, 5)])
    yield Variant(lambda n: [draw(n, 6, 3), i64(9, 4)], {"axes": [1, 0]})
    yield Variant(lambda n: [draw(n, 7), i64(4)], {"axes": [-1]})


@variants("ReverseSequence")
def reverse_sequence(_: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(n + 2, 3, 2), i64(1, 4, 3)])
    yield Variant(lambda n: [draw(3, n + 2), i64(5, 1, 2)], {"batch_axis": 0, "time_axis": 1})
    yield Variant(lambda n: [draw.of(np.int64, n + 2, 3), i64(1, 4, 3)])


@variants("EyeLike")
def eye_like(_: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(n, 4)])
    yield Variant(lambda n: [draw.ints(n, 4)], {"k": -1})
    yield Variant(lambda n: [draw(n, 4)], {"k": 1, "dtype": TensorProto.INT64})
    yield Variant(lambda n: [draw(n, 4)], {"k": 9, "dtype": TensorProto.DOUBLE})


@variants("Shape")
def shape(revision: int) -> Iterator[Variant]:
    for t in (np.float32, np.int64, np.bool_):
        yield Variant(lambda n, t=t: [draw.of(t, n, 4, 2)])
    if revision >= 15:
        for attributes in (
            {"start": 1},
            {"end": -1},
            {"start": -2, "end": 9},
            {"start": 2, "end": 1},
        ):
            yield Variant(lambda n: [draw(n, 4, 2)], attributes)


@variants("Size")
def size(_: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(n, 4, 2)])
    yield Variant(lambda _: [scalar(1.0)])


@variants("Constant")
def constant(revision: int) -> Iterator[Variant]:
    for t in (np.float32, np.float64, np.int64, np.bool_):
        yield Variant(lambda _: [], {"value": draw.of(t, 2, 3)})
    if revision >= 12:
        for attributes in (
            {"value_float": 0.5}, {"value_floats": [0.5, 1.5]}, {"value_int": 3},
            {"value_ints": [3, 4]}, {"value_string": "a"}, {"value_strings": ["a", "b"]},
        ):  # fmt: skip
            yield Variant(lambda _: [], attributes)


@variants("ConstantOfShape")
def constant_of_shape(_: int) -> Iterator[Variant]:
    for value in (None, np.array([2.5], np.float32), np.array([3]), np.array([True])):
        yield Variant(lambda n: [i64(n, 2)], {"value": value})


@variants("Range")
def ranges(_: int) -> Iterator[Variant]:
    for t in (np.float32, np.float64, np.int32, np.int64, np.int16):
        yield Variant(lambda n, t=t: [scalar(1, t), scalar(n + 6, t), scalar(2, t)])
        yield Variant(lambda n, t=t: [scalar(n, t), scalar(-4, t), scalar(-3, t)])
    yield Variant(lambda _: [scalar(0.1), scalar(1.0), scalar(0.3)], rtol=1e-6)


@variants("CumSum", "CumProd")
def cumulative(_: int) -> Iterator[Variant]:
    for t in (np.float32, np.float64, np.int64, np.int32):
        close = {"rtol": 1e-6, "atol": 1e-6} if t in (np.float32, np.float64) else {}
        for attributes in ({}, {"exclusive": 1}, {"reverse": 1}, {"exclusive": 1, "reverse": 1}):
            for axis in (0, -1):
                yield Variant(
                    lambda n, t=t, a=axis: [draw.of(t, n, 4), scalar(a, np.int64)],
                    attributes,
                    **close,
                )
    yield Variant(lambda n: [draw(n, 4), np.array([1], np.int32)], rtol=1e-6, atol=1e-6)
