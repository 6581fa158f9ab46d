"""Bodies of If, Loop and Scan, in both modes, and what they read of the graphs around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from models_of_text import batches, parse
from one_operator import name_nodes, open_session, run, sqnr
from onnx import ModelProto, numpy_helper
from quantizer_pairs import Ranges, quantize_incumbent, quantize_own

from qwrap.graph import graphs

pytestmark = pytest.mark.ort(55, 272, "G44")

BRANCHES = """
    t = Conv(x, w, b)
    r = Relu(t)
    s = ReduceMax<keepdims=0>(r)
    c = Less(limit, s)
    y = If(c) <
        then_branch = then () => (float[N,M,H,W] p) {
            u = Conv(r, v) p = Relu(u)
        },
        else_branch = other () => (float[N,M,H,W] q) {
            a = Conv(r, v) q = Add(a, bias)
        }
    >
"""
IMAGE = "float[2,3,8,8] x, float limit"
WEIGHTS = {"w": (4, 3, 3, 3), "b": (4,), "v": (4, 4, 3, 3), "bias": (4, 1, 1)}
LOOP = """
    start = MatMul(x, w)
    n = Constant<value = int64 {3}>()
    on = Constant<value = bool {1}>()
    y = Loop(n, on, start) <
        body = turn (int64 i, bool go, float[N,M] carried) => (bool again, float[N,M] next) {
            again = Identity(go)
            product = MatMul(carried, v)
            next = Tanh(product)
        }
    >
"""
SCAN = """
    last, y = Scan(zero, x) <
        num_scan_inputs = 1,
        body = step (float[8] state, float[16] row) => (float[8] new, float[8] out) {
            wide = Unsqueeze(row, axes)
            product = MatMul(wide, w)
            flat = Squeeze(product, axes)
            new = Add(flat, state)
            out = Identity(new)
        }
    >
