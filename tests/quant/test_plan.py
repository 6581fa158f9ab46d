import json

import qwrap


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
