"""Operators that find elements, or move them to and from given places."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from oracles.shapes import moved
from oracles.variants import Variant, draw, i64, scalar, variants


@variants("Gather")
def gather(revision: int) -> Iterator[Variant]:
    low = -3 if revision >= 11 else 0
    for t in moved("Gather", revision):
        yield Variant(lambda n, t=t: [draw.of(t, n, 4), draw.ints(2, 3, low=low, high=3)])
    yield Variant(
        lambda n: [draw(n, 4), draw.ints(5, low=low, high=3, dtype=np.int32)], {"axis": 1}
    )
    yield Variant(lambda n: [draw(n, 4), scalar(2, np.int64)], {"axis": 1})
    if revision >= 11:
        yield Variant(lambda n: [draw(n, 4, 2), draw.ints(2, low=-2, high=2)], {"axis": -1})


@variants("GatherElements")
def gather_elements(revision: int) -> Iterator[Variant]:
    for t in moved("GatherElements", revision):
        yield Variant(lambda n, t=t: [draw.of(t, n, 4), draw.ints(2, 3, low=-3, high=3)])
    yield Variant(
        lambda n: [draw(n, 4), draw.ints(n, 6, low=-4, high=4, dtype=np.int32)], {"axis": -1}
    )


@variants("GatherND")
def gather_nd(revision: int) -> Iterator[Variant]:
    for t in moved("GatherND", revision):
        yield Variant(lambda n, t=t: [draw.of(t, n, 4), draw.ints(5, 2, low=-3, high=3)])
    yield Variant(lambda n: [draw(n, 4, 2), draw.ints(5, 1, 2, low=-3, high=3)])
    if revision >= 12:
        yield Variant(
            lambda n: [draw(n, 4, 2), draw.ints(n, 3, 1, low=-4, high=4)], {"batch_dims": 1}
        )


def rows(n: int, count: int, columns: int) -> np.ndarray:
    """Indices into n rows, no row twice in a column."""
    return np.stack([(np.arange(count) + c) % n for c in range(columns)], 1).astype(np.int64)


@variants("Scatter", "ScatterElements")
def scatter(revision: int) -> Iterator[Variant]:
    name = "Scatter" if revision == 9 else "ScatterElements"
    for t in moved(name, revision):
        yield Variant(lambda n, t=t: [draw.of(t, n, 4), rows(n, 2, 3), draw.of(t, 2, 3)])
    yield Variant(lambda n: [draw(4, n), rows(n, 2, 3).T, draw(3, 2)], {"axis": 1})
    if revision >= 11 and name != "Scatter":
        yield Variant(lambda n: [draw(4, n), rows(n, 2, 3).T - n, draw(3, 2)], {"axis": -1})
    for reduction in reductions(revision):
        yield Variant(
            lambda n: [draw(n, 4), draw.ints(6, 4, low=0, high=n), draw(6, 4)],
            {"reduction": reduction},
            rtol=1e-6,  # a few summands or factors, in another order
            atol=1e-6,
        )


def reductions(revision: int) -> tuple[str, ...]:
    return {16: ("add", "mul"), 18: ("add", "mul", "max", "min")}.get(revision, ())


@variants("ScatterND")
def scatter_nd(revision: int) -> Iterator[Variant]:
    for t in moved("ScatterND", revision):
        yield Variant(lambda n, t=t: [draw.of(t, n, 4), i64(2, 0)[:, None], draw.of(t, 2, 4)])
    yield Variant(lambda n: [draw(n, 4), i64(0, 1, 2, -1)[:, None].reshape(2, 2), draw(2)])
    for reduction in reductions(revision):
        yield Variant(
            lambda n: [draw(n, 4), draw.ints(7, 1, low=0, high=n), draw(7, 4)],
            {"reduction": reduction},
            rtol=1e-6,  # a few summands or factors, in another order
            atol=1e-6,
        )


@variants("TensorScatter")
def tensor_scatter(_: int) -> Iterator[Variant]:
    for attributes in ({}, {"mode": "circular"}):
        yield Variant(lambda n: [draw(2, n, 6, 4), draw(2, n, 2, 4), i64(1, 4)], attributes)
    yield Variant(lambda n: [draw(2, 6, n), draw(2, 2, n), i64(1, 3)], {"axis": 1})
    yield Variant(lambda n: [draw(2, 6, n), draw(2, 2, n)], {"axis": 1})


@variants("OneHot")
def one_hot(_: int) -> Iterator[Variant]:
    for t in (np.float32, np.int64):
        for attributes in ({}, {"axis": 0}, {"axis": -2}):
            yield Variant(
                lambda n, t=t: [
                    draw.ints(n, 2, low=-7, high=7), i64(5), np.array([2, 4], t),
                ],
                attributes,
            )  # fmt: skip
    yield Variant(lambda n: [draw(n, low=0, high=4).round(), scalar(4.0), draw(2)])


@variants("Unique")
def unique(_: int) -> Iterator[Variant]:
    for attributes in ({}, {"sorted": 0}, {"axis": 0}, {"axis": 1}, {"axis": -1, "sorted": 0}):
        yield Variant(lambda n: [draw.ints(n, 4, low=0, high=3)], attributes, 4)
    yield Variant(lambda n: [draw.distinct(n, 4) // 3], {}, 1)


@variants("TopK")
def top_k(revision: int) -> Iterator[Variant]:
    if revision == 1:
        for attributes in ({"k": 2}, {"k": 2, "axis": 0}):
            yield Variant(lambda n: [draw.distinct(n, 4)], attributes, 2)
        return
    types = (np.float32, np.int64, np.float64, np.int32) if revision >= 11 else (np.float32,)
    for t in types:
        yield Variant(lambda n, t=t: [draw.distinct(n, 4, dtype=t), i64(2)], {}, 2)
        yield Variant(lambda n, t=t: [draw.distinct(n, 4, dtype=t), i64(3)], {"axis": 0}, 2)
    if revision >= 11:
        yield Variant(lambda n: [draw.distinct(n, 4), i64(2)], {"largest": 0}, 2)
        yield Variant(lambda n: [draw.distinct(n, 4), i64(4)], {"largest": 0, "axis": -1}, 2)
        yield Variant(lambda n: [draw.ints(n, 9, low=0, high=3), i64(5)], {}, 2)  # ties


@variants("Compress")
def compress(_: int) -> Iterator[Variant]:
    keep = np.array([True, False, True])
    for attributes in ({}, {"axis": 0}, {"axis": 1}, {"axis": -1}):
        yield Variant(lambda n: [draw(n, 4), keep], attributes)


@variants("NonZero")
def non_zero(_: int) -> Iterator[Variant]:
    for t in (np.float32, np.int64, np.bool_):
        yield Variant(lambda n, t=t: [draw.of(t, n, 4) * draw.of(np.bool_, n, 4).astype(t)])
