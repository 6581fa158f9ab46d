"""QOperator files, made by onnxruntime's tool and by hand, lifted to QDQ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import QuantFormat, QuantType

import qwrap

U8, S8 = QuantType.QUInt8, QuantType.QInt8
KINDS = {
    "u8s8": {"activation_type": U8, "weight_type": S8},
    "s8s8 per channel": {"activation_type": S8, "weight_type": S8, "per_channel": True},
    "u8u8": {"activation_type": U8, "weight_type": U8},
}


def optimised(small: Any, path: Path) -> Counter[str]:
    """Operators of what onnxruntime runs; int8 may have become uint8."""
    small.session(path, path.with_suffix(".optimised.onnx"))
    return small.operators(onnx.load(path.with_suffix(".optimised.onnx")).graph)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lifted_network_is_fused_as_one_that_was_made_as_qdq(
    network: onnx.ModelProto, by_onnxruntime: Callable, imported: Any, small: Any, kind: str
) -> None:
    expected = optimised(small, by_onnxruntime(network, **KINDS[kind]))
    path = by_onnxruntime(network, quant_format=QuantFormat.QOperator, **KINDS[kind])
    model = qwrap.load(path, lift=True).eval()
    assert not model.plan.notes
    lifted = path.with_suffix(".lifted.onnx")
    qwrap.export(model, lifted)
    operators = {node.op_type for node in onnx.load(lifted).graph.node}
    assert not [op for op in operators if op.startswith("Q") and op != "QuantizeLinear"]
    assert optimised(small, lifted) == expected
    report = qwrap.verify(model, lifted, small.batches(), progress=False)
    assert report.specification.differing == report.deployed.differing == 0
    x = small.batches(1)[0]
    (before,) = small.run(path, x)
    for after in (*small.run(lifted, x), *imported.literal(lifted, x)):
        assert np.abs(after - before).max() <= 1.01 / 256  # a code of Softmax


# name -> nodes between codes a and c, float inputs and outputs, and how far codes may move
QGEMM = "c = com.microsoft.QGemm{}(a, s, z, w, t, u, b, r, q)"
OPERATORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "QLinearConv": ("c = QLinearConv<pads=[1,1,1,1]>(a, s, z, k, t5, u5, r, q, b)", (2, 3, 8, 8)),
    "QLinearMatMul": ("c = QLinearMatMul(a, s, z, w, t, u, r, q)", (2, 6, 4)),
    "QLinearMatMul, per row": ("c = QLinearMatMul(a, s, z, w, t5, u5, r, q)", (2, 6, 4)),
    "QGemm": (QGEMM.format(""), (2, 4)),
    "QGemm, transposed": (QGEMM.format("<transB=1>").replace("w, t, u", "wt, t5, u5"), (2, 4)),
    "QGemm, scaled": (QGEMM.format("<alpha=0.5>"), (2, 4)),
    "QLinearAdd": ("c = com.microsoft.QLinearAdd(a, s, z, a, s, z, r, q)", (2, 9)),
    "QLinearMul": ("c = com.microsoft.QLinearMul(a, s, z, a, s, z, r, q)", (2, 9)),
    "QLinearConcat": ("c = com.microsoft.QLinearConcat<axis=1>(r, q, a, s, z, a, s, z)", (2, 9)),
    "QLinearSigmoid": ("c = com.microsoft.QLinearSigmoid(a, s, z, r, q)", (2, 9)),
    "QLinearLeakyRelu": ("c = com.microsoft.QLinearLeakyRelu<alpha=0.3>(a, s, z, r, q)", (2, 9)),
    "QLinearSoftmax": ("c = com.microsoft.QLinearSoftmax<opset=13>(a, s, z, h, zero)", (2, 9)),
    "QLinearWhere": (
        "n = Less(x, r) c = com.microsoft.QLinearWhere(n, a, s, z, a, s, z, r, q)",
        (2, 9),
    ),
    "QLinearGlobalAveragePool": (
        "c = com.microsoft.QLinearGlobalAveragePool(a, s, z, r, q)",
        (2, 3, 8, 8),
    ),
    "QLinearAveragePool": (
        "c = com.microsoft.QLinearAveragePool<kernel_shape=[2,2]>(a, s, z, r, q)",
        (2, 3, 8, 8),
    ),
    "codes are moved": (
        "m = MaxPool<kernel_shape=[2,2]>(a) n = Reshape(m, flat) "
        "c = com.microsoft.QLinearSigmoid(n, s, z, r, q)",
        (2, 3, 8, 8),
    ),
}


def by_hand(small: Any, text: str, shape: tuple[int, ...], opset: int = 13) -> onnx.ModelProto:
    """Quantize the input, compute on codes, make reals of the result."""
    rng = np.random.default_rng(6)
    f32, i8 = np.float32, np.int8
    every = {
        "s": f32(0.03),
        "z": np.uint8(120),
        "r": f32(0.05),
        "q": np.uint8(90),
        "u": i8(0),
        "t": f32(0.004),
        "t5": np.linspace(0.002, 0.008, 5, dtype=f32),
        "u5": np.zeros(5, i8),
        "w": rng.integers(-99, 99, (4, 5)).astype(i8),
        "h": f32(1 / 256),
        "zero": np.uint8(0),
        "wt": rng.integers(-99, 99, (5, 4)).astype(i8),
        "flat": np.array([0, -1]),
        "k": rng.integers(-99, 99, (5, 3, 3, 3)).astype(i8),
        "b": rng.integers(-999, 999, 5).astype(np.int32),
    }
    scale = "c, h, zero" if "Softmax" in text else "c, r, q"
    nodes = f"a = QuantizeLinear(x, s, z) {text} y = DequantizeLinear({scale})"
    graph = onnx.parser.parse_graph(f"g () => () {{{nodes}}}")
    read = {name for node in graph.node for name in node.input}
    constants = {name: np.asarray(array) for name, array in every.items() if name in read}
    rank = ",".join(map(str, shape))
    model = small.build(nodes, constants, f"float[{rank}] x", "float y", opset)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.opset_import.add(domain="com.microsoft", version=1)
    return model


@pytest.mark.parametrize("opset", [12, 13, 21])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_on_codes_is_lifted_to_reals(
    small: Any, imported: Any, tmp_path: Path, name: str, opset: int
) -> None:
    text, shape = OPERATORS[name]
    path, lifted = tmp_path / "made.onnx", tmp_path / "lifted.onnx"
    onnx.save(by_hand(small, text, shape, opset), path)
    model = qwrap.load(path, lift=True).eval()
    assert not model.plan.notes
    qwrap.export(model, lifted)
    x = small.batches(1, shape)[0]
    (literal,) = imported.literal(lifted, x)
    step = 1.01 * (1 / 256 if "Softmax" in name else 0.05)  # sums near ties, and the docstring's
    for other in (*imported.run(model, x), *imported.literal(path, x), *small.run(path, x)):
        assert np.abs(literal - other).max() <= step
        assert (np.abs(literal - other) > 1e-6).mean() < 0.02


def test_what_cannot_be_lifted_is_told(small: Any, tmp_path: Path) -> None:
    nodes = (
        "a = QuantizeLinear(x, s, z) ad = DequantizeLinear(a, s, z) "
        "c, v, o = DynamicQuantizeLinear(ad) i = ConvInteger(c, k, o) "
        "p = com.microsoft.QLinearGlobalAveragePool<channels_last=1>(c, s, z, s, z) "
        "j = Cast<to=1>(i) m = Cast<to=1>(p) n = ReduceSum<keepdims=0>(m) y = Add(j, n)"
    )
    constants = {
        "s": np.array(0.03, np.float32),
        "z": np.array(120, np.uint8),
        "k": np.ones((4, 3, 3, 3), np.int8),
    }
    model = small.build(nodes, constants)
    model.opset_import.add(domain="com.microsoft", version=1)
    onnx.save(model, tmp_path / "made.onnx")
    loaded = qwrap.load(tmp_path / "made.onnx", lift=True)
    assert [note.partition(" stays as it is: ")[2] for note in loaded.plan.notes] == [
        "its scale is computed while the model runs",
        "the scales of its codes are computed while the model runs",
        "its channels come last, as in no operator of ONNX",
    ]
