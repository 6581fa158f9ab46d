"""Operators that pass values on share the parameters of what they read, where that is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from one_operator import Case, Made, constants_of, make, run, sqnr
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from operator_cases import CASES
from side_by_side import by_incumbent, by_qwrap, observed, quantizer_of

IMAGE = {"x": (2, 3, 8, 8)}
CONV = {"w": (4, 3, 3, 3), "b": (4,)}
PASSING = [
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Slice",
    "Split",
    "Pad",
    "Pad_reflect",
    "Gather_after_Conv",
    "TopK",
    "MaxPool",
    "AveragePool",
    "Resize",
]


def node(model: ModelProto, name: str) -> NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def near(made: Made, model: ModelProto, least: float = 28) -> None:
    for optimised in (False, True):
        got = run(model, made.batches[0], optimised)
        assert sqnr(run(made.model, made.batches[0]), got) > least


@pytest.mark.ort(173, *range(188, 202))
@pytest.mark.parametrize("name", PASSING)
def test_an_output_has_the_scale_of_the_input(name: str) -> None:
    made = make(CASES[name], 17)
    model = by_qwrap(made.model, observed(made.model, made.batches))
    output = "p" if name == "Split" else "u" if name == "Squeeze" else "y"
    passing = [
        n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[1] == "h_scale"
    ]
    assert f"{output}_QuantizeLinear" in {n.name for n in passing}


@pytest.mark.ort(56, 189, 194, 196)
@pytest.mark.parametrize("name", ["Transpose_alone", "AveragePool_alone", "MaxPool_alone"])
def test_alone_it_is_quantized_only_where_the_user_insists(name: str) -> None:
    made = make(CASES[name], 17)
    ranges = observed(made.model, made.batches)
    assert len(by_qwrap(made.model, ranges).graph.node) == 1
    forced = by_qwrap(made.model, ranges, options={"ForceQuantizeNoInputCheck": True})
    assert node(forced, "y_QuantizeLinear").input[1] == "x_scale"
    near(made, forced)


@pytest.mark.ort(198)
def test_padding_with_another_value_has_its_own_scale() -> None:
    made = make(CASES["Pad_value"], 17)
    model = by_qwrap(made.model, observed(made.model, made.batches))
    assert node(model, "y_QuantizeLinear").input[1] == "y_scale"
    near(made, model)


@pytest.mark.ort(196, 197, 270)
@pytest.mark.parametrize(
    ("name", "opset"), [("MaxPool", 11), ("MaxPool", 12), ("Resize", 10), ("Resize", 11)]
)
def test_older_opsets_leave_them_float(name: str, opset: int) -> None:
    made = make(CASES[name], opset)
    model = by_qwrap(made.model, observed(made.model, made.batches))
    quantized = any(n.name == "y_QuantizeLinear" for n in model.graph.node)
    assert quantized == (opset != {"MaxPool": 11, "Resize": 10}[name])


@pytest.mark.ort(196)
def test_float8_leaves_a_maxpool_alone() -> None:
    made = make(CASES["MaxPool"], 19)
    quantizer = quantizer_of(made.model, None, op_types_to_quantize=["MaxPool"])
    quantizer.activation_qType = TensorProto.FLOAT8E4M3FN
    quantizer.force_quantize_no_input_check = True
    assert [n.op_type for n in quantizer.quantize_model().graph.node] == ["Conv", "MaxPool"]


@pytest.mark.ort(202)
def test_where_needs_both_choices_or_insistence() -> None:
    made = make(CASES["Where"], 17)
    ranges = observed(made.model, made.batches)
    assert not any("antizeLinear" in n.op_type for n in by_qwrap(made.model, ranges).graph.node)
    forced = by_qwrap(made.model, ranges, options={"ForceQuantizeNoInputCheck": True})
    assert list(node(forced, "/y").input) == [
        "c",
        "x_DequantizeLinear_Output",
        "z_DequantizeLinear_Output",
    ]
    near(made, forced)


@pytest.mark.ort("G16")
@pytest.mark.parametrize(
    "override",
    [
        {"quant_type": "QUInt16"},
        {"rmin": np.float32(-1), "rmax": np.float32(9)},
        {"scale": np.array(0.1, np.float32), "zero_point": np.array(3, np.uint8)},
        {"symmetric": True},
    ],
)
def test_overrides_of_its_output_hold(override: dict[str, Any]) -> None:
    """onnxruntime's tool ignores them without a word."""
    made = make(CASES["Reshape"], 21)
    ranges = observed(made.model, made.batches)
    options = {"TensorQuantOverrides": {"y": [override]}}
    model = by_qwrap(made.model, ranges, options=options)
    assert node(model, "y_QuantizeLinear").input[1] == "y_scale"
    for optimised in (False, True):
        assert np.isfinite(run(model, made.batches[0], optimised)[0]).all()
    wrong = by_incumbent(made.model, ranges, options=options)
    assert node(wrong, "y_QuantizeLinear").input[1] == "h_scale"


