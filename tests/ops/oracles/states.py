"""Normalisations, recurrent networks, attention and losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from oracles.reductions import SUMS
from oracles.variants import Arrays, Variant, draw, i64, scalar, variants


def positive(*shape: int) -> np.ndarray:
    return draw(*shape, low=0.5, high=2.0)


@variants("BatchNormalization")
def batch_normalization(revision: int) -> Iterator[Variant]:
    def make(n: int, *dims: int) -> Arrays:
        return [draw(n, 4, *dims), draw(4), draw(4), draw(4), positive(4)]

    test = {"is_test": 1} if revision < 7 else {}
    if revision == 1:
        test["consumed_inputs"] = [0, 0, 0, 1, 1]
    for attributes in ({}, {"epsilon": 0.1, "momentum": 0.3}):
        yield Variant(lambda n: make(n, n, 2), {**test, **attributes}, **SUMS)
    yield Variant(lambda n: make(n, n), test, **SUMS)
    yield Variant(lambda n: make(n, 2, n, 2), test, **SUMS)
    if revision in (7, 9, 14, 15):
        yield Variant(lambda n: make(n), test, **SUMS)
    if revision in (6, 7):
        yield Variant(
            lambda n: [draw(n, 4, 3), *(draw(4, 3) for _ in range(3)), positive(4, 3)],
            {**test, "spatial": 0}, **SUMS,
        )  # fmt: skip
    if revision >= 14:
        yield Variant(
            lambda n: make(n, n, 2), {"training_mode": 1, "momentum": 0.7}, outputs=3, **SUMS
        )


@variants("InstanceNormalization")
def instance_normalization(_: int) -> Iterator[Variant]:
    for attributes in ({}, {"epsilon": 0.1}):
        yield Variant(lambda n: [draw(2, 4, n, 3), draw(4), draw(4)], attributes, **SUMS)
    yield Variant(lambda n: [draw(2, 4, n + 3), draw(4), draw(4)], **SUMS)


@variants("LayerNormalization")
def layer_normalization(_: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(2, n, 6), draw(6), draw(6)], {}, outputs=3, **SUMS)
    yield Variant(lambda n: [draw(2, n, 6), draw(6)], {"epsilon": 0.1}, **SUMS)
    yield Variant(lambda n: [draw(n, 4, 6), draw(4, 6), draw(4, 6)], {"axis": 1}, 3, **SUMS)
    yield Variant(lambda n: [draw(n, 4, 6), draw(4, 6), draw(4, 6)], {"axis": -2}, **SUMS)
    yield Variant(lambda n: [draw(n, 4, 6), draw(1, 6), draw(4, 1)], {"axis": 1}, **SUMS)


@variants("GroupNormalization")
def group_normalization(revision: int) -> Iterator[Variant]:
    for epsilon in (None, 0.1):
        attributes = {"num_groups": 2, "epsilon": epsilon}
        size = 2 if revision == 18 else 4
        yield Variant(lambda n, s=size: [draw(n, 4, 3, n), draw(s), draw(s)], attributes, **SUMS)


@variants("RMSNormalization")
def rms_normalization(_: int) -> Iterator[Variant]:
    yield Variant(lambda n: [draw(2, n, 6), draw(6)], **SUMS)
    yield Variant(lambda n: [draw(n, 4, 6), draw(4, 6)], {"axis": 1, "epsilon": 0.1}, **SUMS)


def recurrent(op_type: str, gates: int) -> None:
    def make(
        n: int,
        directions: int = 1,
        *,
        layout: int = 0,
        lengths: bool = False,
        bias: bool = True,
        initial: bool = False,
        peepholes: bool = False,
    ) -> Arrays:
        batch, hidden, width = 3, 4, 5
        x = draw(batch, n + 2, width) if layout else draw(n + 2, batch, width)
        state = (batch, directions, hidden) if layout else (directions, batch, hidden)
        is_lstm = op_type == "LSTM"
        inputs: Arrays = [
            x,
            draw(directions, gates * hidden, width, low=-0.5, high=0.5),
            draw(directions, gates * hidden, hidden, low=-0.5, high=0.5),
            draw(directions, 2 * gates * hidden) if bias else None,
            np.array([n + 2, 2, 1], np.int32) if lengths else None,
            draw(*state) if initial else None,
            draw(*state) if initial and is_lstm else None,
            draw(directions, 3 * hidden) if peepholes else None,
        ]
        while inputs[-1] is None:
            inputs.pop()
        return inputs

    activations = {
        "RNN": ["Relu"], "GRU": ["HardSigmoid", "Softsign"], "LSTM": ["HardSigmoid", "Relu", "Tanh"]
    }[op_type]  # fmt: skip
    own = {"LSTM": {"input_forget": 1}, "GRU": {"linear_before_reset": 1}, "RNN": {}}[op_type]

    @variants(op_type)
    def generate(revision: int) -> Iterator[Variant]:
        count = 3 if op_type == "LSTM" else 2
        size: dict[str, Any] = {"hidden_size": 4}

        def variant(attributes: dict[str, Any], **inputs: Any) -> Variant:
            directions = 2 if attributes.get("direction") == "bidirectional" else 1
            return Variant(
                lambda n: make(n, directions, **inputs), {**size, **attributes}, count,
                **SUMS,
            )  # fmt: skip

        for direction in ("forward", "reverse", "bidirectional"):
            yield variant({"direction": direction})
            yield variant({"direction": direction}, lengths=True, initial=True)
        yield variant({}, bias=False)
        yield variant({"clip": 0.6})
        yield variant({"activations": activations})
        yield variant({"activations": activations * 2, "direction": "bidirectional"})
        if own and not (op_type == "GRU" and revision == 1):  # GRU-1 had no linear_before_reset
            yield variant(own, initial=True)
        if op_type == "LSTM":
            yield variant({}, peepholes=True)
            yield variant({"input_forget": 1, "clip": 1.5}, peepholes=True, initial=True)
        if revision >= 14:
            yield variant({"layout": 1}, layout=1, initial=True)
        if revision >= 7:  # before, all outputs but the first had to be there
            yield Variant(make, size, **SUMS)


for name, count in (("RNN", 1), ("GRU", 3), ("LSTM", 4)):
    recurrent(name, count)


@variants("RotaryEmbedding")
def rotary_embedding(_: int) -> Iterator[Variant]:
    for interleaved in (0, 1):
        attributes = {"interleaved": interleaved}
        yield Variant(
            lambda n: [draw(2, 3, n, 8), draw(20, 4), draw(20, 4), draw.ints(2, n, low=0, high=20)],
            attributes, **SUMS,
        )  # fmt: skip
        yield Variant(
            lambda n: [draw(2, n, 24), draw(20, 4), draw(20, 4), draw.ints(2, n, low=0, high=20)],
            {**attributes, "num_heads": 3}, **SUMS,
        )  # fmt: skip
        yield Variant(
            lambda n: [draw(2, 3, n, 8), draw(9, 2), draw(9, 2), draw.ints(2, n, low=0, high=9)],
            {**attributes, "rotary_embedding_dim": 4}, **SUMS,
        )  # fmt: skip
        yield Variant(
            lambda n: [draw(2, 3, n, 8), draw(2, n, 4), draw(2, n, 4)], attributes, **SUMS
        )


@variants("Attention")
def attention(_: int) -> Iterator[Variant]:
    def make(n: int, *more: np.ndarray | None, kv: int = 4) -> Arrays:
        return [draw(2, 4, n, 8), draw(2, kv, 6, 8), draw(2, kv, 6, 8), *more]

    for attributes in (
        {}, {"is_causal": 1}, {"scale": 0.2}, {"softcap": 2.0}, {"softmax_precision": 1},
    ):  # fmt: skip
        yield Variant(make, attributes, **SUMS)
    yield Variant(lambda n: make(n, kv=2), **SUMS)
    yield Variant(lambda n: make(n, draw(n, 6)), **SUMS)
    yield Variant(lambda n: make(n, draw.of(np.bool_, n, 6) | (np.arange(6) < 1)), **SUMS)
    yield Variant(lambda n: make(n, draw(2, 4, n, 6)), {"is_causal": 1}, **SUMS)
    yield Variant(
        lambda n: make(n, draw(n, 9), draw(2, 4, 3, 8), draw(2, 4, 3, 8)), outputs=3, **SUMS
    )
    yield Variant(
        lambda n: make(n, None, draw(2, 4, 3, 8), draw(2, 4, 3, 8)), {"is_causal": 1}, 3, **SUMS
    )
    for mode in (0, 1, 2, 3):
        yield Variant(
            lambda n: make(n, draw(n, 6)),
            {"qk_matmul_output_mode": mode, "softcap": 2.0},
            4,
            **SUMS,
        )
    yield Variant(
        lambda n: [draw(2, n, 32), draw(2, 6, 16), draw(2, 6, 16)],
        {"q_num_heads": 4, "kv_num_heads": 2}, **SUMS,
    )  # fmt: skip


def losses(op_type: str, make_scores: Any) -> None:
    @variants(op_type)
    def generate(_: int) -> Iterator[Variant]:
        outputs = 2 if op_type == "SoftmaxCrossEntropyLoss" else 1

        def make(n: int, *dims: int, weighted: bool = False) -> Arrays:
            labels = draw.ints(n, *dims, low=0, high=5)
            return [make_scores(n, 5, *dims), labels, *([positive(5)] if weighted else [])]

        for reduction in ("none", "sum", "mean"):
            for weighted in (False, True):
                for dims in ((), (2,), (2, 3)):
                    for ignore in (None, 2):
                        attributes = {"reduction": reduction, "ignore_index": ignore}
                        yield Variant(
                            lambda n, d=dims, w=weighted: make(n, *d, weighted=w),
                            attributes, outputs, **SUMS,
                        )  # fmt: skip


losses("SoftmaxCrossEntropyLoss", lambda *shape: draw(*shape))
losses("NegativeLogLikelihoodLoss", lambda *shape: draw(*shape, low=-3, high=-0.1))


@variants("NonMaxSuppression")
def non_max_suppression(_: int) -> Iterator[Variant]:
    def boxes(n: int) -> np.ndarray:
        corners = draw(2, 4 * n, 2, low=0, high=3)
        return np.concatenate([corners, corners + draw(2, 4 * n, 2, low=1, high=3)], 2)

    def make(n: int, *more: np.ndarray) -> Arrays:
        return [boxes(n), draw.distinct(2, 3, 4 * n) / np.float32(99), *more]

    yield Variant(make)
    yield Variant(lambda n: make(n, i64(4)))
    yield Variant(lambda n: make(n, i64(9), np.array([0.3], np.float32)))
    yield Variant(
        lambda n: make(n, i64(9), np.array([0.3], np.float32), np.array([0.1], np.float32))
    )
    yield Variant(lambda n: make(n, i64(9), np.array([0.2], np.float32)), {"center_point_box": 1})
    yield Variant(lambda n: make(n, scalar(4, np.int64), scalar(0.3)))
