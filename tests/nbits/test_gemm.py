"""Gemm as MatMulNBits and as a pair, against float sessions with the weights that codes mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from nbits_files import Array, attributes, constants, drawn, matrix, model_of, run, table, walk
from onnx import helper

import qwrap
from qwrap.ort.report import Report

FORMS = ["operator", "qdq"]
BIASES: dict[str, Any] = {
    "none": None, "vector": (24,), "row": (1, 24), "number": (), "single": (1,), "matrix": (3, 24),
    "column": (3, 1),
}  # fmt: skip


def gemm(bias: Any, *, opset: int = 17, dynamic: bool = False, **settings: Any) -> onnx.ModelProto:
    shape = (24, 72) if settings.get("transB") else (72, 24)
    weights = {"w": drawn(*shape)}
    inputs = {"x": [72, 3] if settings.get("transA") else [3, 72]}
    names = ["x", "w"]
    if bias is not None:
        names.append("c")
        if dynamic:
            inputs["c"] = list(bias)
        else:
            weights["c"] = drawn(*bias, seed=3)
    node = helper.make_node("Gemm", names, ["y"], name="layer", **settings)
    return model_of([node], weights, inputs, ["y"], opset=opset)


def feeds_of(model: onnx.ModelProto) -> dict[str, Array]:
    return {
        i.name: drawn(*(d.dim_value for d in i.type.tensor_type.shape.dim), seed=5)
        for i in model.graph.input
    }


def with_meant_weight(source: onnx.ModelProto, made: onnx.ModelProto) -> onnx.ModelProto:
    """The source with the weight that the codes mean."""
    known, (node,) = constants(made.graph), [
        n for n in made.graph.node if n.op_type in ("MatMulNBits", "DequantizeLinear")
    ]  # fmt: skip
    settings = attributes(source.graph.node[0])
    if node.op_type == "MatMulNBits":
        meant = matrix(node, known) / settings.get("alpha", 1.0)
        meant = meant.T if settings.get("transB") else meant
    else:
        meant = table(node, known)
    result = onnx.ModelProto()
    result.CopyFrom(source)
    (stored,) = (t for t in result.graph.initializer if t.name == "w")
    stored.CopyFrom(onnx.numpy_helper.from_array(meant.astype(np.float32), "w"))
    return result


def quantized(source: onnx.ModelProto, **settings: Any) -> onnx.ModelProto:
    made = qwrap.quantize_weights(source, block_size=32, op_types=["Gemm"], **settings)
    assert made is not None
    return made


def assert_computes_its_codes(source: onnx.ModelProto, made: onnx.ModelProto) -> None:
    feeds = feeds_of(source)
    (wanted,), (got,) = run(with_meant_weight(source, made), feeds), run(made, feeds)
    assert got.shape == wanted.shape
    # Sums of 72 products of about 0.1 in another order; scales times alpha are rounded once more.
    np.testing.assert_allclose(got, wanted, atol=2e-6 * 72)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_it_computes_what_its_codes_mean(bias: str, transposed: tuple[int, int], form: Any) -> None:
    trans_a, trans_b = transposed
    source = gemm(BIASES[bias], transA=trans_a, transB=trans_b, alpha=0.5, beta=-2.0)
    made = quantized(source, form=form)
    assert_computes_its_codes(source, made)
    types = [n.op_type for n in made.graph.node]
    if form == "qdq":
        assert types == ["DequantizeLinear", "Gemm"]
    else:
        fused = ["Mul", "Add"] if bias in ("matrix", "column") else []
        assert types == ["Transpose"] * trans_a + ["MatMulNBits", *fused]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_all_bits(bits: int, symmetric: bool, form: Any) -> None:
    source = gemm((24,), transB=1)
    made = quantized(source, form=form, bits=bits, symmetric=symmetric)
    assert_computes_its_codes(source, made)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.25])
def test_what_is_added_may_be_computed(beta: float) -> None:
    source = gemm((3, 24), dynamic=True, beta=beta)
    made = quantized(source)
    assert_computes_its_codes(source, made)
    added = {0.0: [], 1.0: ["Add"], 0.25: ["Mul", "Add"]}[beta]
    assert [n.op_type for n in made.graph.node] == ["MatMulNBits", *added]


def test_a_bias_that_others_read_stays_for_them() -> None:
    source = gemm((24,), beta=2.0)
    source.graph.node.append(helper.make_node("Add", ["y", "c"], ["z"]))
    source.graph.output[0].name = "z"
    made, feeds = quantized(source), feeds_of(source)
    (wanted,), (got,) = run(source, feeds), run(made, feeds)
    np.testing.assert_allclose(got, wanted, atol=0.5)  # 4 bits of 72 weights of 0.3
    assert {"c", "c_bias"} <= set(constants(made.graph))


def test_of_an_old_opset_what_is_added_is_still_broadcast() -> None:
    old, same = (gemm((3, 24), opset=opset, dynamic=True) for opset in (6, 7))
    made = quantized(old)
    assert made.opset_import[0].version >= 7
    assert_computes_its_codes(same, made)  # onnxruntime has no Gemm of opset 6


def test_a_weight_that_a_matmul_reads_too_is_stored_once() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Gemm", ["h", "w"], ["y"]),
    ]
    source = model_of(nodes, {"w": drawn(64, 64)}, {"x": [3, 64]}, ["y"])
    made = qwrap.quantize_weights(source, block_size=32, op_types=["MatMul", "Gemm"])
    assert made is not None
    assert [n.op_type for n in made.graph.node] == ["MatMulNBits"] * 2
    assert len(made.graph.initializer) == 3


def test_four_bit_floats_are_refused_with_a_reason() -> None:
    report = Report()
    with pytest.warns(qwrap.QwrapWarning, match="no weight was quantized"):
        quantized(gemm(None), form="nf4", report=report)
    assert report.nodes[0].reason == "MatMulBnb4 takes the place of MatMul only"


@pytest.mark.parametrize("settings", [{}, {"transA": 1}, {"transB": 1, "alpha": 2.0}])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_data_brings_its_outputs_closer(method: str, settings: dict[str, int]) -> None:
    source = gemm((24,), **settings)
    rng = np.random.default_rng(0)
    mixing = rng.normal(0, 1, (6, 72)) * np.linspace(0.1, 2, 72)

    def batch() -> Array:
        x = (rng.normal(0, 1, (3, 6)) @ mixing + 0.2 * rng.normal(0, 1, (3, 72))).astype(np.float32)
        return x.T.copy() if settings.get("transA") else x

    batches, unseen = [batch() for _ in range(80)], [batch() for _ in range(40)]

    def error(**chosen: Any) -> float:
        made = quantized(source, bits=3, **chosen)
        pairs = [(run(source, {"x": x})[0], run(made, {"x": x})[0]) for x in unseen]
        return sum(float(np.square(a - b).sum()) for a, b in pairs)

    assert error(method=method, batches=batches) < 0.7 * error()
    assert not [n for n in walk(source.graph) if n.op_type != "Gemm"]