def prequantized(nodes: str, opset: int = 17) -> Made:
    """A model whose weight ``w`` and activation ``h`` have pairs already."""
    made = make(Case(nodes, IMAGE, {"y": 4}, CONV), opset)
    for tensor in list(made.model.graph.initializer):
        if tensor.name == "w":
            weight = numpy_helper.to_array(tensor)
            codes = np.round(weight / np.float32(0.01)).clip(-127, 127).astype(np.int8)
            made.model.graph.initializer.remove(tensor)
            made.model.graph.initializer.append(numpy_helper.from_array(codes, "w_codes"))
    for name, value in (("s", np.float32(0.01)), ("z", np.int8(0)), ("u", np.uint8(100))):
        made.model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    made.model.graph.node.insert(
        0, helper.make_node("DequantizeLinear", ["w_codes", "s", "z"], ["w"], "given")
    )
    return made


@pytest.mark.ort(9, 174)
def test_what_was_quantized_before_is_left_alone() -> None:
    made = prequantized("y = Conv(x, w, b)")
    model = by_qwrap(made.model, observed(made.model, made.batches))
    found = constants_of(model)
    assert [n.name for n in model.graph.node if n.output[0] == node(model, "/y").input[1]] == [
        "given"
    ]
    np.testing.assert_array_equal(found["b_quantized_scale"], [found["x_scale"] * found["s"]])
    near(made, model)


@pytest.mark.ort("G32", 174)
def test_a_pass_through_of_dequantized_values_takes_their_scale() -> None:
    """onnxruntime's tool never ends."""
    nodes = (
        "k = QuantizeLinear(x, s, u) d = DequantizeLinear(k, s, u) "
        "t = Transpose<perm=[0,1,3,2]>(d) y = Conv(t, w, b)"
    )
    made = prequantized(nodes)
    ranges = observed(made.model, made.batches)
    model = by_qwrap(made.model, ranges, options={"ForceQuantizeNoInputCheck": True})
    assert list(node(model, "t_QuantizeLinear").input) == ["t", "s", "u"]
    near(made, model)


@pytest.mark.ort("G32")
def test_it_has_its_own_scale_where_theirs_is_computed() -> None:
    nodes = (
        "m = ReduceMax<keepdims=0>(x) f = Constant<value = float {100.0}>() e = Div(m, f) "
        "k = QuantizeLinear(x, e, u) d = DequantizeLinear(k, e, u) "
        "t = Transpose<perm=[0,1,3,2]>(d) y = Conv(t, w, b)"
    )
    made = prequantized(nodes)
    model = by_qwrap(
        made.model,
        observed(made.model, made.batches),
        options={"ForceQuantizeNoInputCheck": True},
    )
    assert node(model, "t_QuantizeLinear").input[1] == "t_scale"
    near(made, model)


@pytest.mark.ort(174)
def test_a_second_pair_of_a_tensor_has_names_of_its_own() -> None:
    """A tensor with a pair from another tool gets another one for its other reader."""
    made = make(CASES["Conv"], 17)
    ranges = observed(made.model, made.batches)
    once = by_qwrap(made.model, ranges)
    once.graph.node.append(helper.make_node("Conv", ["x", "v"], ["e"], "second"))
    once.graph.initializer.append(numpy_helper.from_array(np.ones((2, 3, 1, 1), np.float32), "v"))
    once.graph.output.append(helper.make_tensor_value_info("e", TensorProto.FLOAT, None))
    ranges = {**ranges, "e": (np.float32(-9), np.float32(9))}
    twice = by_qwrap(once, ranges, nodes_to_quantize=["second"])
    names = [name for n in twice.graph.node for name in n.output]
    assert len(names) == len(set(names))
    assert np.isfinite(run(twice, made.batches[0])[1]).all()


@pytest.mark.ort(175)
def test_a_tensor_without_a_range_is_an_error_that_names_it() -> None:
    made = make(CASES["Conv"], 17)
    ranges = dict(observed(made.model, made.batches))
    del ranges["y"]
    with pytest.raises(ValueError, match="parameters are not specified for param y"):
        by_qwrap(made.model, ranges)


@pytest.mark.ort("G29")
def test_a_tensor_whose_range_is_infinite_stays_float(caplog: pytest.LogCaptureFixture) -> None:
    """onnxruntime's tool writes an infinite scale, and NaN comes out."""
    made = make(CASES["Conv_Relu_Conv"], 17)
    ranges = dict(observed(made.model, made.batches))
    ranges["x"] = (np.float32(-np.inf), np.float32(1))
    model = by_qwrap(made.model, ranges)
    assert "tensor 'x' stays float: the range" in caplog.text
    assert not any(n.name == "x_QuantizeLinear" for n in model.graph.node)
    near(made, model)


@pytest.mark.ort(197)
@pytest.mark.parametrize("opset", [11, 13, 17])
def test_an_empty_region_that_could_be_given_is_filled(opset: int) -> None:
    """onnxruntime permutes its ends, and stops on what onnxruntime's tool writes."""
    nodes = 'h = Conv(x, w, b) r = Resize<mode="nearest">(h, roi, scales) y = Conv(r, v, b)'
    weights = {
        **CONV,
        "v": (4, 4, 3, 3),
        "roi": np.zeros(0, np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }
    made = make(Case(nodes, IMAGE, {"y": 4}, weights), opset)
    made.model.graph.input.append(helper.make_tensor_value_info("roi", TensorProto.FLOAT, [0]))
    ranges = observed(made.model, made.batches)
    model = by_qwrap(made.model, ranges)
    np.testing.assert_array_equal(constants_of(model)["roi"], [0, 0, 0, 0, 1, 1, 1, 1])
    near(made, model)
    with pytest.raises(Exception, match="indices element out of data bounds"):
        run(by_incumbent(made.model, ranges), made.batches[0], optimised=True)
