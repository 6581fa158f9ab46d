"""Pairs in any arrangement: what is simulated is what onnxruntime computes, to the bit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st

import qwrap

# Operators that round alike everywhere and keep the shape, so that nothing needs a tolerance.
STEPS = {
    "relu": "{y} = Relu({x})",
    "add": "{y} = Add({x}, {z})",
    "half": "{y} = Mul({x}, half)",
    "identity": "{y} = Identity({x})",
    "transpose": "{y} = Transpose<perm=[0,1,3,2]>({x})",
    "pool": "{y} = MaxPool<kernel_shape=[1,1]>({x})",
    "pair": "{y}c = QuantizeLinear({x}, s{p}, z{p}) {y} = DequantizeLinear({y}c, s{p}, z{p})",
    "two readers": (
        "{y}c = QuantizeLinear({x}, s{p}, z{p}) {y}d = DequantizeLinear({y}c, s{p}, z{p}) "
        "{y}e = DequantizeLinear({y}c, s{p}, z{p}) {y}f = Neg({y}e) {y} = Add({y}d, {y}f)"
    ),
    "moved codes": (
        "{y}c = QuantizeLinear({x}, s{p}, z{p}) {y}m = Transpose<perm=[0,1,3,2]>({y}c) "
        "{y} = DequantizeLinear({y}m, s{p}, z{p})"
    ),
    "converted": (
        "{y}c = QuantizeLinear({x}, s{p}, z{p}) {y}d = DequantizeLinear({y}c, s{p}, z{p}) "
        "{y}e = QuantizeLinear({y}d, s3, z3) {y} = DequantizeLinear({y}e, s3, z3)"
    ),
    "converted for one of two": (
        "{y}c = QuantizeLinear({x}, s{p}, z{p}) {y}d = DequantizeLinear({y}c, s{p}, z{p}) "
        "{y}e = QuantizeLinear({y}d, s2, z2) {y}f = DequantizeLinear({y}e, s2, z2) "
        "{y} = Add({y}d, {y}f)"
    ),
    "a constant": "{y}d = DequantizeLinear(w, s{p}, zw) {y} = Mul({x}, {y}d)",
}
CONSTANTS = {
    "s0": np.float32(0.03),
    "z0": np.uint8(120),
    "s1": np.float32(0.03),
    "z1": np.uint8(120),
    "s2": np.float32(0.07),
    "z2": np.int8(-3),
    "s3": np.float32(0.05),
    "z3": np.uint8(90),
    "half": np.float32(0.5),
    "zw": np.int8(0),
    "w": np.arange(-8, 8, dtype=np.int8).reshape(1, 1, 4, 4),
}
step = st.tuples(st.sampled_from(sorted(STEPS)), *[st.integers(0, 20)] * 3)


def build(small: Any, steps: list[tuple[str, int, int, int]]) -> onnx.ModelProto:
    values, text, used = ["x"], "", set()
    for number, (name, first, second, parameters) in enumerate(steps):
        x, z = (values[index % len(values)] for index in (first, second))
        text += STEPS[name].format(x=x, y=f"v{number}", z=z, p=parameters % 4) + " "
        used |= {x, z} if name == "add" else {x}
        values.append(f"v{number}")
    graph = onnx.parser.parse_graph(f"g () => () {{{text}}}")
    read = {name for node in graph.node for name in node.input}
    constants = {name: np.asarray(array) for name, array in CONSTANTS.items() if name in read}
    ends = [f"float[2,3,4,4] {v}" for v in values[1:] if v not in used or v == values[-1]]
    return small.build(text, constants, "float[2,3,4,4] x", ", ".join(ends))


@settings(max_examples=20, deadline=None)
@given(steps=st.lists(step, min_size=1, max_size=9))
def test_any_arrangement_is_simulated_trained_and_written(
    small: Any, imported: Any, steps: list[tuple[str, int, int, int]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, trained = Path(folder) / "made.onnx", Path(folder) / "trained.onnx"
        onnx.save(build(small, steps), path)
        model = imported.load(path, config=imported.learning())
        x = small.batches(1, (2, 3, 4, 4))[0]
        same(imported.run(model, x), imported.literal(path, x))
        if model.plan is None:
            return
        assert all("converts what was converted already" in note for note in model.plan.notes)
        imported.train(model, x)
        qwrap.export(model, trained)
        same(imported.run(model, x), imported.literal(trained, x))


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert np.array_equal(mine, other)
