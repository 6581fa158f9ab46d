"""Nodes that compute in float16: in simulation, in calibration, in training."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import qwrap
from qwrap.quant.half import half_nodes
from qwrap.rounding import through_half

SHARED = os.environ.get("QWRAP_SHARED", "")


def half_model(small, *selectors: str, nodes: str | None = None, **weights: object):
    source = small.convs() if nodes is None else small.build(nodes, weights)
    config = qwrap.QConfig(scope="kernels")
    config.set(list(selectors), activation="float16")
    model = qwrap.load(source).eval()
    qwrap.prepare(model, config)
    return model


@settings(max_examples=50, deadline=None)
@given(x=arrays(np.float32, array_shapes(max_dims=3), elements=st.floats(width=32)))
def test_rounding_is_that_of_numpy(x: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(through_half(torch.from_numpy(x)).numpy(), expected)


def test_gradients_pass_in_float32_where_float16_would_lose_them() -> None:
    x = torch.tensor([1.0, 1e-3], requires_grad=True)
    (through_half(x) * 1e-9).sum().backward()
    assert x.grad.tolist() == pytest.approx([1e-9, 1e-9])


def test_a_prepared_model_computes_in_float32_until_it_is_calibrated(small) -> None:
    model = half_model(small, "/a", "/b")
    x = torch.from_numpy(small.batches()[0])
    reference = qwrap.load(small.convs())(x)
    torch.testing.assert_close(model(x), reference, rtol=0, atol=1e-5)  # another order of sums


def test_every_node_rounds_its_inputs_weights_and_output(small) -> None:
    """A plain loop over the nodes, in float64 but for the roundings."""
    nodes = "a = Mul(x, w) b = Exp(a) c = Add(b, w) y = Div(c, b)"
    model = half_model(small, "*", nodes=nodes, w=(3, 8, 8))
    x = small.batches(shape=(2, 3, 8, 8))[0]
    qwrap.calibrate(model, [x], progress=False)

    def half(v: np.ndarray) -> np.ndarray:
        return v.astype(np.float32).astype(np.float16).astype(np.float64)

    w = half(model.stored("w").detach().numpy())
    a = half(half(x) * w)
    b = half(np.exp(a))
    y = half(half(b + w) / b)
    mine = model(torch.from_numpy(x)).detach().numpy()
    # float32 within a node: now and then on the other side of an edge of float16
    assert (mine == y).mean() > 0.99
    np.testing.assert_allclose(mine, y, rtol=2**-10 * 4)


def test_weights_in_an_island_are_trained_in_float32(small) -> None:
    model = half_model(small, "/a", "/b")
    x = torch.from_numpy(small.batches()[0])
    qwrap.calibrate(model, [x], progress=False)
    weight = model.stored("w1")
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=1e-6)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    moved = (weight.detach() - before).abs()
    assert weight.dtype == torch.float32
    assert 0 < float(moved.max()) < 2**-13  # less than float16 can tell of most of them: all add up


def test_what_is_too_large_for_float16_is_returned_to_float32(small) -> None:
    nodes = "a = Tanh(x) b = Mul(a, big) c = Mul(b, b) d = Sqrt(c) y = Tanh(d)"
    model = half_model(small, "*", nodes=nodes, big=np.array(3e4, np.float32))
    x = small.batches()[0]
    qwrap.calibrate(model, [x], progress=False)
    plan = model.plan
    # c is up to 9e8: Mul makes it and Sqrt reads it.
    assert set(plan.half) == {"/a", "/b", "/y"}
    for key in ("/c", "/d"):
        assert "beyond 65504" in plan.nodes[key].reason
    reference = qwrap.load(small.build(nodes, {"big": np.array(3e4, np.float32)}))
    want = reference(torch.from_numpy(x))
    torch.testing.assert_close(model(torch.from_numpy(x)), want, rtol=0, atol=2**-9)


def test_what_was_returned_comes_back_with_another_calibration(small) -> None:
    model = half_model(small, "/a", nodes="a = Mul(x, two) y = Tanh(a)", two=np.float32([2.0]))
    x = small.batches()[0]
    qwrap.calibrate(model, [1e5 * x], progress=False)
    assert not model.plan.half
    qwrap.calibrate(model, [x], progress=False)
    assert set(model.plan.half) == {"/a"}


def test_a_state_dict_brings_the_island_along(small) -> None:
    model, other = half_model(small, "/a", "/b"), half_model(small, "/a", "/b")
    x = torch.from_numpy(small.batches()[0])
    qwrap.calibrate(model, [x], progress=False)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x), rtol=0, atol=0)
    assert [node.mode for _, node in half_nodes(other)] == ["quantize", "quantize"]


def test_preparing_again_without_the_region_leaves_nothing(small) -> None:
    model = half_model(small, "/a", "/b")
    x = torch.from_numpy(small.batches()[0])
    qwrap.calibrate(model, [x], progress=False)
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    assert not list(half_nodes(model))
    assert not model.replaced


def test_a_layer_in_float16_has_no_live_batch_normalization(small) -> None:
    nodes = (
        "a = Conv(x, w1) n = BatchNormalization(a, g, b, m, v) r = Relu(n) c = Conv(r, w2)"
        " n2 = BatchNormalization(c, g2, b2, m2, v2) y = Relu(n2)"
    )
    ones = np.ones(6, np.float32)
    norm = {"g": ones, "b": 0 * ones, "m": 0 * ones, "v": ones}
    norm |= {f"{name}2": 1.5 * value + 0.5 for name, value in norm.items()}
    norm |= {"b": ones / 3, "m": ones / 7}
    source = small.build(nodes, {"w1": (6, 3, 3, 3), "w2": (6, 6, 3, 3), **norm})
    config = qwrap.QConfig(scope="kernels", bn="live")
    config.set("/c", activation="float16")
    model = qwrap.load(source)
    plan = qwrap.prepare(model, config)
    assert set(plan.half) == {"/c"}
    assert any(
        "stays without batch normalization: it is to compute in float16" in c for c in plan.changes
    )
    x = torch.from_numpy(small.batches()[0])
    qwrap.calibrate(model, [x], progress=False)
    model.train()
    model(x).sum().backward()
    qwrap.train.fold_batch_norm(model)
    assert {key for key, _ in half_nodes(model)} == {"/c"}


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(np.square(reference).sum() / np.square(reference - other).sum()))


@pytest.mark.skipif(not SHARED, reason="needs the shared models")
def test_a_layer_of_a_transformer_in_float16_is_what_onnxruntime_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ("input_ids", "attention_mask", "token_type_ids")
    tokens = {name: np.ones((2, 16), np.int64) for name in names}
    tokens |= {"input_ids": rng.integers(0, 900, (2, 16))}
    model = qwrap.load(Path(SHARED) / "models" / "minilm_l6.onnx").eval()
    config = qwrap.QConfig(activation=None, excluded=["MatMul", "Gather"])
    config.set("m.encoder.layer.2", activation="float16")
    inputs = {key: torch.from_numpy(value) for key, value in tokens.items()}
    with torch.no_grad():
        float32 = model(**inputs).numpy()
        plan = qwrap.prepare(model, config)
        qwrap.calibrate(model, [tokens], progress=False)
        qwrap.export(model, tmp_path / "half.onnx")
        mine = model(**inputs).numpy()
    assert {"MatMul", "Softmax", "Erf"} <= {plan.nodes[key].op_type for key in plan.half}
    file = onnx.load(tmp_path / "half.onnx")
    onnx.checker.check_model(file, full_check=True)
    runtime = onnxruntime.InferenceSession(tmp_path / "half.onnx").run(None, tokens)[0]
    # Some fifty roundings of 2^-11, 66 dB each at worst, in one layer of six; onnxruntime leaves
    # most of them out.
    assert sqnr(runtime, mine) > 55
    assert 55 < sqnr(float32, mine) < 90


@pytest.mark.skipif(not SHARED, reason="needs the shared models")
def test_a_convolutional_network_with_a_stage_in_float16(tmp_path: Path) -> None:
    model = qwrap.load(Path(SHARED) / "models" / "resnet20_cifar10.onnx").eval()
    rng = np.random.default_rng(0)
    batches = [rng.normal(0, 1, (4, 3, 32, 32)).astype(np.float32) for _ in range(2)]
    convs = [key for key, node in model.graph.nodes.items() if node.op_type == "Conv"]
    config = qwrap.QConfig(scope="kernels")
    config.set(convs[9], to=convs[12], activation="float16")
    plan = qwrap.prepare(model, config)
    qwrap.calibrate(model, batches, progress=False)
    qwrap.export(model, tmp_path / "half.onnx")
    assert sum(plan.nodes[key].op_type == "Conv" for key in plan.half) == 4
    report = qwrap.verify(model, tmp_path / "half.onnx", batches, progress=False)
    assert any("float16" in note for note in report.notes)
    seen = {t.name: t for t in report.deployed.tensors}
    producers = {
        v: n
        for n, v in ((k, model.graph.key(node.outputs[0])) for k, node in model.graph.nodes.items())
    }
    before = [
        t
        for name, t in seen.items()
        if name in producers and list(model.graph.nodes).index(producers[name]) < 9
    ]
    assert before
    assert all(t.differing == 0 for t in before)
    again = qwrap.load(tmp_path / "half.onnx")
    qwrap.export(again, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "half.onnx").read_bytes()
    x = torch.from_numpy(batches[0])
    with torch.no_grad():
        mine, theirs = model(x).numpy(), again.eval()(x).numpy()
    assert sqnr(mine, theirs) > 25  # roundings that fall apart, through the layers of 8 bits behind
