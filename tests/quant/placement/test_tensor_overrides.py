"""What is said of tensors by name, in a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import qwrap
from qwrap.errors import ConfigError
from qwrap.overrides import KEEPS_OUTPUT

CONVS = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (4, 6, 3, 3), "b2": (4,)}
NODES = "a = Conv<pads=[1,1,1,1]>(x, w1, b1) b = Relu(a) y = Conv<pads=[1,1,1,1]>(b, w2, b2)"
BRANCHES = "t = Sigmoid(x) a = Cos(t) b = Sin(t)"
MOVED = "t = Sigmoid(x) m = Transpose<perm=[0,2,3,1]>(t) a = Cos(m)"


def plan_of(source: Any, overrides: dict[str, Any], **settings: Any) -> qwrap.QuantPlan:
    config = qwrap.QConfig.from_overrides(overrides, **settings)
    return qwrap.prepare(qwrap.load(source), config)


def convs(small: Any, nodes: str = NODES) -> Any:
    return small.build(nodes, CONVS)


def branches(small: Any, nodes: str = BRANCHES) -> Any:
    out = "float[N,A,B,C] a" + (", float[N,A,B,C] b" if " b = " in nodes else "")
    return small.build(nodes, {}, outputs=out)


def converted(**more: Any) -> list[dict[str, Any]]:
    return [{"convert": {"quant_type": "uint16", **more}}]


# --- what cannot be had --------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown tensor": (
        {"tt": [{"symmetric": True}]},
        "no tensor 'tt', its normalizations folded; the nearest name is 't'",
    ),
    "unknown receiver": (
        {"t": converted(recv_nodes=["/aa"])},
        "tensor 't': the model has no node '/aa' of 'recv_nodes'; the nearest name is '/a'",
    ),
    "no receiver": (
        {"t": converted(recv_nodes=["/t"])},
        r"node '/t' of 'recv_nodes' does not read it; nodes \['/a', '/b'\] do",
    ),
    "nobody": ({"t": converted(recv_nodes=[])}, "'recv_nodes' names no node"),
    "channels": ({"t": [{"axis": 1}]}, "tensor 't': 'axis' is for constants, and it is none"),
    "reduced": ({"t": [{"reduce_range": True}]}, "'reduce_range' is for constants, and it is none"),
    "same type": (
        {"t": [{"convert": {"quant_type": "uint8"}}]},
        "tensor 't': 'convert' to uint8, which it has already",
    ),
    "zero point": (
        {"t": [{"scale": 0.1, "zero_point": 256}]},
        "tensor 't': zero_point=256 lies outside of uint8",
    ),
    "zero point of a conversion": (
        {"t": converted(scale=0.1, zero_point=-1)},
        "tensor 't_convert': zero_point=-1 lies outside of uint16",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_an_activation_cannot_have_is_refused_before_calibration(
    small: Any, case: tuple[dict[str, Any], str]
) -> None:
    with pytest.raises(ConfigError, match=case[1]):
        plan_of(branches(small), case[0])


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ([{"convert": {"quant_type": "uint16"}}], "'convert' is not for constants"),
        ([{"axis": 4}], "'axis' 4 is out of bounds for its rank 4"),
        ([{"axis": -5}], "'axis' -5 is out of bounds for its rank 4"),
        ([{"axis": 0, "rmin": -1, "rmax": 1}] * 2, "2 dictionaries, but 6 channels along axis 0"),
        ([{"axis": 1, "rmin": -1, "rmax": 1}] * 6, "6 dictionaries, but 3 channels along axis 1"),
        ([{"scale": 0.1, "zero_point": 128}], "'zero_point' 128 lies outside of int8"),
    ],
)
def test_what_a_constant_cannot_have_is_refused(
    small: Any, channels: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"tensor 'w1': {message}"):
        plan_of(convs(small), {"w1": channels})


def test_what_is_no_float_is_refused(small: Any) -> None:
    source = small.build(
        "t = Reshape(x, to) a = Cos(t)", {"to": np.array([1, -1])}, outputs="float[A,B] a"
    )
    with pytest.raises(ConfigError, match="tensor 'to' has type int64; only floats are quantized"):
        plan_of(source, {"to": [{"quant_type": "uint8"}]})


def test_a_type_is_needed_where_activations_are_float(small: Any) -> None:
    with pytest.raises(ConfigError, match="tensor 't': no 'quant_type' is given"):
        plan_of(branches(small), {"t": [{"rmin": 0, "rmax": 1}]}, activation=None)
    plan = plan_of(branches(small), {"t": [{"quant_type": "uint8"}]}, activation=None)
    assert plan.tensors.keys() == {"t"}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"scale": 0.1, "zero_point": 0}, {"scale": 0.2, "zero_point": 0}),
        ({"symmetric": True}, {"symmetric": False}),
        ({"rmin": 0, "rmax": 1}, {"scale": 0.2, "zero_point": 0}),
    ],
)
def test_contradictory_words_on_one_scale_are_refused_with_both(
    small: Any, first: dict[str, Any], second: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"of tensor 't' and .* of tensor 'm' contradict"):
        plan_of(branches(small, MOVED), {"t": [first], "m": [second]})


def test_two_types_of_a_tensor_that_is_only_moved_are_refused_with_both(small: Any) -> None:
    types = {"t": [{"quant_type": "uint8"}], "m": [{"quant_type": "uint16"}]}
    with pytest.raises(ConfigError, match=r"'m': quant_type=uint16, but .* quant_type=uint8 was"):
        plan_of(branches(small, MOVED), types)


def test_a_scale_beyond_what_an_absorbed_activation_lets_through_is_refused(small: Any) -> None:
    with pytest.raises(ConfigError, match="has codes outside of"):
        plan_of(convs(small), {"b": [{"scale": 0.1, "zero_point": 9}]}, scope="kernels")


# --- what is done --------------------------------------------------------------------------------


def test_named_tensors_are_quantized_wherever_they_are(small: Any) -> None:
    plan = plan_of(branches(small), {"t": [{"rmin": 0, "rmax": 1}]}, scope="faster")
    assert plan.tensors.keys() == {"t"}
    assert {node.role for node in plan.nodes.values()} == {"float"}
    plan = plan_of(convs(small), {"w2": [{"axis": 0}]}, scope="named")
    assert not plan.tensors
    assert plan.constants.keys() == {("/y", 1)}
    assert plan.nodes["/y"].role == "weights"


def test_excluded_nodes_do_not_keep_named_tensors_from_being_quantized(small: Any) -> None:
    plan = plan_of(branches(small), {"t": [{"quant_type": "int8"}]}, excluded=["*"])
    assert plan.tensors["t"].spec.dtype == qwrap.integer_type(8)


def test_scope_named_quantizes_nothing_else(small: Any) -> None:
    named = {name: [{"quant_type": "uint8"}] for name in ("x", "b")} | {"w1": [{"axis": 0}]}
    plan = plan_of(convs(small), named, scope="named")
    assert plan.tensors.keys() == {"x", "b"}
    assert plan.constants.keys() == {("/a", 1)}
    assert plan.biases.keys() == {("/a", 2)}
    assert plan.nodes["/a"].role == "integer"
    assert plan.nodes["/b"].role == "absorbed"
    assert plan.nodes["/y"].role == "float"


def test_a_tensor_precedes_a_region(small: Any) -> None:
    config = qwrap.QConfig.from_overrides({"t": [{"quant_type": "int8"}]})
    config.set("*", activation="uint16")
    plan = qwrap.prepare(qwrap.load(branches(small)), config)
    kinds = {key: str(tensor.spec.dtype) for key, tensor in plan.tensors.items()}
    assert kinds == {"x": "uint16", "t": "int8", "a": "uint16", "b": "uint16"}
    assert not list(plan.conversions())


def test_who_is_not_among_the_receivers_reads_the_tensor_as_it_is(small: Any) -> None:
    config = qwrap.QConfig.from_overrides({"t": converted(recv_nodes={"/a"})})
    config.set("Sin", activation="int16")
    plan = qwrap.prepare(qwrap.load(branches(small)), config)
    (conversion,) = plan.tensors["t"].conversions
    assert (conversion.consumers, str(conversion.spec.dtype)) == ((("/a", 0),), "uint16")


@pytest.mark.parametrize(
    ("per_channel", "said", "axis"),
    [
        (True, {"quant_type": "int8"}, None),
        (True, {"rmin": -1, "rmax": 1}, None),
        (False, {"axis": 0}, 0),
        (False, {"axis": -4}, 0),
        (True, {"axis": 1}, 1),
    ],
)
def test_the_axis_of_a_weight_is_what_is_said_of_it(
    small: Any, per_channel: bool, said: dict[str, Any], axis: int | None
) -> None:
    plan = plan_of(convs(small), {"w1": [said]}, per_channel=per_channel, scope="kernels")
    assert plan.constants["/a", 1].spec.axis == axis
    assert plan.constants["/y", 1].spec.axis == (0 if per_channel else None)


@pytest.mark.parametrize(("said", "axis"), [({"quant_type": "int8"}, None), ({"axis": 0}, 0)])
def test_a_named_bias_is_a_plain_weight(small: Any, said: dict[str, Any], axis: int | None) -> None:
    plan = plan_of(convs(small), {"b1": [said]}, scope="kernels")
    assert plan.biases.keys() == {("/y", 2)}
    spec = plan.constants["/a", 2].spec
    assert (str(spec.dtype), spec.axis) == ("int8", axis)


def test_the_scale_of_a_bias_is_that_of_what_its_node_receives(small: Any) -> None:
    nodes = NODES.replace("b = Relu(a)", "b = Sigmoid(a)") + " z = Cos(b)"
    source = small.build(nodes, CONVS, outputs="float[N,M,H,W] y, float[N,A,B,C] z")
    plan = plan_of(source, {"b": converted(recv_nodes=["/y"])}, scope="all")
    assert plan.biases["/y", 2].activation == "b_convert"
    plan = plan_of(source, {"b": converted(recv_nodes=["/z"])}, scope="all")
    assert plan.biases["/y", 2].activation == "b"


@pytest.mark.parametrize(
    ("overrides", "absorbed"),
    [
        ({}, True),
        ({"b": [{"quant_type": "uint16"}], "a": [{"quant_type": "uint16"}]}, True),
        ({"b": [{"quant_type": "uint16"}]}, True),
        ({"b": converted()}, False),
        ({"a": converted()}, False),
        ({"a": [{"quant_type": "uint16"}]}, False),
        ({"a": [{"rmin": -1, "rmax": 1}]}, False),
        ({"b": [{"symmetric": True, "quant_type": "int8"}]}, False),
    ],
)
def test_an_activation_is_absorbed_unless_its_input_has_to_be_a_tensor(
    small: Any, overrides: dict[str, Any], absorbed: bool
) -> None:
    plan = plan_of(convs(small), overrides, scope="kernels")
    assert (plan.nodes["/b"].role == "absorbed") == absorbed
    assert ("a" in plan.tensors) == (not absorbed)


def test_a_type_of_16_bit_raises_the_opset(small: Any) -> None:
    for said in ([{"quant_type": "uint16"}], [{"convert": {"quant_type": "int16"}}]):
        plan = plan_of(branches(small), {"t": said})
        assert "opset 13 raised to 21" in plan.changes
    plan = plan_of(convs(small), {"w1": [{"axis": 0, "quant_type": "int4"}]})
    assert "opset 13 raised to 21" in plan.changes
    assert not plan_of(branches(small), {"t": [{"quant_type": "int8"}]}).changes


@pytest.mark.parametrize("receivers", [None, ["/a", "/b"], ["/a", "/b", KEEPS_OUTPUT], ["/a"]])
def test_a_graph_output_is_converted_where_all_readers_are(
    small: Any, receivers: list[str] | None
) -> None:
    out = ", ".join(f"float[N,A,B,C] {name}" for name in "abt")
    source = small.build(BRANCHES, {}, outputs=out)
    said = {} if receivers is None else {"recv_nodes": receivers}
    model = qwrap.load(source)
    plan = qwrap.prepare(model, qwrap.QConfig.from_overrides({"t": converted(**said)}))
    (conversion,) = plan.tensors["t"].conversions
    assert conversion.outputs == ((2,) if receivers in (None, ["/a", "/b"]) else ())
    qwrap.calibrate(model, small.batches(), progress=False)
    again = plan.to_overrides(model)["t"][0]["convert"]
    every = set(receivers or ()) in (set(), {"/a", "/b"})
    assert again.get("recv_nodes") == (None if every else set(receivers or ()))


def test_who_reads_the_shape_alone_gets_nothing_converted(small: Any, quantized: Any) -> None:
    nodes = "t = Sigmoid(x) a = Cos(t) s = Shape(t) b = Reshape(a, s)"
    source = small.build(nodes, {}, outputs="float[N,A,B,C] b, float[N,A,B,C] t")
    result = quantized(source, config=qwrap.QConfig.from_overrides({"t": converted()}))
    (conversion,) = result.model.plan.tensors["t"].conversions
    assert (conversion.consumers, conversion.outputs) == ((("/a", 0),), (1,))
    assert result.verify().passed()
    with pytest.raises(ConfigError, match="node '/s' of 'recv_nodes' does not read it"):
        plan_of(source, {"t": converted(recv_nodes=["/s"])})


@pytest.mark.parametrize("group", [1, 3])
def test_channels_may_have_zero_points_of_their_own(small: Any, quantized: Any, group: int) -> None:
    weights = np.random.default_rng(1).normal(0.2, 0.3, (6, 3 // group, 3, 3)).astype(np.float32)
    nodes = f"a = Conv<pads=[1,1,1,1], group={group}>(x, w1, b1) y = Relu(a)"
    source = small.build(nodes, {"w1": weights, "b1": (6,)})
    overrides = {"w1": [{"axis": 0, "symmetric": False, "quant_type": "uint8"}]}
    config = qwrap.QConfig.from_overrides(overrides, scope="kernels")
    result = quantized(source, config=config)
    assert result.operators()["QLinearConv"] == 1
    assert result.verify().passed()