"""
LOOP_WEIGHTS = {"w": (16, 8), "v": (8, 8)}
AXES = np.zeros(1, np.int64)


def model_of(kind: str) -> ModelProto:
    if kind == "If":
        return parse(BRANCHES, WEIGHTS, IMAGE, "float[N,M,H,W] y")
    if kind == "Loop":
        return parse(LOOP, LOOP_WEIGHTS)
    weights = {"w": (16, 8), "zero": np.zeros(8), "axes": AXES}
    return parse(SCAN, weights, outputs="float[N,M] y")


def data_of(kind: str) -> list[dict[str, np.ndarray]]:
    if kind != "If":
        return [dict(batch) for batch in batches()]
    images = batches({"x": (2, 3, 8, 8)}, count=4)
    limits = (0.0, 100.0, 0.0, 100.0)
    return [
        {**batch, "limit": np.array(limit, np.float32)}
        for batch, limit in zip(images, limits, strict=True)
    ]


HIGHEST = {
    **dict.fromkeys(("x", "row", "wide", "start", "flat", "new", "state", "y"), 4.0),
    **dict.fromkeys(("t", "u", "a", "q", "p"), 7.0),
    **dict.fromkeys(("product", "carried"), 3.0),
    "next": 1.0,
    "r": 6.0,
}
RANGES: Ranges = {
    name: (np.array(0 if name in "pr" else -high, np.float32), np.array(high, np.float32))
    for name, high in HIGHEST.items()
}


def quality(model: ModelProto, made: ModelProto, data: list[dict[str, np.ndarray]]) -> float:
    pairs = [(run(model, batch), run(made, batch)) for batch in data]
    return min(sqnr(wanted, got) for wanted, got in pairs)


def body_types(model: ModelProto) -> set[str]:
    bodies = [graph for graph in graphs(model.graph) if graph is not model.graph]
    return {node.op_type for graph in bodies for node in graph.node}


@pytest.mark.parametrize("kind", ["If", "Loop", "Scan"])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("channels", [True, False])
def test_bodies_are_quantized_and_right(kind: str, static: bool, channels: bool) -> None:
    """The incumbent, static: TypeError 'NoneType' object is not subscriptable."""
    model = model_of(kind)
    own = quantize_own(
        model, RANGES if static else None, per_channel=channels, options={"EnableSubgraph": True}
    ).model.model
    product = {"If": ("QLinearConv", "ConvInteger")}.get(kind, ("QLinearMatMul", "MatMulInteger"))
    assert product[0 if static else 1] in body_types(own)
    assert quality(model, own, data_of(kind)) > (20 if static else 25)


@pytest.mark.parametrize("kind", ["If", "Loop", "Scan"])
@pytest.mark.parametrize("static", [True, False])
def test_bodies_stay_float_by_default(kind: str, static: bool) -> None:
    """What a body reads of a graph around it is float there.

    The incumbent forgets that: 'Invalid model with unknown initializers/tensors'.
    """
    model = model_of(kind)
    own = quantize_own(model, RANGES if static else None).model.model
    assert body_types(own) == body_types(model)
    assert quality(model, own, data_of(kind)) > 20


def test_weights_are_quantized_once_in_the_graph_that_has_them() -> None:
    model = model_of("If")
    own = quantize_own(model, None, options={"EnableSubgraph": True}).model.model
    names = [tensor.name for tensor in own.graph.initializer]
    assert names.count("v_quantized") == 1
    bodies = [graph for graph in graphs(own.graph) if graph is not own.graph]
    assert not any(t.name == "v_quantized" for body in bodies for t in body.initializer)


@pytest.mark.ort(273)
def test_float_weights_are_dropped_in_bodies_too() -> None:
    model = model_of("Loop")
    (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
    body = next(a.g for a in loop.attribute if a.name == "body")
    weight = next(t for t in model.graph.initializer if t.name == "v")
    body.initializer.append(weight)
    model.graph.initializer.remove(weight)
    own = quantize_own(model, None, options={"EnableSubgraph": True}).model.model
    kept = {tensor.name for graph in graphs(own.graph) for tensor in graph.initializer}
    assert "v_quantized" in kept
    assert not {"v", "w"} & kept
    assert quality(model, own, data_of("Loop")) > 25


@pytest.mark.ort("G46")
def test_nodes_with_bodies_keep_their_domain() -> None:
    """The incumbent makes an operator of ai.onnx of them."""
    model = model_of("Loop")
    (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
    loop.op_type, loop.domain = "Repeat", "custom"
    model.opset_import.append(onnx.helper.make_opsetid("custom", 1))
    options = {"EnableSubgraph": True, "DefaultTensorType": onnx.TensorProto.FLOAT}
    own = quantize_own(model, None, options=options).model.model
    assert next(node for node in own.graph.node if node.op_type == "Repeat").domain == "custom"
    assert "MatMulInteger" in body_types(own)


def test_a_contrib_operator_that_only_a_body_has_is_imported() -> None:
    model = model_of("Scan")
    options = {"EnableSubgraph": True}
    ranges = {name: RANGES[name] for name in ("new", "state", "flat")}
    quantizer = quantize_own(model, ranges, options=options, op_types=["Add"])
    own = quantizer.model.model
    assert body_types(own) >= {"QLinearAdd"}
    assert {opset.domain for opset in own.opset_import} == {"", "com.microsoft"}
    open_session(own)


@pytest.mark.ort("G55")
def test_types_of_tensors_around_a_body_are_types(tmp_path: Path) -> None:
    """The incumbent returns whether the tensor is a weight, which is no type."""
    inner = """
        c = Constant<value = bool {1}>()
        h = Tanh(x)
        y = If(c) <
            then_branch = one () => (float[N,M] p) { p = MatMul(h, w) },
            else_branch = two () => (float[N,M] q) { q = MatMul(h, w) }
        >
    """
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> m (float[2,16] x) => (float[N,M] y) {{{inner}}}'
    )
    name_nodes(model.graph)
    weight = np.random.default_rng(0).normal(0, 0.3, (16, 8)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    own = quantize_own(model, None, options={"EnableSubgraph": True}).model.model
    assert quality(model, own, data_of("Loop")) > 30
    theirs = quantize_incumbent(model, None, tmp_path, options={"EnableSubgraph": True})
    assert body_types(theirs) == body_types(own)


def test_overrides_may_name_tensors_of_bodies() -> None:
    model = model_of("Loop")
    overrides = {"product": [{"symmetric": True}], "v": [{"reduce_range": True}]}
    options = {"EnableSubgraph": True, "TensorQuantOverrides": overrides}
    own = quantize_own(model, RANGES, options=options).model.model
    weight = next(t for t in own.graph.initializer if t.name == "v_quantized")
    assert np.abs(numpy_helper.to_array(weight)).max() <= 64


@pytest.mark.ort(256, "G3")
@pytest.mark.parametrize("static", [True, False])
def test_gemms_in_bodies_share_a_transposed_weight(static: bool) -> None:
    text = """
        s = ReduceSum<keepdims=0>(x)
        c = Less(zero, s)
        y = If(c) <
            then_branch = one () => (float[N,M] p) { p = Gemm<transB=1>(x, w, b) },
            else_branch = two () => (float[N,M] q) {
                k = Constant<value = bool {1}>()
                q = If(k) <
                    then_branch = three () => (float[N,M] d) { d = Gemm<transB=1>(x, w) },
                    else_branch = four () => (float[N,M] e) { e = MatMul(x, w) }
                >
            }
        >
    """
    zero = np.array(0, np.float32)
    model = parse(text, {"w": (16, 16), "b": (16,), "zero": zero})
    span = (np.array(-6, np.float32), np.array(6, np.float32))
    ranges = dict.fromkeys(("x", "p", "q", "d", "e"), span) if static else None
    own = quantize_own(model, ranges, per_channel=True, options={"EnableSubgraph": True})
    data = data_of("Loop")
    data += [{"x": -batch["x"]} for batch in data]
    assert quality(model, own.model.model, data) > 25
    kinds = body_types(own.model.model)
    assert kinds >= ({"QGemm", "QLinearMatMul"} if static else {"MatMulInteger"})
    assert "Gemm" not in kinds
