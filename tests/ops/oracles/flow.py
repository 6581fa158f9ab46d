"""Control flow, sequences and optionals: small graphs around the operator."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from oracles.variants import Variant, draw, i64, scalar, variants


@variants("If")
def branches(_: int) -> Iterator[Variant]:
    nodes = """
        y0 = If (x0) <
            then_branch = then () => (float a) { a = Mul(x1, x2) },
            else_branch = otherwise () => (float b) { b = Sub(x1, x2) }
        >
    """
    for value in (True, False):
        yield Variant(lambda n, v=value: [scalar(v, np.bool_), draw(n, 4), draw(n, 4)], nodes=nodes)
    nested = """
        y0 = If (x0) <
            then_branch = then () => (float a) {
                a = If (x1) <
                    then_branch = inner () => (float c) { c = Neg(x2) },
                    else_branch = outer () => (float d) { d = Abs(x2) }
                >
            },
            else_branch = otherwise () => (float b) { b = Add(x2, x2) }
        >
    """
    for first, second in ((True, True), (True, False), (False, True)):
        yield Variant(
            lambda n, a=first, b=second: [scalar(a, np.bool_), scalar(b, np.bool_), draw(n, 4)],
            nodes=nested,
        )


@variants("Loop")
def loops(_: int) -> Iterator[Variant]:
    counted = """
        y0, y1 = Loop (x0, , x1) <
            body = body (int64 i, bool c, float s) => (bool again, float t, float out) {
                again = Identity(c)
                t = Add(s, x2)
                out = Mul(t, x2)
            }
        >
    """
    yield Variant(
        lambda n: [scalar(n, np.int64), draw(2, 3), draw(2, 3)], nodes=counted, outputs=2,
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    yield Variant(
        lambda n: [scalar(n, np.int64), draw(2, 3), draw(n, 2, 3)[0]], nodes=counted, outputs=2,
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    until = """
        y0, y1 = Loop (x0, x1, x2) <
            body = body (int64 i, bool c, float s) => (bool again, float t, float out) {
                t = Add(s, x3)
                total = ReduceSum<keepdims = 0>(t)
                again = Less(total, x4)
                out = Identity(total)
            }
        >
    """
    yield Variant(
        lambda n: [
            scalar(50, np.int64), scalar(True, np.bool_), draw(n, 2),
            draw(n, 2, low=0.5, high=1), scalar(9.0),
        ],
        nodes=until, outputs=2, rtol=1e-5,
    )  # fmt: skip


@variants("Scan")
def scans(revision: int) -> Iterator[Variant]:
    body = """
            num_scan_inputs = 1,
            body = body (float s, float x) => (float t, float out) {
                t = Add(s, x)
                out = Mul(t, x)
            }
    """
    close = {"outputs": 2, "rtol": 1e-5, "atol": 1e-6}
    if revision == 8:
        yield Variant(
            lambda n: [draw(2, 3), draw(2, n, 3)], nodes=f"y0, y1 = Scan(, x0, x1) <{body}>",
            **close,
        )  # fmt: skip
        return
    yield Variant(lambda n: [draw(3), draw(n, 3)], nodes=f"y0, y1 = Scan(x0, x1) <{body}>", **close)
    turned = "scan_input_directions = [1], scan_output_directions = [1],"
    yield Variant(
        lambda n: [draw(3), draw(n, 3)], nodes=f"y0, y1 = Scan(x0, x1) <{turned}{body}>", **close
    )
    along = "scan_input_axes = [1], scan_output_axes = [1],"
    yield Variant(
        lambda n: [draw(3), draw(3, n)], nodes=f"y0, y1 = Scan(x0, x1) <{along}{body}>", **close
    )


SEQUENCE = "s = SequenceConstruct(x0, x1, x0)"
SEQUENCES = {
    "SequenceConstruct": f"{SEQUENCE} y0 = ConcatFromSequence<axis = 0>(s)",
    "SequenceEmpty": "e = SequenceEmpty() s = SequenceInsert(e, x1) y0 = SequenceAt(s, x2)",
    "SequenceAt": f"{SEQUENCE} y0 = SequenceAt(s, x2)",
    "SequenceInsert": f"{SEQUENCE} t = SequenceInsert(s, x1, x2) y0 = SequenceAt(t, x2)",
    "SequenceErase": f"{SEQUENCE} t = SequenceErase(s, x2) y0 = ConcatFromSequence<axis = 1>(t)",
    "SequenceLength": f"{SEQUENCE} y0 = SequenceLength(s)",
}


def sequence(op_type: str) -> None:
    @variants(op_type)
    def generate(_: int) -> Iterator[Variant]:
        for index in (0,) if op_type == "SequenceEmpty" else (0, -1, 1):
            yield Variant(
                lambda n, i=index: [draw(n, 3), draw(n, 3), scalar(i, np.int64)],
                nodes=SEQUENCES[op_type],
            )


for name in SEQUENCES:
    sequence(name)


@variants("ConcatFromSequence")
def concat_from_sequence(_: int) -> Iterator[Variant]:
    for axis, stacked in ((0, 0), (1, 0), (-1, 1), (0, 1)):
        nodes = f"{SEQUENCE} y0 = ConcatFromSequence<axis = {axis}, new_axis = {stacked}>(s)"
        yield Variant(lambda n: [draw(n, 3), draw(n, 3)], nodes=nodes)


@variants("SplitToSequence")
def split_to_sequence(_: int) -> Iterator[Variant]:
    for text in (
        "s = SplitToSequence<axis = 1>(x0)", "s = SplitToSequence<axis = 1, keepdims = 0>(x0)",
        "s = SplitToSequence<axis = 1>(x0, x2)", "s = SplitToSequence<axis = 1>(x0, x3)",
    ):  # fmt: skip
        yield Variant(
            lambda n: [draw(n, 4), scalar(-1, np.int64), scalar(3, np.int64), i64(1, 3)],
            nodes=f"{text} y0 = SequenceAt(s, x1)",
        )


@variants("SequenceMap")
def sequence_map(_: int) -> Iterator[Variant]:
    nodes = f"""{SEQUENCE}
        t = SequenceMap(s, x1) <
            body = body (float a, float b) => (float c) {{ c = Mul(a, b) }}
        >
        y0 = ConcatFromSequence<axis = 0>(t)
    """
    yield Variant(lambda n: [draw(n, 3), draw(n, 3)], nodes=nodes)


@variants("Optional", "OptionalGetElement", "OptionalHasElement")
def optionals(_: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(n, 3)], nodes="o = Optional(x0) y0 = OptionalGetElement(o)")
    yield Variant(lambda n: [draw(n, 3)], nodes="o = Optional(x0) y0 = OptionalHasElement(o)")
