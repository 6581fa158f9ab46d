"""Channels that are found divisible can be divided by anything, and nothing changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qwrap.graph.constants import Constants
from qwrap.graph.divisible import Divisible, divide_classes
from qwrap.graph.passing import find_divisible

IMAGE = {"w": (8, 3, 3, 3), "b": (8,), "v": (4, 8, 1, 1)}
FIRST, LAST = "h = Conv(x, w, b)", "y = Conv(r, v)"
FOUR = {"w": (8, 3, 3, 3), "b": (8,), "v": (4, 2, 1, 1)}
ROWS = {"w": (3, 8), "v": (8, 5)}
IN, OUT, ROW_IN, ROW_OUT = "float[N,3,8,8] x", "float[N,M,H,W] y", "float[N,3] x", "float[N,M] y"


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def image(between: str, weights: Mapping[str, Any] | None = None, last: str = LAST) -> tuple:
    return f"{FIRST} {between} {last}", {**IMAGE, **(weights or {})}, IN, OUT


WAYS: dict[str, tuple[Any, ...]] = {  # nodes, weights, input, output
    **{
        name: image(f"r = {name}(h)")
        for name in ("Relu", "Identity", "Abs", "Neg", "LeakyRelu<alpha=0.3>", "Dropout")
    },
    "PRelu": image("r = PRelu(h, s)", {"s": (8, 1, 1)}),
    "Clip from 0": image("r = Clip(h, zero)", {"zero": np.float32(0)}),
    "max pool": image("r = MaxPool<kernel_shape=[2,2],pads=[1,1,1,1]>(h)"),
    "average pool": image("r = AveragePool<kernel_shape=[2,2],pads=[1,1,0,0]>(h)"),
    "average with pads": image(
        "r = AveragePool<kernel_shape=[2,2],pads=[1,1,1,1],count_include_pad=1>(h)"
    ),
    "global pool": image("r = GlobalAveragePool(h)"),
    "mean": image("r = ReduceMean<axes=[2,3]>(h)"),
    "pad": image("r = Pad(h, p)", {"p": ints(0, 0, 1, 1, 0, 0, 1, 1)}),
    "reflect": image("r = Pad<mode=\"reflect\">(h, p)", {"p": ints(0, 0, 1, 1, 0, 0, 1, 1)}),
    "padded channels": image(
        "g = Pad(h, p) r = Slice(g, one, nine, one)",
        {"p": ints(0, 1, 0, 0, 0, 2, 0, 0), "one": ints(1), "nine": ints(9)},
    ),
    "scaled and shifted": image("g = Mul(h, m) r = Add(g, a)", {"m": (8, 1, 1), "a": (1,)}),
    "read twice": image(
        "r = Relu(h)", {"u": (4, 8, 1, 1)}, "k = Conv(r, v) l = Conv(r, u) y = Add(k, l)"
    ),
    "shuffled": image(
        "a = Reshape(h, s) t = Transpose<perm=[0,2,1,3,4]>(a) r = Reshape(t, q)",
        {"s": ints(0, 2, 4, 6, 6), "q": ints(0, 8, 6, 6)},
    ),
    "split and joined": image(
        "a, c = Split<axis=1>(h, s) d = Relu(c) r = Concat<axis=1>(d, a)", {"s": ints(3, 5)}
    ),
    "joined with the input": (
        f"i = Slice(x, z, six, two) j = Relu(i) {FIRST} r = Concat<axis=1>(h, j) {LAST}",
        {**IMAGE, "v": (4, 11, 1, 1), "z": ints(0, 0), "six": ints(6, 6), "two": ints(2, 3)},
        IN,
        OUT,
    ),
    "residual": image("g = Relu(h) k = Conv(g, u) r = Add(k, g)", {"u": (8, 8, 1, 1)}),
    "gate": image("i = Conv(x, w2) g = Sigmoid(i) r = Mul(h, g)", {"w2": (8, 3, 3, 3)}),
    "Resize": image(
        "r = Resize<mode=\"nearest\">(h, n, s)",
        {"n": np.zeros(0, np.float32), "s": np.float32([1, 1, 2, 2])},
    ),
    "depthwise": image("g = Conv<group=8>(h, d, e) r = Relu(g)", {"d": (8, 1, 3, 3), "e": (8,)}),
    "groups": (f"{FIRST} y = Conv<group=2>(h, v)", {**IMAGE, "v": (6, 4, 1, 1)}, IN, OUT),
    "transposed": image("g = ConvTranspose(h, d, e) r = Relu(g)", {"d": (8, 8, 3, 3), "e": (8,)}),
    "transposed groups": image(
        "r = ConvTranspose<group=2>(h, d, e)", {"d": (8, 3, 3, 3), "e": (6,), "v": (4, 6, 1, 1)}
    ),
    "normalised": image(
        "r = BatchNormalization(h, s, t, m, n)",
        {"s": (8,), "t": (8,), "m": (8,), "n": np.linspace(1, 2, 8, dtype=np.float32)},
    ),
    "flattened": (
        f"{FIRST} r = Relu(h) f = Flatten(r) y = Gemm<transB=1>(f, v)",
        {**IMAGE, "v": (5, 288)},
        IN,
        ROW_OUT,
    ),
    "three dimensions": (
        "h = Conv(x, w, b) r = Relu(h) y = Conv<group=2>(r, v)",
        {"w": (8, 3, 3, 3, 3), "b": (8,), "v": (4, 4, 1, 1, 1)},
        "float[N,3,4,4,4] x",
        "float[N,M,A,B,C] y",
    ),
    "one dimension": (
        "h = Conv(x, w, b) r = Relu(h) y = ConvTranspose(r, v)",
        {"w": (8, 3, 3), "b": (8,), "v": (8, 4, 3)},
        "float[N,3,9] x",
        "float[N,M,A] y",
    ),
    "Gemm": (
        "h = Gemm<transB=1,alpha=0.5,beta=3.0>(x, w, b) y = Gemm(h, v)",
        {"w": (8, 3), "b": (1,), "v": (8, 5)},
        ROW_IN,
        ROW_OUT,
    ),
    "rows": ("h = MatMul(x, w) a = Add(b, h) y = MatMul(a, v)", {**ROWS, "b": (8,)}, ROW_IN,
             ROW_OUT),
    "norm": (
        "h = LayerNormalization(x, g, b) y = MatMul(h, v)",
        {"g": (3,), "b": (3,), "v": (3, 5)},
        ROW_IN,
        ROW_OUT,
    ),
    "rows first": (
        "h = MatMul(x, w) t = Transpose(h) y = Gemm<transA=1>(t, v)", ROWS, ROW_IN, ROW_OUT,
    ),
    "heads": (
        "k = MatMul(x, w) a = Reshape(k, s) h = Transpose<perm=[0,2,1,3]>(a) m = MatMul(p, h)"
        " t = Transpose<perm=[0,2,1,3]>(m) r = Reshape(t, f) y = MatMul(r, v)",
        {**ROWS, "p": (2, 6, 6), "s": ints(0, 0, 2, 4), "f": ints(0, 0, 8)},
        "float[N,6,3] x",
        "float[N,6,M] y",
    ),
}  # fmt: skip
"""What lies between the first and the last weight."""
STAYS: dict[str, tuple[Any, ...]] = {  # and part of the reason
    "Sigmoid": (*image("r = Sigmoid(h)"), "is read by Sigmoid"),
    "ReLU6": (*image("r = Clip(h, o, s)", {"o": np.float32(0), "s": np.float32(6)}), "upper bound"),
    "output": (*image("r = Relu(h)"), "is graph output 'h'"),
    "padded with 1": (
        *image("r = Pad(h, p, o)", {"p": ints(0, 0, 1, 1, 0, 0, 1, 1), "o": np.float32(1)}),
        "padded with other numbers",
    ),
    "square": (*image("r = Mul(h, h)"), "not linear"),
    "norm": (
        *image("r = InstanceNormalization(h, s, t)", {"s": (8,), "t": (8,)}),
        "is read by InstanceNormalization",
    ),
    "shared": (
        "h = MatMul(x, w) g = Relu(h) y = MatMul(g, w)",
        {"w": (3, 3)},
        ROW_IN,
        ROW_OUT,
        "'w' of MatMul '/h' is read elsewhere too",
    ),
    "unknown": (
        *image("i = Conv(x, w2) g = Sigmoid(i) r = Add(h, g)", {"w2": (8, 3, 3, 3)}),
        "is joined with 'g'",
    ),
    "seen from inside": (
        f"""{FIRST} r = If(c) <then_branch = a () => (float[N,8,H,W] t) {{ t = Relu(h) }},
            else_branch = b () => (float[N,8,H,W] e) {{ e = Neg(h) }}> {LAST}""",
        {**IMAGE, "c": np.array(True)},
        IN,
        OUT,
        "from inside a body",
    ),
}


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: list[np.ndarray] = session.run(None, {"x": x})
    return found


def divided(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Divisible]:
    """The model with all classes divided by numbers from 0.01 to 100."""
    draft = ir.from_proto(model)
    found = find_divisible(draft)
    factors = np.exp(np.random.default_rng(0).uniform(-4.6, 4.6, found.count))
    divide_classes(Constants(draft), found, factors)
    return ir.to_proto(draft), found


def sample(inputs: str) -> np.ndarray:
    shape = [2 if n == "N" else int(n) for n in inputs[6 : inputs.index("]")].split(",")]
    return np.random.default_rng(1).normal(0, 1, shape).astype(np.float32)


@pytest.mark.parametrize("name", WAYS)
def test_dividing_changes_weights_and_not_what_is_computed(small: Any, name: str) -> None:
    nodes, weights, inputs, outputs = WAYS[name]
    model = small.build(nodes, weights, inputs, outputs, opset=17)
    other, found = divided(model)
    made = next(run_ for run_ in found.runs if run_.size)
    assert (made >= 0).all(), found.left
    before, after = run(model, sample(inputs))[0], run(other, sample(inputs))[0]
    # Each product is rounded once more; sums of a hundred products differ by some 1e-6.
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    changed = [
        a.name
        for a, b in zip(model.graph.initializer, other.graph.initializer, strict=True)
        if a.raw_data != b.raw_data
    ]
    assert len(changed) >= 2


@pytest.mark.parametrize("name", STAYS)
def test_what_must_stay_does_and_the_reason_is_told(small: Any, name: str) -> None:
    nodes, weights, inputs, outputs, reason = STAYS[name]
    outputs += ", float[N,8,I,J] h" if name == "output" else ""
    model = small.build(nodes, weights, inputs, outputs, opset=17)
    other, found = divided(model)
    assert reason in found.left[0][1]
    assert (found.runs[0] < 0).all()
    for before, after in zip(run(model, sample(inputs)), run(other, sample(inputs)), strict=True):
        assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def test_what_is_fixed_stays(small: Any) -> None:
    nodes, weights, inputs, outputs = WAYS["Relu"]
    draft = ir.from_proto(small.build(nodes, weights, inputs, outputs))
    assert find_divisible(draft).count == 8
    for value in (draft.graph.node("/r").outputs[0], draft.graph.initializers["v"]):
        found = find_divisible(draft, {value: "its range is given"})
        assert (found.count, found.left[0][1]) == (0, "its range is given")
