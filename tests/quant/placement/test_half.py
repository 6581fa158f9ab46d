"""Which nodes of a region compute in float16, and why the others do not."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from onnx import helper

import qwrap
from qwrap.quant.placement.half import problem_of
from qwrap.quant.plan import HalfPlan


def plan_of(source: onnx.ModelProto, *selectors: str, **settings: object) -> qwrap.QuantPlan:
    config = qwrap.QConfig(**settings)
    config.set(list(selectors), activation="float16")
    model = qwrap.load(source)
    return qwrap.prepare(model, config)


def test_the_nodes_of_a_region_are_in_float16_and_the_summary_says_so(small) -> None:
    plan = plan_of(small.convs(), "/a", "/b", scope="kernels")
    assert plan.half == {
        "/a": HalfPlan(inputs=(0, 1, 2), outputs=(0,)),
        "/b": HalfPlan(inputs=(0,), outputs=(0,)),
    }
    assert [plan.nodes[key].dtype for key in ("/a", "/b", "/y")] == ["float16", "float16", "uint8"]
    assert "float16:   Conv 1, Relu 1" in plan.summary()
    assert "float:" not in plan.summary()
    assert plan.to_dict()["half"]["/b"] == {"inputs": (0,), "outputs": (0,)}


def test_later_words_take_nodes_out_of_an_island(small) -> None:
    config = qwrap.QConfig(scope="kernels")
    config.set("*", activation="float16")
    config.set("/y", activation="uint8")
    plan = qwrap.prepare(qwrap.load(small.convs()), config)
    assert set(plan.half) == {"/a", "/b"}
    assert plan.nodes["/y"].role == "integer"


CASES = [
    ("y = Max(x, x)", 6, "/y", None),
    ("y = Celu(x)", 13, "/y", "Celu has no float16 at opset 13"),
    ("y = Mod<fmod=1>(x, x)", 13, "/y", None),
    ("s = Size(x) f = Cast<to=1>(s) r = Sqrt(f) y = Mul(x, r)", 13, "/r", "computes with shapes"),
    ("s = Size(x) f = Cast<to=1>(s) r = Sqrt(f) y = Mul(x, r)", 13, "/y", None),
    ("q = SequenceConstruct(x, x) y = ConcatFromSequence<axis=1>(q)", 13, "/y", "a sequence"),
    ("y = com.microsoft.Gelu(x)", 13, "/y", None),
    ("y = Add(x, tiny)", 13, "/y", "constant 'tiny' is too small for float16: 100%"),
    ("y = Add(x, small)", 13, "/y", None),
    (
        "y = Mul(x, large)",
        13,
        "/y",
        r"constant 'large' has values up to 3.4e\+38, and float16 ends",
    ),
    ("y = Mul(x, infinite)", 13, "/y", None),
    ("d = Shape(x) c = ConstantOfShape(d) y = Add(x, c)", 13, "/c", "computes with shapes"),
]
NUMBERS = {"tiny": 1e-12, "small": 1e-5, "large": -3.4e38, "infinite": -np.inf}


@pytest.mark.parametrize(("nodes", "opset", "node", "reason"), CASES)
def test_a_node_that_cannot_stays_float32_and_says_why(small, nodes, opset, node, reason) -> None:
    weights = {k: np.array(v, np.float32) for k, v in NUMBERS.items() if k in nodes}
    text = nodes.replace("com.microsoft.", "")
    source = small.build(text, weights, outputs="float[N,M,H,W] y", opset=opset)
    if "com.microsoft" in nodes:
        source.graph.node[0].domain = "com.microsoft"
        source.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    plan = plan_of(source, node)
    assert (node in plan.half) == (reason is None)
    if reason is not None:
        assert plan.nodes[node].role == "float"
        assert plan.nodes[node].reason.startswith("not in float16: ")
        assert re.search(reason, plan.nodes[node].reason)


def test_nodes_without_floats_are_left_alone(small) -> None:
    source = small.build(
        "a = Cast<to=7>(x) b = Add(a, a) y = Cast<to=1>(b)", {}, outputs="float[N,M,H,W] y"
    )
    plan = plan_of(source, "*")
    assert plan.nodes["/b"].reason == "nothing of it is float32"
    assert plan.half == {"/a": HalfPlan(inputs=(0,)), "/y": HalfPlan(outputs=(0,))}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_ordinary_weights_lose_nothing_to_speak_of(scale: float) -> None:
    weights = np.random.default_rng(0).normal(0, scale, 10000).astype(np.float32)
    assert problem_of(weights) is None


def test_weights_that_become_zero_in_bulk_are_a_problem() -> None:
    weights = np.random.default_rng(0).normal(0, 1e-7, 1000).astype(np.float32)
    assert "too small for float16" in (problem_of(weights) or "")
    mixed = np.concatenate([weights, np.ones(1, np.float32)])
    assert problem_of(mixed) is None  # beside 1 they are nothing anyway


def test_what_is_float16_in_the_graph_stays_as_it_is(small) -> None:
    source = small.build("y = Tanh(x)", {}, "float16[N,3,8,8] x", "float16[N,3,8,8] y")
    plan = plan_of(source, "/y")
    assert not plan.half
    assert plan.nodes["/y"].reason == "nothing of it is float32"
