"""Operators on each element by itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from oracles.variants import Variant, draw, scalar, types_of, variants

# A few units in the last place of float32: exp, sin ... come from different libraries.
ULPS = {"rtol": 2e-6, "atol": 1e-6}
# float16 is computed in float32 by one and in float16 by the other: one rounding, 2 ** -11.
HALF_ULPS = {"rtol": 2e-3, "atol": 1e-3}

NUMBERS = (np.float32, np.float64, np.float16, np.int32, np.int64, np.int8, np.uint8)


def typed(op_type: str, revision: int, wanted: tuple[type, ...] = NUMBERS) -> list[type]:
    """Those of the wanted types that the schema allows; the first is for certain."""
    allowed = types_of(onnx.defs.get_schema(op_type, revision))
    return [t for t in wanted if t in allowed]


def tolerance(dtype: type) -> dict[str, float]:
    return HALF_ULPS if dtype is np.float16 else ULPS


RANGES = {
    "Acos": (-1, 1), "Acosh": (1, 9), "Asin": (-1, 1), "Atanh": (-0.9, 0.9), "Log": (0.1, 9),
    "Sqrt": (0, 9), "Reciprocal": (0.5, 4), "Tan": (-1, 1), "Erf": (-3, 3), "Mish": (-9, 9),
    "Sigmoid": (-9, 9), "Softplus": (-9, 9), "Tanh": (-5, 5),
}  # fmt: skip


def unary(op_type: str) -> None:
    low, high = RANGES.get(op_type, (-2, 2))

    @variants(op_type)
    def generate(revision: int) -> Iterator[Variant]:
        for t in typed(op_type, revision):
            if np.issubdtype(t, np.floating):
                yield Variant(
                    lambda n, t=t: [draw(n, 2, n, low=low, high=high, dtype=t)], **tolerance(t)
                )
            else:
                yield Variant(lambda n, t=t: [draw.of(t, n, 4)])
        yield Variant(lambda _: [scalar((low + high) / 2 + 0.3)], **ULPS)


for name in [
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "Ceil",
    "Cos",
    "Cosh",
    "Erf",
    "Exp",
    "Floor",
    "HardSwish",
    "Log",
    "Mish",
    "Neg",
    "Reciprocal",
    "Relu",
    "Round",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Tan",
    "Tanh",
]:
    unary(name)


ATTRIBUTES = {
    "Celu": [{}, {"alpha": 0.5}],
    "Elu": [{}, {"alpha": 0.5}],
    "Gelu": [{}, {"approximate": "tanh"}],
    "HardSigmoid": [{}, {"alpha": 0.4, "beta": 0.3}],
    "LeakyRelu": [{}, {"alpha": 0.3}],
    "Selu": [{}, {"alpha": 2.0, "gamma": 1.5}],
    "Shrink": [{}, {"lambd": 0.7, "bias": 0.2}],
    "Swish": [{}, {"alpha": 1.7}],
    "ThresholdedRelu": [{}, {"alpha": 0.4}],
}


def activation(op_type: str) -> None:
    @variants(op_type)
    def generate(revision: int) -> Iterator[Variant]:
        for t in typed(op_type, revision, (np.float32, np.float64, np.float16)):
            for attributes in ATTRIBUTES[op_type]:
                yield Variant(lambda n, t=t: [draw(n, 7, dtype=t)], attributes, **tolerance(t))


for name in ATTRIBUTES:
    activation(name)


def pairs(dtype: type, floor: bool = False) -> list:
    """Inputs of every kind of broadcasting; ``floor``: the second is positive."""

    def second(*shape: int) -> np.ndarray:
        values = draw.of(dtype, *shape)
        return np.maximum(np.abs(values), dtype(1)).astype(dtype) if floor else values

    return [
        lambda n: [draw.of(dtype, n, 4), second(n, 4)],
        lambda n: [draw.of(dtype, n, 1, 4), second(n, 1)],
        lambda n: [draw.of(dtype), second(2, n)],
    ]


ARITHMETIC = ["Add", "Sub", "Mul", "Div", "Pow"]
COMPARISONS = ["Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"]


def binary(op_type: str) -> None:
    @variants(op_type)
    def generate(revision: int) -> Iterator[Variant]:
        if op_type in ARITHMETIC + COMPARISONS[:3] and revision < 7:
            yield from legacy_broadcasting(op_type, revision)
            return
        for t in typed(op_type, revision, (*NUMBERS, np.uint32, np.uint64, np.bool_, np.object_)):
            close = tolerance(t) if op_type in ARITHMETIC else {}
            for make in pairs(t, floor=op_type in ("Div", "Pow") and t is not np.bool_):
                if op_type == "Pow":
                    yield Variant(lambda n, m=make: [np.abs(m(n)[0]), m(n)[1]], **close)
                else:
                    yield Variant(make, **close)


def legacy_broadcasting(op_type: str, revision: int) -> Iterator[Variant]:
    """Before opset 7 ``axis`` said where the second shape starts in the first."""
    t = typed(op_type, revision, (np.float32, np.int32))[0]
    shapes = [
        ({}, lambda n: (n, 4, 2)),
        ({"broadcast": 1}, lambda _: (2,)),
        ({"broadcast": 1, "axis": 1}, lambda _: (4,)),
        ({"broadcast": 1, "axis": 0}, lambda n: (n, 4)),
    ]
    for attributes, shape in shapes:
        yield Variant(
            lambda n, s=shape: [np.abs(draw.of(t, n, 4, 2)), np.abs(draw.of(t, *s(n))) + t(1)],
            attributes,
            **ULPS,
        )


for name in ARITHMETIC + COMPARISONS:
    binary(name)


@variants("And", "Or", "Xor")
def logical(revision: int) -> Iterator[Variant]:
    if revision == 1:
        yield Variant(
            lambda n: [draw.of(np.bool_, n, 4, 2), draw.of(np.bool_, 4)],
            {"broadcast": 1, "axis": 1},
        )
        return
    for make in pairs(np.bool_):
        yield Variant(make)


@variants("Not")
def negation(_: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw.of(np.bool_, n, 3)])


ODD = [np.nan, np.inf, -np.inf, 0.0, 1.0, -1.0]


@variants("IsNaN")
def is_nan(_: int) -> Iterator[Variant]:
    for t in (np.float32, np.float64, np.float16):
        yield Variant(lambda n, t=t: [np.array(ODD * n, t).reshape(n, 6)])


@variants("IsInf")
def is_inf(revision: int) -> Iterator[Variant]:
    for t in typed("IsInf", revision, (np.float32, np.float64, np.float16)):
        for attributes in ({}, {"detect_negative": 0}, {"detect_positive": 0}):
            yield Variant(lambda n, t=t: [np.array(ODD * n, t)], attributes)


@variants("Mod")
def remainder(revision: int) -> Iterator[Variant]:
    for t in typed("Mod", revision, (*NUMBERS, np.uint16)):
        is_float = np.issubdtype(t, np.floating)
        for fmod in (1,) if is_float else (0, 1):
            for make in pairs(t, floor=True):
                yield Variant(make, {"fmod": fmod}, **(tolerance(t) if is_float else {}))
    yield Variant(
        lambda n: [draw.ints(n, 3), np.array([-3, 4, -5])], {"fmod": 0}
    )  # the sign of the divisor


@variants("BitwiseAnd", "BitwiseOr", "BitwiseXor")
def bitwise(_: int) -> Iterator[Variant]:
    for t in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64):
        for make in pairs(t):
            yield Variant(make)


@variants("BitwiseNot")
def bitwise_not(_: int) -> Iterator[Variant]:
    for t in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64):
        yield Variant(lambda n, t=t: [draw.of(t, n, 3)])


@variants("BitShift")
def shift(_: int) -> Iterator[Variant]:
    for t in (np.uint8, np.uint16, np.uint32, np.uint64):
        for direction in ("LEFT", "RIGHT"):
            yield Variant(
                lambda n, t=t: [draw.of(t, n, 3) * t(20), draw.ints(3, low=0, high=7, dtype=t)],
                {"direction": direction},
            )


@variants("Max", "Min", "Sum", "Mean")
def variadic(revision: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(n, 3)], **ULPS)
    yield Variant(lambda n: [draw(n, 3), draw(n, 3), draw(n, 3)], **ULPS)
    if revision >= 8:
        yield Variant(lambda n: [draw(n, 1, 3), draw(n, 1), draw(3)], **ULPS)


@variants("PRelu")
def prelu(revision: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(n, 4, 3), draw(1)], **ULPS)
    if revision < 7:
        yield Variant(lambda n: [draw(n, 4, 3), draw(4)], **ULPS)
    else:
        yield Variant(lambda n: [draw(n, 4, 3), draw(4, 1)], **ULPS)
        yield Variant(lambda n: [draw(n, 4, 3), draw(n, 4, 3)], **ULPS)


@variants("Clip")
def clip(revision: int) -> Iterator[Variant]:
    if revision < 11:
        for attributes in ({}, {"min": -1.0}, {"max": 0.5}, {"min": -1.0, "max": 0.5}):
            yield Variant(lambda n: [draw(n, 4)], attributes)
        return
    for t in typed("Clip", revision):
        low, high = scalar(0 if np.issubdtype(t, np.unsignedinteger) else -1, t), scalar(1, t)
        yield Variant(lambda n, t=t: [draw.of(t, n, 4)])
        yield Variant(lambda n, t=t, low=low, high=high: [draw.of(t, n, 4), low, high])
        yield Variant(lambda n, t=t, low=low: [draw.of(t, n, 4), low])
        yield Variant(lambda n, t=t, high=high: [draw.of(t, n, 4), None, high])
        yield Variant(lambda n, t=t, low=low, high=high: [draw.of(t, n, 4), high, low])  # crossed


@variants("Where")
def where(_: int) -> Iterator[Variant]:
    for t in (np.float32, np.int64, np.uint8, np.float64):
        yield Variant(lambda n, t=t: [draw.of(np.bool_, n, 1), draw.of(t, n, 4), draw.of(t, 4)])
    yield Variant(lambda n: [draw.of(np.bool_), draw(n, 4), draw(1)])


@variants("Dropout")
def dropout(revision: int) -> Iterator[Variant]:
    if revision < 7:
        yield Variant(lambda n: [draw(n, 4)], {"is_test": 1, "ratio": 0.4})
    elif revision < 12:
        yield Variant(lambda n: [draw(n, 4)], {"ratio": 0.4})
        yield Variant(lambda n: [draw(n, 4)], outputs=2 if revision >= 10 else 1)
    else:
        yield Variant(lambda n: [draw(n, 4)], {"seed": 3})
        yield Variant(lambda n: [draw(n, 4), scalar(0.4)], outputs=2)
        yield Variant(lambda n: [draw(n, 4), scalar(0.4), scalar(False, np.bool_)], outputs=2)
        yield Variant(lambda n: [draw(n, 4), scalar(0.0), scalar(True, np.bool_)], outputs=2)
        yield Variant(
            lambda n: [draw(n, 4), scalar(0.4), scalar(True, np.bool_)], outputs=2, random=True
        )
