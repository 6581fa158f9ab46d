"""Casts, quantized operators, random numbers and signals."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from oracles.elementwise import typed
from oracles.reductions import SUMS
from oracles.variants import Arrays, Variant, draw, scalar, variants

CASTS = {
    np.float32: TensorProto.FLOAT, np.float64: TensorProto.DOUBLE, np.float16: TensorProto.FLOAT16,
    np.int32: TensorProto.INT32, np.int64: TensorProto.INT64, np.int8: TensorProto.INT8,
    np.uint8: TensorProto.UINT8, np.uint16: TensorProto.UINT16, np.bool_: TensorProto.BOOL,
}  # fmt: skip


@variants("Cast")
def cast(revision: int) -> Iterator[Variant]:
    names = {number: TensorProto.DataType.Name(number) for number in CASTS.values()}
    for source, (target, number) in itertools.product(CASTS, CASTS.items()):
        to = names[number] if revision < 6 else number

        def make(n: int, source: type = source, target: type = target) -> Arrays:
            values = draw.of(source, n, 4)
            # Casting a negative float to an unsigned integer is left open.
            return [np.abs(values) if np.issubdtype(target, np.unsignedinteger) else values]

        yield Variant(make, {"to": to})
    if revision >= 9:
        numbers = np.array(["1.5", "-3", "1e3", "NaN", "INF"], object)
        yield Variant(lambda n: [numbers[:n]], {"to": TensorProto.FLOAT})
        yield Variant(lambda n: [numbers[1:2].repeat(n)], {"to": TensorProto.INT64})
        yield Variant(lambda n: [draw.ints(n)], {"to": TensorProto.STRING})


@variants("CastLike")
def cast_like(revision: int) -> Iterator[Variant]:
    for source, target in itertools.product(typed("CastLike", revision), CASTS):
        yield Variant(
            lambda n, s=source, t=target: [np.abs(draw.of(s, n, 4)), draw.of(t, 1)],
        )


@variants("BitCast")
def bit_cast(_: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(n, 4)], {"to": TensorProto.INT32})
    yield Variant(lambda n: [draw.ints(n, 4)], {"to": TensorProto.DOUBLE})
    yield Variant(lambda n: [draw.of(np.int8, n, 4)], {"to": TensorProto.UINT8})


def zero_points(t: type, *shape: int) -> np.ndarray:
    return draw.ints(*shape, low=-3, high=9, dtype=t)


def scales(*shape: int) -> np.ndarray:
    return draw(*shape, low=0.01, high=0.2)


@variants("QuantizeLinear")
def quantize_linear(revision: int) -> Iterator[Variant]:
    types = (np.uint8, np.int8, *((np.uint16, np.int16) if revision >= 21 else ()))
    for t in types:
        yield Variant(lambda n, t=t: [draw(n, 4, 2), scales(), zero_points(t)])
        if revision >= 13:
            yield Variant(lambda n, t=t: [draw(n, 4, 2), scales(4), zero_points(t, 4)], {"axis": 1})
    yield Variant(lambda n: [draw(n, 4) * 99, scales()])
    if revision >= 13:
        yield Variant(lambda n: [draw(4, n, 2), scales(2), zero_points(np.int8, 2)], {"axis": -1})
        yield Variant(lambda n: [draw(n, 4, 2), scales(4)])
    if revision >= 21:
        yield Variant(
            lambda n: [draw(n, 4, 6), scales(n, 2, 6), zero_points(np.int8, n, 2, 6)],
            {"block_size": 2, "axis": 1},
        )
        yield Variant(lambda n: [draw(n, 4), scales()], {"output_dtype": TensorProto.INT16})
    if revision >= 19:
        yield Variant(
            lambda n: [draw(n, 4, dtype=np.float16), scales().astype(np.float16),
                       zero_points(np.int8)],
        )  # fmt: skip


@variants("DequantizeLinear")
def dequantize_linear(revision: int) -> Iterator[Variant]:
    types = (np.uint8, np.int8, *((np.uint16, np.int16) if revision >= 21 else ()))
    for t in types:
        yield Variant(lambda n, t=t: [draw.ints(n, 4, 2, dtype=t), scales(), zero_points(t)])
        if revision >= 13:
            yield Variant(
                lambda n, t=t: [draw.ints(n, 4, 2, dtype=t), scales(4), zero_points(t, 4)],
                {"axis": 1},
            )
    yield Variant(lambda n: [draw.ints(n, 4, dtype=np.int32), scales()])
    if revision >= 21:
        yield Variant(
            lambda n: [draw.ints(n, 6, 2, dtype=np.int8), scales(n, 3, 2),
                       zero_points(np.int8, n, 3, 2)], {"block_size": 2, "axis": 1},
        )  # fmt: skip


@variants("DynamicQuantizeLinear")
def dynamic_quantize_linear(_: int) -> Iterator[Variant]:
    # scale = range / 255, divided once
    yield Variant(lambda n: [draw(n, 9)], outputs=3, rtol=1e-7)
    yield Variant(lambda n: [draw(n, 9, low=1, high=3)], outputs=3, rtol=1e-7)
    yield Variant(lambda n: [draw(n, 9, low=-3, high=-1)], outputs=3, rtol=1e-7)


INTEGERS = (np.uint8, np.int8)


@variants("MatMulInteger")
def matmul_integer(_: int) -> Iterator[Variant]:
    for a, b in itertools.product(INTEGERS, INTEGERS):
        yield Variant(
            lambda n, a=a, b=b: [draw.of(a, n, 4), draw.of(b, 4, 3), zero_points(a), zero_points(b)]
        )
    yield Variant(lambda n: [draw.of(np.uint8, 2, n, 4), draw.of(np.int8, 4, 3)])
    yield Variant(
        lambda n: [draw.of(np.uint8, n, 4), draw.of(np.int8, 4, 3), zero_points(np.uint8),
                   zero_points(np.int8, 3)]
    )  # fmt: skip


@variants("ConvInteger")
def conv_integer(_: int) -> Iterator[Variant]:
    for attributes in ({}, {"pads": [1, 1, 1, 1], "strides": [2, 1]}, {"auto_pad": "SAME_UPPER"}):
        yield Variant(
            lambda n: [draw.of(np.uint8, 1, 2, n + 3, 5), draw.of(np.uint8, 3, 2, 2, 3),
                       zero_points(np.uint8), zero_points(np.uint8)], attributes,
        )  # fmt: skip
    yield Variant(lambda n: [draw.of(np.uint8, 1, 2, n + 3, 5), draw.of(np.int8, 3, 2, 2, 3)])


@variants("QLinearMatMul")
def qlinear_matmul(_: int) -> Iterator[Variant]:
    for t, per_column in itertools.product(INTEGERS, (False, True)):
        shape = (3,) if per_column else ()
        yield Variant(
            lambda n, t=t, s=shape: [
                draw.of(t, n, 4), scales(), zero_points(t),
                draw.of(t, 4, 3), scales(*s), zero_points(t, *s), scales(), zero_points(t),
            ]
        )  # fmt: skip


@variants("QLinearConv")
def qlinear_conv(_: int) -> Iterator[Variant]:
    for t in INTEGERS:
        for attributes in ({}, {"pads": [1, 1, 1, 1], "strides": [2, 1]}):
            for biased, shape in itertools.product((False, True), ((), (3,))):
                yield Variant(
                    lambda n, t=t, b=biased, s=shape: [
                        draw.of(t, 1, 2, n + 3, 5), scales(), zero_points(t),
                        draw.of(np.int8, 3, 2, 2, 3), scales(*s), np.zeros(s, np.int8),
                        scales(), zero_points(t), *([draw.of(np.int32, 3)] if b else []),
                    ],
                    attributes,
                    constants=(8,) if biased else (),
                )  # fmt: skip


@variants("RandomNormal", "RandomUniform")
def random_numbers(_: int) -> Iterator[Variant]:
    yield Variant(lambda _: [], {"shape": [2, 3]}, random=True)
    yield Variant(
        lambda _: [], {"shape": [2, 3], "dtype": TensorProto.DOUBLE, "seed": 1.0}, random=True
    )


@variants("RandomNormalLike", "RandomUniformLike")
def random_like(_: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(n, 4)], {"seed": 1.0}, random=True)
    yield Variant(lambda n: [draw(n, 4)], {"dtype": TensorProto.DOUBLE}, random=True)


@variants("Bernoulli")
def bernoulli(_: int) -> Iterator[Variant]:
    # Without a kernel onnxruntime runs the function body of the schema, which gives one with
    # probability 1 - p: against the text of the schema and onnx.reference, which qwrap follows.
    yield Variant(lambda n: [draw.of(np.bool_, n, 4).astype(np.float32)], random=True)
    yield Variant(lambda n: [draw(n, 4, low=0, high=1)], {"dtype": TensorProto.INT32}, random=True)


@variants("Multinomial")
def multinomial(_: int) -> Iterator[Variant]:
    for attributes in ({}, {"sample_size": 4, "dtype": TensorProto.INT64}):
        yield Variant(lambda n: [draw(n, 5)], attributes, random=True)


@variants("HannWindow", "HammingWindow", "BlackmanWindow")
def window(_: int) -> Iterator[Variant]:
    for attributes in ({}, {"periodic": 0}, {"output_datatype": TensorProto.DOUBLE}):
        # onnxruntime computes the cosines in float32
        yield Variant(lambda n: [scalar(n + 5, np.int64)], attributes, rtol=1e-6, atol=1e-6)


@variants("MelWeightMatrix")
def mel_weight_matrix(_: int) -> Iterator[Variant]:
    yield Variant(
        lambda n: [scalar(n + 3, np.int64), scalar(64, np.int64), scalar(8000, np.int64),
                   scalar(100.0), scalar(3800.0)], **SUMS,
    )  # fmt: skip


@variants("DFT")
def discrete_fourier(revision: int) -> Iterator[Variant]:
    for inverse, one_sided in ((0, 0), (0, 1), (1, 0)):
        attributes = {"inverse": inverse, "onesided": one_sided}
        width = 2 if inverse else 1
        if revision == 17:
            yield Variant(lambda n, w=width: [draw(2, n + 4, w)], {**attributes, "axis": 1}, **SUMS)
        else:
            yield Variant(
                lambda n, w=width: [draw(2, n + 4, w), None, scalar(1, np.int64)], attributes,
                **SUMS,
            )  # fmt: skip
        if not one_sided:
            yield Variant(lambda n: [draw(2, n + 4, 2), scalar(6, np.int64)], attributes, **SUMS)


@variants("STFT")
def short_time_fourier(_: int) -> Iterator[Variant]:
    step, length = scalar(4, np.int64), scalar(8, np.int64)
    for one_sided in (0, 1):
        attributes = {"onesided": one_sided}
        yield Variant(lambda n: [draw(2, 8 * n, 1), step, None, length], attributes, **SUMS)
        yield Variant(lambda n: [draw(2, 8 * n, 1), step, draw(8)], attributes, **SUMS)


@variants("StringNormalizer")
def string_normalizer(_: int) -> Iterator[Variant]:
    words = np.array(["Monday", "tuesday", "Sunday", "monday", "FRIDAY"], object)
    for attributes in (
        {"case_change_action": "UPPER"}, {"case_change_action": "LOWER"},
        {"stopwords": ["monday"], "is_case_sensitive": 1},
        {"stopwords": ["monday"], "is_case_sensitive": 0, "case_change_action": "LOWER"},
    ):  # fmt: skip
        yield Variant(lambda n: [words[:n]], {"locale": "C", **attributes})


@variants("StringConcat")
def string_concat(_: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw.of(np.object_, n, 4), draw.of(np.object_, 4)])


@variants("StringSplit")
def string_split(_: int) -> Iterator[Variant]:
    texts = np.array(["a b", "a  b c", "", "a-b-", "abc"], object)
    for attributes in ({}, {"delimiter": "-"}, {"delimiter": " ", "maxsplit": 1}, {"maxsplit": 1}):
        yield Variant(lambda n: [texts[:n]], attributes, 2)


@variants("RegexFullMatch")
def regex_full_match(_: int) -> Iterator[Variant]:
    texts = np.array(["www.google.com", "a.b", "nothing", "", "www.x.com"], object)
    yield Variant(lambda n: [texts[:n]], {"pattern": r"www\.[\w.-]+\.\bcom\b"})


@variants("TfIdfVectorizer")
def tf_idf_vectorizer(_: int) -> Iterator[Variant]:
    base = {
        "min_gram_length": 1, "max_gram_length": 2, "max_skip_count": 1,
        "ngram_counts": [0, 4], "ngram_indexes": [0, 1, 2, 3, 4, 5, 6],
        "pool_int64s": [2, 3, 5, 4, 5, 6, 7, 8, 6, 7],
    }  # fmt: skip
    for mode in ("TF", "IDF", "TFIDF"):
        weights = {} if mode == "TF" else {"weights": [0.5, 1.0, 2.0, 1.5, 0.1, 3.0, 2.5]}
        yield Variant(
            lambda n: [draw.ints(2, 3 * n, low=2, high=9)], {**base, "mode": mode, **weights},
            rtol=1e-6,
        )  # fmt: skip


@variants("ImageDecoder")
def image_decoder(_: int) -> Iterator[Variant]:
    yield Variant(lambda n: [np.zeros(n, np.uint8)])  # onnxruntime has no kernel
