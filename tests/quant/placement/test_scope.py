"""How much of a model is quantized: what gets faster, what has kernels, or everything."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import qwrap
from qwrap.errors import ConfigError

SMALL = "a = Conv<pads=[1,1,1,1]>(x, w) b = Sin(a) y = Conv<pads=[1,1,1,1]>(b, w)"
WEIGHTS = {"w": (3, 3, 3, 3)}
LARGE = "a = MatMul(x, w) b = Tanh(a) y = MatMul(b, w)"  # 6.7e7 products in each layer


def roles(source: onnx.ModelProto, *regions: tuple, **settings: object) -> dict[str, str]:
    config = qwrap.QConfig(**settings)
    for selector, words in regions:
        config.set(selector, **words)
    plan = qwrap.prepare(qwrap.load(source), config)
    return {key: node.role for key, node in plan.nodes.items()}


@pytest.fixture
def large(small) -> onnx.ModelProto:
    return small.build(LARGE, {"w": (512, 512)}, "float[256,512] x", "float[256,512] y")


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("faster", ["float", "float", "float"]),
        ("kernels", ["integer", "float", "integer"]),
        ("all", ["integer", "pairs", "integer"]),
        (None, ["float", "float", "float"]),
    ],
)
def test_what_is_quantized_of_a_small_model(small, scope: str | None, expected: list[str]) -> None:
    assert [*roles(small.build(SMALL, WEIGHTS), scope=scope).values()] == expected


@pytest.mark.parametrize(
    ("scope", "between"), [("faster", "float"), ("kernels", "float"), ("all", "pairs")]
)
def test_what_gets_faster_is_quantized_in_every_scope(
    large: onnx.ModelProto, scope: str, between: str
) -> None:
    assert roles(large, scope=scope) == {"/a": "integer", "/b": between, "/y": "integer"}


def test_where_regions_are_all_a_user_can_want_all_is_quantized(small) -> None:
    found = roles(small.build(SMALL, WEIGHTS), ("/a", {"activation": "uint16"}))
    assert "float" not in found.values()


def test_where_integer_kernels_save_time_regions_change_nothing_beside_them(
    large: onnx.ModelProto,
) -> None:
    found = roles(large, ("/y", {"activation": "uint16"}))
    assert found["/b"] == "float"
    assert found["/a"] == "integer"


def test_where_integers_save_nothing_in_a_model_of_some_size_the_rest_stays_float(small) -> None:
    nodes = "a = Sin(x) b = Pow(a, two) c = Mul(b, x) y = Tanh(c)"  # as in a normalization
    source = small.build(
        nodes, {"two": np.array(2, np.float32)}, "float[256,512] x", "float[256,512] y"
    )
    found = roles(source, ("/c", {"activation": "uint16"}))
    assert found == {"/a": "float", "/b": "float", "/c": "pairs", "/y": "float"}


def test_a_region_of_weights_alone_does_not_quantize_the_rest(small) -> None:
    region = "/a", {"activation": "float32", "weight": "int4"}
    assert roles(small.build(SMALL, WEIGHTS), region)["/y"] == "float"


@pytest.mark.parametrize("scope", ["faster", "kernels"])
def test_a_stated_scope_holds_where_there_are_regions(small, scope: str) -> None:
    found = roles(small.build(SMALL, WEIGHTS), ("/a", {"activation": "uint8"}), scope=scope)
    assert found["/b"] == "float"
    assert found["/y"] == ("float" if scope == "faster" else "integer")


def test_all_of_a_model_stands_between_pairs(small, quantized) -> None:
    made = quantized(small.build(SMALL, WEIGHTS), config=qwrap.QConfig(scope="all"))
    assert made.model.plan.tensors.keys() == {"x", "a", "b", "y"}
    assert made.verify().deployed.differing == 0


def test_what_the_user_excludes_stays_float_in_every_scope(small) -> None:
    found = roles(small.build(SMALL, WEIGHTS), scope="all", excluded=["Sin"])
    assert found["/b"] == "float"


def test_integers_and_shapes_are_not_quantized(small) -> None:
    nodes = "a = Conv(x, w) s = Shape(a) b = Reshape(a, s) y = Sin(b)"
    found = roles(small.build(nodes, WEIGHTS), scope="all")
    assert found == {"/a": "integer", "/s": "float", "/b": "moves", "/y": "pairs"}


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ConfigError, match="scope='some': choose one of"):
        qwrap.QConfig(scope="some")


def test_sequences_are_no_tensors_to_quantize(small) -> None:
    nodes = "a = MatMul(x, w) r = Relu(a) s = SequenceConstruct(r, a) e = SequenceAt(s, first) "
    source = small.build(
        nodes + "y = MatMul(e, v)",
        {"w": (48, 32), "v": (32, 8), "first": np.array(0)},
        "float[N,48] x",
        "float[N,8] y",
    )
    model = qwrap.load(source)
    plan = qwrap.prepare(model, qwrap.QConfig(scope="all"))
    assert plan.tensors.keys() == {"x", "a", "r", "e", "y"}
    qwrap.calibrate(model, small.batches(2, (4, 48)), progress=False)
