"""Relu and Clip go only where the codes of their output clip as they do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from one_operator import Case, make, run, sqnr
from onnx import ModelProto, helper
from side_by_side import by_incumbent, by_qwrap, observed

pytestmark = pytest.mark.ort(65, 162, 186, 187)
IMAGE = {"x": (2, 3, 8, 8)}
WEIGHTS = {"w": (4, 3, 3, 3), "v": (4, 4, 1, 1), "b": (4,)}


def types_of(model: ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def quantized(
    nodes: str, outputs: dict[str, int] | None = None, **settings: Any
) -> tuple[Any, ModelProto, Any]:
    weights = {k: v for k, v in WEIGHTS.items() if f" {k}" in nodes}
    made = make(Case(nodes, IMAGE, outputs or {"y": 4}, weights))
    ranges = observed(made.model, made.batches)
    return made, by_qwrap(made.model, ranges, **settings), ranges


def near(made: Any, model: ModelProto, least: float = 30) -> None:
    for optimised in (False, True):
        got = run(model, made.batches[0], optimised)
        assert sqnr(run(made.model, made.batches[0]), got) > least


@pytest.mark.parametrize("activation", ["QUInt8", "QInt8", "QUInt16"])
@pytest.mark.parametrize("operator", ["Relu(c)", "Clip(c, low, high)"])
def test_codes_that_end_where_it_does_replace_it(operator: str, activation: str) -> None:
    limits = "low = Constant<value = float {0.0}>() high = Constant<value = float {6.0}>() "
    nodes = f"c = Conv(x, w, b) y = {operator}"
    nodes = limits + nodes if "Clip" in operator else nodes
    made, model, _ = quantized(nodes, activation=activation)
    assert types_of(model) & {"Relu", "Clip"} == set()
    near(made, model)


@pytest.mark.ort("G8")
@pytest.mark.parametrize(
    "override",
    [
        {"symmetric": True, "quant_type": "QInt8"},
        {"rmin": np.float32(-5), "rmax": np.float32(5)},
        {"scale": np.array(0.05, np.float32), "zero_point": np.array(100, np.uint8)},
    ],
)
def test_a_relu_stays_where_an_override_lets_negatives_pass(override: dict[str, Any]) -> None:
    """onnxruntime's tool looks at the option for all tensors only."""
    options = {"TensorQuantOverrides": {"y": [override]}}
    made, model, ranges = quantized("c = Conv(x, w, b) y = Relu(c)", options=options)
    assert "Relu" in types_of(model)
    assert run(model, made.batches[0])[0].min() == 0
    near(made, model)
    wrong = by_incumbent(made.model, ranges, options=options)
    assert run(wrong, made.batches[0])[0].min() < -1


@pytest.mark.parametrize("option", ["ActivationSymmetric", "QDQKeepRemovableActivations"])
def test_options_keep_it(option: str) -> None:
    made, model, _ = quantized(
        "c = Conv(x, w, b) y = Relu(c)", options={option: True}, activation="QInt8"
    )
    assert "Relu" in types_of(model)
    near(made, model)


def test_a_clip_from_above_zero_stays() -> None:
    """The codes reach down to 0; onnxruntime's tool lets what is below 0.5 pass."""
    limits = "low = Constant<value = float {0.5}>() high = Constant<value = float {2.0}>() "
    made, model, ranges = quantized(limits + "c = Conv(x, w, b) y = Clip(c, low, high)")
    assert "Clip" in types_of(model)
    near(made, model)
    wrong = by_incumbent(made.model, ranges)
    assert run(wrong, made.batches[0])[0].min() < 0.4


def test_a_chain_of_both_goes() -> None:
    limits = "low = Constant<value = float {0.0}>() high = Constant<value = float {1.0}>() "
    made, model, _ = quantized(limits + "c = Conv(x, w, b) r = Relu(c) y = Clip(r, low, high)")
    assert types_of(model) == {"QuantizeLinear", "DequantizeLinear", "Conv"}
    near(made, model)


