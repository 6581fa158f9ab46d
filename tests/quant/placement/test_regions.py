"""Which nodes a region has, and what it says of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

import qwrap
from qwrap.errors import ConfigError


@pytest.fixture
def source(small) -> onnx.ModelProto:
    """Three layers in two scopes; the middle one has a branch of its own."""
    nodes = (
        "a = Conv<pads=[1,1,1,1]>(x, w1) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, w2) "
        "d = Sigmoid(b) e = Add(c, d) y = Conv(e, w3)"
    )
    weights = {"w1": (6, 3, 3, 3), "w2": (6, 6, 3, 3), "w3": (4, 6, 1, 1)}
    built = small.build(nodes, weights)
    names = ("/stem/conv", "/stem/relu", "/layer/conv", "/layer/gate", "/layer/add", "/head")
    for node, name in zip(built.graph.node, names, strict=True):
        node.name = name
    return built


def types(source: onnx.ModelProto, *regions: tuple, **settings: object) -> dict[str, str]:
    config = qwrap.QConfig(**{"scope": "kernels", **settings})
    for selector, words in regions:
        config.set(selector, **words)
    plan = qwrap.prepare(qwrap.load(source), config)
    return {key: node.dtype for key, node in plan.nodes.items() if node.role != "absorbed"}


def wide(source: onnx.ModelProto, selector: object, **words: object) -> set[str]:
    """The nodes that a selector gives 16 bits."""
    found = types(source, (selector, {"activation": "uint16", **words}))
    return {key for key, dtype in found.items() if dtype == "uint16"}


SELECTED = {
    "/layer/conv": {"/layer/conv"},
    "/layer/*": {"/layer/conv", "/layer/gate", "/layer/add"},
    "Sigmoid": {"/layer/gate"},
    "Conv": {"/stem/conv", "/layer/conv", "/head"},
    "layer": {"/layer/conv", "/layer/gate", "/layer/add"},
    "lay?r": {"/layer/conv", "/layer/gate", "/layer/add"},
    "e": {"/layer/add", "/head"},  # what writes the tensor, and what reads it
    "[de]": {"/layer/gate", "/layer/add", "/head"},
}


@pytest.mark.parametrize("selector", SELECTED)
def test_a_selector_stands_for_the_first_kind_of_name_that_fits(
    source: onnx.ModelProto, selector: str
) -> None:
    assert wide(source, selector) == SELECTED[selector]


@pytest.mark.parametrize("several", [list, set, tuple])
def test_several_selectors_stand_for_all_that_one_of_them_does(
    source: onnx.ModelProto, several: type
) -> None:
    assert wide(source, several(["Sigmoid", "/head"])) == {"/layer/gate", "/head"}


def test_a_block_of_the_model_is_its_nodes(source: onnx.ModelProto) -> None:
    block = qwrap.load(source).get_submodule("layer")
    assert wide(source, block) == SELECTED["layer"]


def test_the_root_is_no_region(source: onnx.ModelProto) -> None:
    with pytest.raises(ConfigError, match="the root Block is the whole model"):
        qwrap.QConfig().set(qwrap.load(source), activation="uint16")


def test_an_exact_name_with_brackets_is_that_node(source: onnx.ModelProto) -> None:
    source.graph.node[3].name = "/layer[0]/gate"
    assert wide(source, "/layer[0]/gate") == {"/layer[0]/gate"}


# --- from … to -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "to", "expected"),
    [
        ("/stem/conv", "/layer/conv", {"/stem/conv", "/layer/conv"}),
        ("/layer/gate", "/head", {"/layer/gate", "/layer/add", "/head"}),
        ("/layer/conv", "/layer/conv", {"/layer/conv"}),
        (["/layer/conv", "/layer/gate"], "/layer/add", SELECTED["layer"]),
    ],
)
def test_from_here_to_there_is_all_that_lies_between(
    source: onnx.ModelProto, start: str, to: str, expected: set[str]
) -> None:
    assert wide(source, start, to=to) == expected


def test_backwards_there_is_no_way(source: onnx.ModelProto) -> None:
    with pytest.raises(ConfigError, match=r"no way leads from \['/head'\] to \['/stem/conv'\]"):
        wide(source, "/head", to="/stem/conv")


def test_a_way_leads_into_a_body_and_out_of_it(small) -> None:
    nodes = (
        "a = Conv(x, w) s = ReduceMax<keepdims=0>(x) c = Greater(s, zero) b = If (c) <"
        "then_branch = yes () => (float[N,M,H,W] p) { p = Conv(a, w) }, "
        "else_branch = no () => (float[N,M,H,W] q) { q = Tanh(a) }> y = Conv(b, w)"
    )
    weights = {"w": (3, 3, 1, 1), "zero": np.array(0, np.float32)}
    built = small.build(nodes, weights)
    assert wide(built, "/a", to="/y") == {"/a", "/p", "/y"}
    assert wide(built, "/a", to="/p") == {"/a", "/p"}
    assert wide(built, "/p", to="/y") == {"/p", "/y"}


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "nearest"), [("/layer/cnov", "'/layer/conv'"), ("Convv", "'Conv'")]
)
def test_what_fits_nothing_is_refused_with_the_nearest_names(
    source: onnx.ModelProto, selector: str, nearest: str
) -> None:
    with pytest.raises(ConfigError, match=f"fits {selector!r}; the nearest names are.*{nearest}"):
        wide(source, selector)
    with pytest.raises(ConfigError, match=f"fits {selector!r}"):
        wide(source, "/stem/conv", to=selector)


def test_one_unknown_name_among_others_is_refused(source: onnx.ModelProto) -> None:
    with pytest.raises(ConfigError, match="fits 'nothing'"):
        wide(source, ["/head", "nothing"])


@pytest.mark.parametrize("selector", [[], 3, None, [3], object()])
def test_what_selects_nothing_is_refused(selector: object) -> None:
    with pytest.raises(ConfigError, match="selects nothing"):
        qwrap.QConfig().set(selector, activation="uint16")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"to": "/b"}, "goes with activation= or weight="),
        ({"activation": "uint16", "low": 0.0, "high": 1.0}, "call set\\(\\) once for each"),
        ({"weight": "int4", "method": "mse"}, "call set\\(\\) once for each"),
        ({"activation": "float16", "weight": "int8"}, "has weights of float16"),
        ({"weight": "float16"}, "weights are of float16 with activation='float16'"),
        ({"activation": "int32"}, "is for biases"),
        ({"activation": "uint17"}, "uint17"),
    ],
)
def test_contradictory_words_are_refused_when_said(words: dict, message: str) -> None:
    config = qwrap.QConfig()
    with pytest.raises(ConfigError, match=message):
        config.set("/a", **words)
    assert not config.regions


# --- several regions -----------------------------------------------------------------------------


def test_the_later_word_on_a_node_wins(source: onnx.ModelProto) -> None:
    regions = [("/layer/*", {"activation": "uint16"}), ("/layer/gate", {"activation": "int8"})]
    assert types(source, *regions)["/layer/gate"] == "int8"
    assert types(source, *reversed(regions))["/layer/gate"] == "uint16"


def test_a_later_word_on_weights_leaves_the_activation(source: onnx.ModelProto) -> None:
    config = qwrap.QConfig(scope="kernels")
    config.set("/layer/conv", activation="uint16")
    config.set("Conv", weight="int4")
    plan = qwrap.prepare(qwrap.load(source), config)
    assert plan.nodes["/layer/conv"].dtype == "uint16"
    assert str(plan.constants["/layer/conv", 1].spec.dtype) == "int4"


def test_regions_that_overlap_without_one_holding_the_other_are_told(
    source: onnx.ModelProto,
) -> None:
    config = qwrap.QConfig(scope="kernels")
    config.set("/layer/*", activation="uint16")
    config.set(["/layer/add", "/head"], activation="int8")
    notes = qwrap.prepare(qwrap.load(source), config).notes
    assert [n for n in notes if "holds for /layer/add, not set ['/layer/*']" in n]
    config = qwrap.QConfig(scope="kernels")
    config.set("/layer/*", activation="uint16")
    config.set("/layer/add", activation="int8")  # a part of it: meant so
    assert not qwrap.prepare(qwrap.load(source), config).notes


def test_float_again_after_a_type_is_float(source: onnx.ModelProto) -> None:
    regions = [("*", {"activation": "uint16"}), ("/head", {"activation": "float32"})]
    found = types(source, *regions)
    assert found["/head"] == ""
    assert found["/layer/add"] == "uint16"
    assert types(source, *reversed(regions))["/head"] == "uint16"


# --- what regions say ----------------------------------------------------------------------------


def test_float_activations_with_a_type_of_weights_are_weights_alone(
    source: onnx.ModelProto,
) -> None:
    config = qwrap.QConfig(scope="kernels")
    config.set("/layer/conv", activation="float32", weight="int4")
    plan = qwrap.prepare(qwrap.load(source), config)
    assert plan.nodes["/layer/conv"].role == "weights"
    assert str(plan.constants["/layer/conv", 1].spec.dtype) == "int4"
    assert "c" not in plan.tensors or plan.nodes["/layer/add"].dtype


def test_a_float_region_says_so(source: onnx.ModelProto) -> None:
    config = qwrap.QConfig(scope="kernels")
    config.set("/layer/conv", activation="float32")
    plan = qwrap.prepare(qwrap.load(source), config)
    assert plan.nodes["/layer/conv"].reason == "float32 was asked for"
    assert ("/layer/conv", 1) not in plan.constants


def test_a_float_weight_between_quantized_tensors_stays_float(
    source: onnx.ModelProto, quantized
) -> None:
    config = qwrap.QConfig(scope="kernels")
    config.set("/layer/conv", weight="float32")
    made = quantized(source, config=config)
    assert ("/layer/conv", 1) not in made.model.plan.constants
    assert {"b", "c"} <= made.model.plan.tensors.keys()
    report = made.verify()
    assert report.specification.differing == 0
    assert report.deployed.differing == 0


def test_a_region_in_a_model_of_weights_alone_has_quantized_activations(
    source: onnx.ModelProto,
) -> None:
    found = types(source, ("/layer/*", {"activation": "uint8"}), activation=None)
    assert {key for key, dtype in found.items() if dtype} == SELECTED["layer"]


def test_what_is_asked_for_is_quantized_where_it_is_not_faster(source: onnx.ModelProto) -> None:
    found = types(source, ("/layer/conv", {"activation": "uint8"}), scope="faster")
    assert {key for key, dtype in found.items() if dtype} == {"/layer/conv"}


def test_an_initialiser_of_a_shared_weight_has_the_type_of_each_reader(small) -> None:
    built = small.build("a = Conv(x, w) y = Conv(a, w)", {"w": (3, 3, 1, 1)})
    config = qwrap.QConfig(scope="kernels")
    config.set("/y", weight="int4")
    plan = qwrap.prepare(qwrap.load(built), config)
    assert str(plan.constants["/a", 1].spec.dtype) == "int8"
    assert str(plan.constants["/y", 1].spec.dtype) == "int4"


def test_a_tensor_that_nothing_reads_or_makes_selects_no_node(small) -> None:
    built = small.convs()
    built.graph.input.append(helper.make_tensor_value_info("unused", 1, [1]))
    with pytest.raises(ConfigError, match="fits only tensors that no node reads or makes"):
        wide(built, "unused")
