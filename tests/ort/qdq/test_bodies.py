"""Bodies of If, Loop and Scan in QDQ form."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from one_operator import Case, Made, make, run, sqnr
from onnx import GraphProto, ModelProto
from side_by_side import by_incumbent, by_qwrap

from qwrap.graph import graphs
from qwrap.ort.calibrate import CalibrationDataReader, create_calibrator

pytestmark = pytest.mark.ort(55, "G44", "G68")
TYPES = ["Conv", "Relu", "Add", "Mul", "Sigmoid", "MatMul", "Tanh", "Gemm"]
HEAD = (
    "h = Conv<pads=[1,1,1,1]>(x, w, b) s = ReduceSum<keepdims=0>(x) "
    "t = Constant<value = float {0.0}>() k = Greater(s, t) "
)
BRANCHES = (
    HEAD + "z = If(k) <then_branch = one () => (T[N,C,H,W] p) {"
    "c = Conv<pads=[1,1,1,1]>(h, v, d) p = Relu(c) },"
    " else_branch = two () => (T[N,C,H,W] p) { c = Sigmoid(h) p = Mul(c, h) }> y = Add(z, h)"
)
IMAGE = {"x": (2, 3, 6, 6)}
WEIGHTS: dict[str, Any] = {"w": (4, 3, 3, 3), "b": (4,), "v": (4, 4, 3, 3), "d": (4,)}
LOOP = (
    "y, q = Loop(n, , x) <body = step (int64 i, bool c, T[N,8] a) => "
    "(bool c2, T[N,8] a2, T[N,8] e) "
    "{ c2 = Identity(c) m = Gemm(a, w, b) a2 = Tanh(m) e = Add(m, a) }>"
)
SCAN = (
    "y, q = Scan<num_scan_inputs=1, body = step (T[8] a, T[8] z) => (T[8] a2, T[8] e)"
    " { m = MatMul(z, w) p = Add(m, a) a2 = Tanh(p) e = Sigmoid(p) }>(s0, x)"
)
CASES = {
    "If": Case(BRANCHES, IMAGE, {"y": 4}, WEIGHTS),
    "Loop": Case(LOOP, {"x": (2, 8)}, {"y": 2, "q": 3}, {"w": (8, 8), "b": (8,), "n": np.array(3)}),
    "Scan": Case(SCAN, {"x": (5, 8), "s0": (8,)}, {"y": 1, "q": 2}, {"w": (8, 8)}),
}


def ranges_of(made: Made) -> dict[str, tuple[Any, Any]]:
    """Ranges of all tensors, those in bodies too."""

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(made.batches)

        def get_next(self) -> Any:
            return next(self._left, None)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "float.onnx")
        onnx.save(made.model, path)
        calibrator = create_calibrator(path, TYPES)
        calibrator.collect_data(Reader())
        return {name: data.range_value for name, data in calibrator.compute_data().items()}


def quantized(case: Case, **settings: Any) -> tuple[Made, ModelProto]:
    made = make(case, 17)
    options = {"EnableSubgraph": True, **settings.pop("options", {})}
    settings = {"op_types_to_quantize": TYPES, "activation": "QUInt8", **settings}
    model = by_qwrap(made.model, ranges_of(made), options=options, **settings)
    onnx.checker.check_model(model)
    return made, model


def body(model: ModelProto, name: str) -> GraphProto:
    return next(graph for graph in graphs(model.graph) if graph.name == name)


def reads(graph: GraphProto, output: str) -> list[str]:
    return list(next(n for n in graph.node if output in n.output).input)


def near(made: Made, model: ModelProto, least: float = 28) -> None:
    for optimised in (False, True):
        for batch in made.batches:
            wanted, got = run(made.model, batch), run(model, batch, optimised)
            assert all(sqnr(a, b) > least for a, b in zip(wanted, got, strict=True)), optimised


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_bodies_are_quantized_and_right(name: str, per_channel: bool) -> None:
    """onnxruntime's tool takes the option and does nothing."""
    made, model = quantized(CASES[name], per_channel=per_channel)
    for graph in graphs(model.graph):
        types = {n.op_type for n in graph.node}
        assert "DequantizeLinear" in types or graph is model.graph
    near(made, model)
    without = by_qwrap(made.model, ranges_of(made), op_types_to_quantize=TYPES)
    inner = [n.op_type for g in list(graphs(without.graph))[1:] for n in g.node]
    assert "DequantizeLinear" not in inner
    near(made, without)
    same = by_incumbent(
        made.model,
        ranges_of(made),
        op_types_to_quantize=TYPES,
        options={"EnableSubgraph": True},
    )
    inner = [n.op_type for g in list(graphs(same.graph))[1:] for n in g.node]
    assert "DequantizeLinear" not in inner


