"""Tensors are seen on the way, one batch at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch

import qwrap
from qwrap.errors import InputError, ModelError

MODEL = """<ir_version: 8, opset_import: ["": 17]>
small (float[N, 2] x) => (float[N, 2] z) { y = Mul (x, x) z = Relu (y) }"""


def batches(count: int = 3) -> list[np.ndarray]:
    return [np.full((i + 1, 2), i - 1, np.float32) for i in range(count)]


def test_a_watched_tensor_is_shown_with_every_batch() -> None:
    model = qwrap.load(onnx.parser.parse_model(MODEL))
    seen: list[torch.Tensor] = []
    results = list(qwrap.observe(model, batches(), {"y": seen.append}))
    for x, y, z in zip(batches(), seen, results, strict=True):
        assert np.array_equal(y, x * x)
        assert np.array_equal(z, x * x)
        assert not z.requires_grad


def test_batches_are_read_one_by_one() -> None:
    model = qwrap.load(onnx.parser.parse_model(MODEL))
    events: list[str] = []

    def given() -> Iterator[np.ndarray]:
        for batch in batches():
            events.append("read")
            yield batch

    watchers = {"y": lambda _: events.append("shown")}
    for _ in qwrap.observe(model, given(), watchers):
        events += ["done"]
    assert events == ["read", "shown", "done"] * 3


def test_a_tensor_in_a_loop_is_shown_in_every_iteration() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    looping (float[2] x) => (float[2] y) {
      n = Constant <value_int = 3> ()  c = Constant <value = bool[1] {1}> ()
      t = Squeeze (c)
      y = Loop (n, t, x) <body = b (int64 i, bool go, float[2] a) => (bool more, float[2] s)
        { more = Identity (go)  s = Add (a, a) }>
    }"""
    model = qwrap.load(onnx.parser.parse_model(text))
    seen: list[float] = []
    watchers = {"s": lambda s: seen.append(s[0].item())}
    list(qwrap.observe(model, [np.ones(2, np.float32)], watchers))
    assert seen == [2, 4, 8]


def test_an_unknown_tensor_is_refused() -> None:
    model = qwrap.load(onnx.parser.parse_model(MODEL))
    with pytest.raises(ModelError, match=r"no tensors \['w'\]"):
        next(qwrap.observe(model, batches(), {"w": print}))


def test_infinite_inputs_are_refused_unless_wanted() -> None:
    model = qwrap.load(onnx.parser.parse_model(MODEL))
    bad = [np.array([[np.inf, np.nan]], np.float32)]
    with pytest.raises(InputError, match="batch 0: input 'x': 2 of 2 values are NaN or infinite"):
        next(qwrap.observe(model, bad, {}))
    assert next(qwrap.observe(model, bad, {}, finite=False))[0, 0] == np.inf


def test_text_and_sequences_are_inputs_too() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    other (string[N] t, seq(float[M]) s) => (string[N] u, float[K] y) {
      u = Identity (t)  y = ConcatFromSequence <axis = 0> (s)
    }"""
    model = qwrap.load(onnx.parser.parse_model(text))
    batch = {"t": np.array(["a", "b"], object), "s": [np.ones(1, np.float32), torch.zeros(2)]}
    words, joined = next(qwrap.observe(model, [batch], {}))
    assert list(words) == ["a", "b"]
    assert joined.tolist() == [1, 0, 0]
