"""Operators that reduce or normalise along axes, and products of matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from oracles.elementwise import typed
from oracles.variants import Variant, draw, i64, variants

# At most some hundred summands below 4, added in another order: a few units of 6e-8 of the sum.
SUMS = {"rtol": 1e-5, "atol": 5e-6}
REDUCTIONS = [
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
]


def reduction(op_type: str) -> None:
    low = 0.1 if op_type == "ReduceLogSum" else -2.0
    axes_are_inputs = 13 if op_type == "ReduceSum" else 18

    def reduced(axes: tuple[int, ...] | None, revision: int, t: type, **more: Any) -> Variant:
        close = SUMS if np.issubdtype(t, np.floating) else {}
        attributes = {**more}

        def make(n: int) -> list:
            x = draw(n, 4, 3, low=low, dtype=t) if close else draw.of(t, n, 4, 3)
            return [x, i64(*axes)] if axes is not None and revision >= axes_are_inputs else [x]

        if axes is not None and revision < axes_are_inputs:
            attributes["axes"] = list(axes)
        return Variant(make, attributes, **close)

    @variants(op_type)
    def generate(revision: int) -> Iterator[Variant]:
        types = (np.float32, np.float64, np.int32, np.int64, np.int8, np.uint8, np.bool_)
        integers = op_type not in ("ReduceLogSum", "ReduceLogSumExp", "ReduceL2")
        for t in typed(op_type, revision, types if integers else types[:2]):
            if t is not np.bool_ or revision >= 20:
                yield reduced((1,), revision, t)
        for axes in (None, (0, 2), *(((-1,), (-2, -1)) if revision >= 11 else ())):
            yield reduced(axes, revision, np.float32)
            yield reduced(axes, revision, np.float32, keepdims=0)
        if revision >= axes_are_inputs:
            yield reduced((), revision, np.float32)
            yield reduced((), revision, np.float32, noop_with_empty_axes=1)
            yield reduced(None, revision, np.float32, noop_with_empty_axes=1)


for name in REDUCTIONS:
    reduction(name)


@variants("ArgMax", "ArgMin")
def arg_extreme(revision: int) -> Iterator[Variant]:
    for t in typed("ArgMax", revision, (np.float32, np.int32, np.float64, np.uint8, np.int8)):
        yield Variant(lambda n, t=t: [draw.of(t, n, 4, 3)])
    for attributes in ({"axis": 1}, {"axis": 2, "keepdims": 0}, {"axis": -1}):
        if revision >= 11 or attributes["axis"] >= 0:
            yield Variant(lambda n: [draw(n, 4, 3)], attributes)
    yield Variant(lambda n: [draw.ints(n, 9, low=0, high=2, dtype=np.int32)], {"axis": 1})
    if revision >= 12:
        yield Variant(
            lambda n: [draw.ints(n, 9, low=0, high=2, dtype=np.int32)],
            {"axis": 1, "select_last_index": 1},
        )


@variants("Softmax", "LogSoftmax", "Hardmax")
def along_axis(revision: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(n, 4, 3)], **SUMS)
    for axis in (0, 1, 2, *((-1, -2) if revision >= 11 else ())):
        yield Variant(lambda n: [draw(n, 4, 3)], {"axis": axis}, **SUMS)
    yield Variant(lambda n: [draw(n, 4, 2, 3) * 40], **SUMS)
    yield Variant(lambda n: [draw(n, 4, dtype=np.float64)], **SUMS)


@variants("LpNormalization")
def lp_normalization(_: int) -> Iterator[Variant]:
    for attributes in ({}, {"p": 1}, {"axis": 0}, {"axis": 1, "p": 1}):
        yield Variant(lambda n: [draw(n, 4, 3)], attributes, **SUMS)
    yield Variant(lambda n: [draw(n, 4, 3, dtype=np.float64)], **SUMS)


@variants("MeanVarianceNormalization")
def mean_variance_normalization(_: int) -> Iterator[Variant]:
    for attributes in ({}, {"axes": [0, 1, 2, 3]}, {"axes": [-1]}):
        yield Variant(lambda n: [draw(n, 4, 3, n)], attributes, **SUMS)


@variants("MatMul")
def matmul(revision: int) -> Iterator[Variant]:
    for t in typed("MatMul", revision, (np.float32, np.float64, np.int32, np.uint32, np.int64)):
        close = SUMS if np.issubdtype(t, np.floating) else {}
        yield Variant(lambda n, t=t: [draw.of(t, n, 4), draw.of(t, 4, 2)], **close)
    yield Variant(lambda n: [draw(2, 1, n, 4), draw(3, 4, n)], **SUMS)
    yield Variant(lambda n: [draw(n), draw(n)], **SUMS)
    yield Variant(lambda n: [draw(2, 4, n), draw(n)], **SUMS)
    yield Variant(lambda n: [draw(n), draw(2, n, 4)], **SUMS)


@variants("Gemm")
def gemm(revision: int) -> Iterator[Variant]:
    old = {"broadcast": 1} if revision < 7 else {}
    for c in ((1,), (4,), (1, 4)):
        yield Variant(lambda n, c=c: [draw(n, 5), draw(5, 4), draw(*c)], old, **SUMS)
    yield Variant(lambda n: [draw(n, 5), draw(5, 4), draw(n, 4)], **SUMS)
    scaled = {"alpha": 0.5, "beta": 2.0, **old}
    yield Variant(lambda n: [draw(5, n), draw(5, 4), draw(4)], {"transA": 1, **scaled}, **SUMS)
    yield Variant(
        lambda n: [draw(5, n), draw(4, 5), draw(4)], {"transA": 1, "transB": 1, **scaled}, **SUMS
    )
    if revision >= 7:
        yield Variant(lambda n: [draw(n, 5), draw(5, 4), draw(n, 1)], **SUMS)
        yield Variant(
            lambda n: [draw(n, 5, dtype=np.float64), draw(5, 4, dtype=np.float64),
                       draw(4, dtype=np.float64)], **SUMS,
        )  # fmt: skip
    if revision >= 11:
        yield Variant(lambda n: [draw(n, 5), draw(4, 5)], {"transB": 1}, **SUMS)


@variants("Einsum")
def einsum(_: int) -> Iterator[Variant]:
    for equation, shapes in (
        ("ij,jk->ik", lambda n: [(n, 4), (4, 2)]),
        ("ij->ji", lambda n: [(n, 4)]),
        ("bij,bjk", lambda n: [(2, n, 4), (2, 4, 3)]),
        ("...ij,...jk->...ik", lambda n: [(2, 3, n, 4), (2, 3, 4, 5)]),
        ("ii->i", lambda n: [(n, n)]),
        ("i,j->", lambda n: [(n,), (4,)]),
        ("bhqd, bhkd -> bhqk", lambda n: [(2, 3, n, 4), (2, 3, 5, 4)]),
        ("ij,jk,kl->il", lambda n: [(n, 4), (4, 2), (2, 3)]),
    ):
        yield Variant(lambda n, s=shapes: [draw(*x) for x in s(n)], {"equation": equation}, **SUMS)


@variants("Det")
def determinant(_: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(n, n)], **SUMS)
    yield Variant(lambda n: [draw(2, 4, n, n)], **SUMS)