def test_a_captured_tensor_has_one_pair_in_the_graph_that_makes_it() -> None:
    _, model = quantized(CASES["If"])
    pairs = [n.name for g in graphs(model.graph) for n in g.node if n.name.startswith("h_")]
    assert sorted(pairs) == ["h_DequantizeLinear", "h_QuantizeLinear"]
    assert reads(body(model, "two"), "c_QuantizeLinear_Output")[0] == "c"
    assert reads(body(model, "two"), "c") == ["h_DequantizeLinear_Output"]


def test_a_constant_of_the_graph_around_is_dequantized_where_it_is_read() -> None:
    _, model = quantized(CASES["If"])
    names = {n.name for n in body(model, "one").node}
    assert {"v_DequantizeLinear", "d0_DequantizeLinear"} <= names
    assert "v_quantized" in {t.name for t in model.graph.initializer}


def test_constants_of_a_body_are_quantized_there() -> None:
    nodes = BRANCHES.replace(
        "c = Conv<pads=[1,1,1,1]>(h, v, d)",
        "g = Constant<value = float[4,1,1] {1.0,2.0,3.0,-1.0}>() c = Mul(h, g)",
    )
    weights = {k: v for k, v in WEIGHTS.items() if k in "wb"}
    made, model = quantized(Case(nodes, IMAGE, {"y": 4}, weights))
    assert "g_quantized" in {t.name for t in body(model, "one").initializer}
    near(made, model)


def test_an_output_of_a_body_keeps_its_name() -> None:
    _, model = quantized(CASES["Loop"])
    step = body(model, "step")
    assert [v.name for v in step.output] == ["c2", "a2", "e"]
    assert reads(step, "e") == ["e_QuantizeLinear_Output", "e_scale", "e_zero_point"]


def test_branches_may_use_the_same_names() -> None:
    _, model = quantized(CASES["If"])
    for name in ("one", "two"):
        assert {"c_scale", "p_scale"} <= {t.name for t in body(model, name).initializer}


def test_an_excluded_node_keeps_its_bodies_and_one_in_a_body_reads_floats() -> None:
    made, model = quantized(CASES["If"], nodes_to_exclude=["/z"])
    assert {n.op_type for n in body(model, "one").node} == {"Conv", "Relu"}
    near(made, model)
    nodes = BRANCHES.replace("c = Sigmoid(h)", "u = Sigmoid(h) c = Relu(u)")
    case = Case(nodes, IMAGE, {"y": 4}, WEIGHTS)
    made, model = quantized(case, nodes_to_exclude=["/u"])
    assert reads(body(model, "two"), "u") == ["h"]
    near(made, model)


def test_bodies_in_bodies() -> None:
    inner = (
        "z = If(k) <then_branch = one () => (T[N,C,H,W] p) {"
        "r = If(k) <then_branch = three () => (T[N,C,H,W] o)"
        " { e = Conv<pads=[1,1,1,1]>(h, v, d) o = Add(e, h) },"
        " else_branch = four () => (T[N,C,H,W] o) { o = Relu(h) }> p = Add(r, h) },"
        " else_branch = two () => (T[N,C,H,W] p) { c = Sigmoid(h) p = Mul(c, h) }> y = Add(z, h)"
    )
    made, model = quantized(Case(HEAD + inner, IMAGE, {"y": 4}, WEIGHTS))
    assert reads(body(model, "three"), "e_QuantizeLinear_Output")[0] == "e"
    assert reads(body(model, "three"), "e")[0] == "h_DequantizeLinear_Output"
    near(made, model)


def test_a_branch_that_no_batch_took_keeps_its_activations(
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = "else_branch = two () => (T[N,C,H,W] r) { u = Sigmoid(h) r = Mul(u, h) }> y"
    nodes = BRANCHES[: BRANCHES.index("else_branch")] + other + " = Add(z, h)"
    made = make(Case(nodes, IMAGE, {"y": 4}, WEIGHTS), 17)
    batches = [{"x": np.abs(batch["x"])} for batch in made.batches]
    model = by_qwrap(
        made.model,
        ranges_of(Made(made.model, batches)),
        op_types_to_quantize=TYPES,
        options={"EnableSubgraph": True},
    )
    assert "QuantizeLinear" in {n.op_type for n in body(model, "one").node}
    assert [n.op_type for n in body(model, "two").node] == ["Sigmoid", "Mul"]
    assert "tensor 'u' stays float: calibration did not see it" in caplog.text
    near(Made(made.model, batches), model)


@pytest.mark.ort(273)
def test_float_constants_that_bodies_read_stay_where_bodies_do() -> None:
    made = make(CASES["If"], 17)
    model = by_qwrap(made.model, ranges_of(made), op_types_to_quantize=TYPES)
    left = {t.name for t in model.graph.initializer}
    assert {"v", "d"} <= left
    assert "w" not in left
