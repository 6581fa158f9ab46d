"""Layers that are to stay float between quantized tensors, and do so in onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

import qwrap


def asked_by_region() -> qwrap.QConfig:
    config = qwrap.QConfig(scope="kernels")
    config.set(["/c", "/d"], activation="float32")
    return config


def excluded() -> qwrap.QConfig:
    return qwrap.QConfig(scope="kernels", excluded=["/c", "/d"])


def three_convs(small, act: str = "Relu") -> onnx.ModelProto:
    nodes = (
        "a = Conv<pads=[1,1,1,1]>(x, w1, b1) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, w2, b2)"
        f" d = {act}(c) e = Conv<pads=[1,1,1,1]>(d, w3, b3) y = Relu(e)"
    )
    weights = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (6, 6, 3, 3), "b2": (6,)}
    return small.build(nodes, {**weights, "w3": (4, 6, 3, 3), "b3": (4,)})


@pytest.mark.parametrize("config", [asked_by_region, excluded])
@pytest.mark.parametrize("act", ["Relu", "Identity", "LeakyRelu", "Tanh"])
def test_a_float_convolution_between_codes_stays_float(small, quantized, config, act) -> None:
    result = quantized(three_convs(small, act), config=config())
    operators = result.operators()
    assert operators["QLinearConv"] == 2
    assert operators["FusedConv"] + operators["Conv"] == 1
    assert result.model.plan.nodes["/c"].role == "float"
    deployed = {t.name: t for t in result.verify().deployed.tensors}
    assert deployed["b"].differing == 0
    # a float convolution in torch and in onnxruntime: 1e-6 apart, so next to no code differs
    assert deployed["d"].differing <= 1e-3 * deployed["d"].elements


def test_a_float_gemm_between_codes_stays_float(small, quantized) -> None:
    nodes = "a = Gemm(x, w1) b = Relu(a) c = Gemm(b, w2) d = Relu(c) y = Gemm(d, w3)"
    source = small.build(
        nodes,
        {"w1": (8, 8), "w2": (8, 8), "w3": (8, 4)},
        inputs="float[N,8] x",
        outputs="float[N,4] y",
    )
    config = qwrap.QConfig(scope="all")
    config.set(["/c", "/d"], activation="float32")
    result = quantized(source, small.batches(shape=(32, 8)), config)
    assert result.operators()["QGemm"] == 2
    assert result.operators()["Gemm"] + result.operators()["FusedGemm"] == 1
    deployed = {t.name: t.differing for t in result.verify().deployed.tensors}
    assert deployed["b"] == 0
    assert deployed["d"] <= 1


def test_the_node_in_front_changes_nothing(small, quantized) -> None:
    """Not even of codes that stand for infinities: there are none; and it is in the file once."""
    result = quantized(three_convs(small), config=asked_by_region())
    found = [n for n in result.file().graph.node if n.op_type == "Max"]
    assert [n.input[0] for n in found] == ["b_DequantizeLinear_Output"]
    x = result.batches[0]
    with torch.no_grad():
        mine = result.model(torch.from_numpy(x)).numpy()
    (theirs,) = small.run(result.path, x)
    np.testing.assert_allclose(theirs, mine, atol=1e-5)