@pytest.mark.parametrize(
    "nodes",
    [
        "c = Conv(x, w, b) r = Relu(c) y = Add(r, c)",
        "y = Relu(x)",
        "s = Sin(x) c = Conv(s, w, b) r = Relu(s) z = Conv(r, w, b) y = Add(c, z)",
    ],
    ids=["its input is read elsewhere", "its input is not quantized", "two readers"],
)
def test_it_stays_where_its_input_is_needed(nodes: str) -> None:
    made, model, _ = quantized(nodes)
    assert "Relu" in types_of(model)
    near(made, model)


def test_it_stays_behind_a_graph_output() -> None:
    made, model, _ = quantized("c = Conv(x, w, b) y = Relu(c)", {"c": 4, "y": 4})
    assert "Relu" in types_of(model)
    near(made, model)


@pytest.mark.ort("G25")
@pytest.mark.parametrize("readers", [1, 2])
def test_it_comes_back_for_a_reader_of_floats(readers: int) -> None:
    """What an excluded node reads is the Relu's output, not what the codes would have clipped."""
    limits = "low = Constant<value = float {0.0}>() high = Constant<value = float {1.0}>() "
    other = "d = Conv(q, v) y = Add(d, e)" if readers == 2 else "y = Add(e, e)"
    nodes = f"{limits}c = Conv(x, w, b) r = Relu(c) q = Clip(r, low, high) e = Conv(q, v) {other}"
    made, model, _ = quantized(nodes, nodes_to_exclude=["/e"])
    assert {"Relu", "Clip"} <= types_of(model)
    near(made, model)


@pytest.mark.ort("G45")
@pytest.mark.parametrize("captured", ["c", "r"])
def test_it_stays_where_a_body_reads_its_input_or_output(captured: str) -> None:
    """onnxruntime's tool renames ``c`` behind the body's back: INVALID_GRAPH."""
    nodes = (
        "c = Conv(x, w, b) r = Relu(c) s = ReduceSum<keepdims=0>(x) "
        "t = Constant<value = float {0.0}>() k = Greater(s, t) "
        f"z = If(k) <then_branch = one () => (T[N,M,H,W] p) {{ p = Identity({captured}) }}, "
        f"else_branch = two () => (T[N,M,H,W] p) {{ p = Neg({captured}) }}> y = Add(r, z)"
    )
    made, model, ranges = quantized(nodes)
    assert "Relu" in types_of(model)
    near(made, model)
    wrong = by_incumbent(made.model, ranges)
    if captured == "c":
        with pytest.raises(Exception, match="input 'c' of node"):
            run(wrong, made.batches[0])


def test_an_output_that_stays_float_keeps_its_relu() -> None:
    made, model, _ = quantized(
        "c = Conv(x, w, b) y = Relu(c)", options={"OpTypesToExcludeOutputQuantization": ["Relu"]}
    )
    assert "Relu" in types_of(model)
    near(made, model)


def test_bounds_that_are_computed_stay() -> None:
    nodes = (
        "low = Constant<value = float {0.0}>() one = ReduceMax<keepdims=0>(x) high = Abs(one) "
        "c = Conv(x, w, b) y = Clip(c, low, high)"
    )
    made, model, _ = quantized(nodes)
    assert "Clip" in types_of(model)
    near(made, model)


def test_clip_of_older_opsets_has_its_bounds_as_attributes() -> None:
    case = Case(
        "c = Conv(x, w, b) y = Clip<min=0.0, max=6.0>(c)",
        IMAGE,
        {"y": 4},
        {"w": (4, 3, 3, 3), "b": (4,)},
    )
    made = make(case, 10)
    ranges = observed(made.model, made.batches)
    assert "Clip" not in types_of(by_qwrap(made.model, ranges))
    clip = next(n for n in made.model.graph.node if n.op_type == "Clip")
    clip.attribute.remove(next(a for a in clip.attribute if a.name == "min"))
    clip.attribute.append(helper.make_attribute("min", 0.5))
    assert "Clip" in types_of(by_qwrap(made.model, ranges))
