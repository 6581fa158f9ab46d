import json

import qwrap
from qwrap.model.points import UsePoint, ValuePoint


def test_to_dict_is_json_with_everything(small) -> None:
    plan = qwrap.prepare(qwrap.load(small.convs()), qwrap.QConfig(scope="kernels"))
    found = json.loads(json.dumps(plan.to_dict()))
    assert found["tensors"].keys() == plan.tensors.keys()
    assert found["tensors"]["x"]["spec"]["dtype"] == "uint8"
    assert found["tensors"]["x"]["source"] == "x"
    assert [entry[:2] for entry in found["constants"]] == [["/a", 1], ["/y", 1]]
    assert found["constants"][0][2]["spec"]["axis"] == 0
    assert [entry[:2] for entry in found["biases"]] == [["/a", 2], ["/y", 2]]
    expected = {"op_type": "Relu", "role": "absorbed", "reason": "", "dtype": "uint8"}
    assert found["nodes"]["/b"] == expected
    assert found["changes"] == []


def test_the_summary_counts_what_is_quantized_and_gives_reasons_for_the_rest(small) -> None:
    nodes = "a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Tanh(c) y = Sqrt(d)"
    source = small.build(nodes, {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)})
    text = qwrap.prepare(qwrap.load(source), qwrap.QConfig(scope="kernels")).summary()
    assert "Conv 2" in text
    assert "Relu 1" in text
    assert "3 activations, 2 weights and constants, 0 biases" in text
    assert "Tanh: no integer kernel [/d]" in text
    assert "Sqrt: no integer kernel [/y]" in text


def test_sources_are_the_tensors_with_a_scale_of_their_own(small) -> None:
    nodes = "a = Conv(x, w) b = MaxPool<kernel_shape=[2,2]>(a) y = Conv(b, v)"
    source = small.build(nodes, {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)})
    plan = qwrap.prepare(qwrap.load(source), qwrap.QConfig(scope="kernels"))
    assert plan.tensors.keys() == {"x", "a", "b", "y"}
    assert plan.sources().keys() == {"x", "a", "y"}


def mixed(small) -> qwrap.QuantPlan:
    """A plan with two conversions of one tensor: 8 bits to 16, and to another type of 8."""
    nodes = "a = Conv(x, w) b = Conv(a, v) c = Conv(a, v) d = Conv(a, v) "
    nodes += "y = Concat<axis=1>(b, c, d)"
    source = small.build(nodes, {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)})
    config = qwrap.QConfig(scope="all")
    config.set("/b", activation="uint16")
    config.set("/c", activation="int8")
    return qwrap.prepare(qwrap.load(source), config)


def test_the_summary_tells_types_and_conversions(small) -> None:
    text = mixed(small).summary()
    assert "types:     uint8 3, uint16 1, int8 1 nodes" in text
    assert "uint8 to uint16 1, uint8 to int8 1" in text
    assert "uint16 to uint8 1" in text  # what the Concat reads


def test_to_dict_has_the_conversions(small) -> None:
    found = json.loads(json.dumps(mixed(small).to_dict()))
    wide, other = found["tensors"]["a"]["conversions"]
    assert (wide["key"], wide["spec"]["dtype"]) == ("a_convert_uint16", "uint16")
    assert (other["key"], other["spec"]["dtype"]) == ("a_convert_int8", "int8")
    assert wide["consumers"] == [["/b", 0]]
    assert found["nodes"]["/b"]["dtype"] == "uint16"
    assert found["tensors"]["b"]["conversions"][0]["key"] == "b_convert"


def test_every_scale_has_a_point_where_it_sits(small) -> None:
    plan = mixed(small)
    assert plan.scales().keys() == {*plan.sources(), *(c.key for _, c in plan.conversions())}
    assert plan.point_of("a") == ValuePoint("a")
    assert plan.point_of("a_convert_int8") == UsePoint("/c", 0)
    assert plan.read_by("/c", 0, "a") == "a_convert_int8"
    assert plan.read_by("/d", 0, "a") == "a"
    assert plan.read_by("/d", 0, "nothing") is None
