"""What single operators become in QOperator form, and when they stay float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models_of_text import batches, parse
from one_operator import attributes_of, constants_of, node_of, run, sqnr
from onnx import ModelProto, TensorProto
from quantizer_pairs import observe, op_types, quality, quantize_incumbent, quantize_own

CONV = {"w": (4, 3, 3, 3), "b": (4,)}
IMAGE = "float[2,3,8,8] x"
DATA = batches({"x": (2, 3, 8, 8)})


def image_model(text: str, weights: dict[str, object] | None = None, opset: int = 17) -> ModelProto:
    outputs = "int64[N,M,H,W] y" if "ArgMax" in text else "float y"
    model = parse(text, {**CONV, **(weights or {})}, IMAGE, outputs, opset)  # type: ignore[dict-item]
    if "ArgMax" not in text:
        model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


def quantized(model: ModelProto, **settings: object) -> ModelProto:
    made: ModelProto = quantize_own(model, observe(model, DATA), **settings).model.model  # type: ignore[arg-type]
    return made


@pytest.mark.ort(223)
def test_a_convolution_has_its_bias_at_the_end() -> None:
    own = quantized(image_model("y = Conv(x, w, b)"))
    node = node_of(own, "QLinearConv")
    assert list(node.input) == [
        *("x_quantized", "x_scale", "x_zero_point", "w_quantized", "w_scale", "w_zero_point"),
        *("y_scale", "y_zero_point", "b_quantized"),
    ]
    assert constants_of(own)["b_quantized"].dtype == np.int32


@pytest.mark.ort(223, "G28")
@pytest.mark.parametrize("symmetric", [None, True, False])
def test_channels_of_a_convolution_have_the_type_asked_for(
    tmp_path: Path, symmetric: bool | None
) -> None:
    """The incumbent makes them int8 whatever the type."""
    model = image_model("y = Conv(x, w, b)")
    options = {"WeightSymmetric": symmetric}
    own = quantized(model, weight="QUInt8", per_channel=True, options=options)
    constants = constants_of(own)
    assert constants["w_quantized"].dtype == constants["w_zero_point"].dtype == np.uint8
    assert constants["w_scale"].shape == (4,)
    assert quality(model, own, DATA) > 35
    theirs = quantize_incumbent(
        model, observe(model, DATA), tmp_path, weight="QUInt8", per_channel=True
    )
    assert constants_of(theirs)["w_quantized"].dtype == np.int8


@pytest.mark.ort(225)
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("weight", ["QInt8", "QUInt8"])
@pytest.mark.parametrize("shape", [(16,), (16, 8), (1, 16, 8), (3, 16, 8)])
def test_matrices_of_every_rank_have_columns(
    shape: tuple[int, ...], weight: str, static: bool
) -> None:
    """The incumbent's channels of a batch of matrices fail at run time, in both modes."""
    model = parse("y = MatMul(x, w)", {"w": shape}, "float[3,2,16] x", "float y")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    data = batches({"x": (3, 2, 16)})
    ranges = observe(model, data) if static else None
    own = quantize_own(model, ranges, weight=weight, per_channel=True).model.model
    assert quality(model, own, data) > 35
    scale = constants_of(own)["w_scale"] if len(shape) < 3 else None
    assert scale is None or scale.size == (8 if len(shape) == 2 else 1)


@pytest.mark.ort(225, 11)
def test_matrices_of_7_bits() -> None:
    model = parse("y = MatMul(x, w)", {"w": (16, 8)})
    ranges = observe(model, batches())
    own = quantize_own(model, ranges, reduce_range=True).model.model
    assert np.abs(constants_of(own)["w_quantized"].astype(int)).max() == 64


@pytest.mark.ort(226, 227)
@pytest.mark.parametrize("kind", ["Add", "Mul"])
def test_sums_and_products_have_eight_inputs(kind: str) -> None:
    own = quantized(image_model(f"y = {kind}(x, x)"))
    node = node_of(own, f"QLinear{kind}")
    assert node.domain == "com.microsoft"
    assert len(node.input) == 8


@pytest.mark.ort(228, 229)
def test_functions_keep_their_attributes() -> None:
    own = quantized(image_model("h = LeakyRelu<alpha=0.3>(x) y = Sigmoid(h)"))
    leaky, sigmoid = node_of(own, "QLinearLeakyRelu"), node_of(own, "QLinearSigmoid")
    assert attributes_of(leaky)["alpha"] == pytest.approx(0.3)
    assert leaky.domain == sigmoid.domain == "com.microsoft"
    assert len(leaky.input) == len(sigmoid.input) == 5


BOUNDED = ("Relu(h)", "Clip(h, low, high)", "Clip(h, low)", "Clip(h, , high)")
BOUNDS = {"low": np.array(0, np.float32), "high": np.array(1, np.float32)}


@pytest.mark.ort(230, 231, 104, "G8")
@pytest.mark.parametrize("function", BOUNDED)
def test_what_bounds_codes_that_are_within_is_dropped(function: str) -> None:
    model = image_model(f"h = Conv(x, w, b) y = {function}", BOUNDS)
    own = quantized(model)
    assert op_types(own) == ["QuantizeLinear", "QLinearConv", "DequantizeLinear"]
    assert own.graph.node[2].output[0] == "y"
    assert quality(model, own, DATA) > 30
    symmetric = quantized(model, options={"ActivationSymmetric": True})
    assert op_types(symmetric)[-2:] == ["DequantizeLinear", function[: function.index("(")]]
    assert quality(model, symmetric, DATA) > 25


@pytest.mark.ort(230, 231, "G8")
@pytest.mark.parametrize("function", BOUNDED)
def test_what_bounds_codes_that_are_not_within_stays(function: str) -> None:
    """The incumbent drops it, and what it cut off passes."""
    model = image_model(f"h = Conv(x, w, b) r = {function} y = Add(h, r)", BOUNDS)
    own = quantized(model)
    assert function[: function.index("(")] in op_types(own)
    assert quality(model, own, DATA) > 30
    alone = image_model(f"h = Conv(x, w, b) y = {function}", BOUNDS)
    overrides = {"TensorQuantOverrides": {"h": [{"symmetric": True}]}}
    own = quantized(alone, options=overrides)
    assert function[: function.index("(")] in op_types(own)


DIRECT = {
    "MaxPool<kernel_shape=[2,2]>(h)": 232,
    "Transpose<perm=[0,2,3,1]>(h)": 233,
    "Reshape(h, shape)": 234,
    "Squeeze(h, axes)": 235,
    "Unsqueeze(h, axes)": 236,
    "Flatten(h)": 237,
    "Resize(h, , sizes)": 238,
}
SHAPES = {
    "shape": np.array([2, -1]),
    "axes": np.array([0]),
    "sizes": np.array([1, 1, 2, 2], np.float32),
}


@pytest.mark.ort(232, 233, 234, 235, 236, 237, 238)
@pytest.mark.parametrize("text", DIRECT)
def test_what_moves_values_moves_codes(text: str) -> None:
    kind = text[: text.index("<" if "<" in text else "(")]
    first = "k = Conv(x, w, b) h = ReduceMax<axes=[0], keepdims=1>(k)"
    first = first if kind == "Squeeze" else "h = Conv(x, w, b)"
    model = image_model(f"{first} y = {text}", SHAPES)
    own = quantized(model)
    if kind != "Squeeze":
        node = node_of(own, kind)
        assert node.input[0] == "h_quantized"
        last = own.graph.node[-1]
        assert list(last.input) == ["y_quantized", "h_scale", "h_zero_point"]
    assert quality(model, own, DATA) > 30


@pytest.mark.ort(232, 233, 249)
def test_what_moves_floats_is_left_alone() -> None:
    own = quantized(image_model("y = Transpose(x)"))
    assert op_types(own) == ["Transpose"]


@pytest.mark.ort(56, "G19")
@pytest.mark.parametrize("text", ["Transpose(x)", "MaxPool<kernel_shape=[2,2]>(x)", "Flatten(x)"])
def test_what_moves_values_is_forced_to_move_codes(tmp_path: Path, text: str) -> None:
    """The incumbent does the opposite, also where the input has codes already."""
    options = {"ForceQuantizeNoInputCheck": True}
    model = image_model(f"y = {text}")
    own = quantized(model, options=options)
    assert [*op_types(own)][::2] == ["QuantizeLinear", "DequantizeLinear"]
    assert quality(model, own, DATA) > 35
    theirs = quantize_incumbent(model, observe(model, DATA), tmp_path, options=options)
    assert len(theirs.graph.node) == 1


@pytest.mark.ort(270, 361)
@pytest.mark.parametrize(
    ("text", "since"), [("MaxPool<kernel_shape=[2,2]>(h)", 12), ("Resize(h, sizes)", 11)]
)
def test_older_opsets_leave_them_float(text: str, since: int) -> None:
    kind = text[: text.index("<" if "<" in text else "(")]
    model = image_model(f"h = Conv(x, w, b) y = {text}", SHAPES, opset=since - 1)
    own = quantized(model)
    assert node_of(own, kind).input[0] == "h"
    assert quality(model, own, DATA) > 30


@pytest.mark.ort(238)
@pytest.mark.parametrize(
    "attributes", ['mode="cubic"', 'coordinate_transformation_mode="tf_crop_and_resize"']
)
def test_resizes_that_codes_cannot_have_stay_float(attributes: str) -> None:
    """The incumbent's cubic one fails at run time, and the other extrapolates with a raw code."""
    box = np.array([0, 0, -0.2, -0.2, 1, 1, 1.2, 1.2], np.float32)
    model = image_model(f"h = Conv(x, w, b) y = Resize<{attributes}>(h, box, sizes)", SHAPES)
    model.graph.initializer.add().CopyFrom(parse("y = Tanh(x)", {"box": box}).graph.initializer[0])
    own = quantized(model)
    assert node_of(own, "Resize").input[0] == "h"
    assert quality(model, own, DATA) > 30


@pytest.mark.ort(239)
def test_global_averages() -> None:
    model = image_model("h = Conv(x, w, b) y = GlobalAveragePool(h)")
    node = node_of(quantized(model), "QLinearGlobalAveragePool")
    assert attributes_of(node) == {"channels_last": 0}
    assert list(node.input)[3:] == ["y_scale", "y_zero_point"]
    ranges = {name: ends for name, ends in observe(model, DATA).items() if name != "y"}
    own = quantize_own(model, ranges).model.model
    node = node_of(own, "QLinearGlobalAveragePool")
    assert list(node.input)[3:] == ["h_scale", "h_zero_point"]


@pytest.mark.ort(240)
def test_averages_without_dilations() -> None:
    """The incumbent copies dilations, an attribute that the kernel does not have."""
    text = "y = AveragePool<kernel_shape=[2,2], dilations=[{0},{0}]>(x)"
    for step, kind in ((1, "QLinearAveragePool"), (2, "AveragePool")):
        model = image_model(text.format(step), opset=19)
        own = quantized(model)
        assert node_of(own, kind).op_type == kind
        assert quality(model, own, DATA) > 30


@pytest.mark.ort(241)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_concatenations_have_the_output_first(count: int) -> None:
    inputs = ", ".join(["h", "x", "h"][:count])
    model = image_model(f"h = Sigmoid(x) y = Concat<axis=1>({inputs})")
    own = quantized(model)
    node = node_of(own, "QLinearConcat")
    assert node.domain == "com.microsoft"
    assert list(node.input)[:2] == ["y_scale", "y_zero_point"]
    assert list(node.input)[2:5] == ["h_quantized", "h_scale", "h_zero_point"]
    assert quality(model, own, DATA) > 30


@pytest.mark.ort(242, 105)
@pytest.mark.parametrize(("kind", "zero"), [("QUInt8", 0), ("QInt8", -128)])
@pytest.mark.parametrize("opset", [11, 12, 13, 17])
@pytest.mark.parametrize("axis", ["", "<axis=1>", "<axis=-1>"])
def test_softmax_has_256_steps(kind: str, zero: int, opset: int, axis: str) -> None:
    model = image_model(f"y = Softmax{axis}(x)", opset=opset)
    own = quantized(model, activation=kind)
    assert constants_of(own)["y_scale"] == np.float32(1 / 256)
    assert constants_of(own)["y_zero_point"] == zero
    assert attributes_of(node_of(own, "QLinearSoftmax"))["opset"] == opset
    flat = opset < 13 and axis != "<axis=-1>"  # shares of 192 values are few steps each
    assert quality(model, own, DATA) > (5 if flat else 20)


@pytest.mark.ort(243, "G39", 56)
def test_where_is_quantized_on_demand_and_reads_floats_else() -> None:
    """The incumbent appends it before what it reads is float again: an invalid model."""
    zero = {"zero": np.array(0, np.float32)}
    model = image_model("h = Conv(x, w, b) c = Less(h, zero) y = Where(c, h, zero)", zero)
    own = quantized(model)
    assert "Where" in op_types(own)
    assert quality(model, own, DATA) > 30
    own = quantized(model, options={"ForceQuantizeNoInputCheck": True})
    assert len(node_of(own, "QLinearWhere").input) == 9
    assert quality(model, own, DATA) > 30
    own = quantized(model, exclude=["/y"], options={"ForceQuantizeNoInputCheck": True})
    assert "Where" in op_types(own)


@pytest.mark.ort(244)
def test_parts_share_the_scale_of_the_whole() -> None:
    model = image_model("a, c = Split<axis=2>(x) y = Add(a, c)")
    own = quantized(model)
    assert list(node_of(own, "Split").output) == ["aquantized", "cquantized"]
    node = node_of(own, "QLinearAdd")
    assert node.input[1] == node.input[4] == "x_scale"


PADS = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "value": np.array(0.5, np.float32)}


@pytest.mark.ort(245)
def test_pads_are_codes() -> None:
    for inputs, third in (("h, pads", "h_zero_point"), ("h, pads, value", "value_quantized")):
        model = image_model(f"h = Conv(x, w, b) y = Pad({inputs})", PADS)
        own = quantized(model)
        node = node_of(own, "Pad")
        assert (node.input[0], node.input[2]) == ("h_quantized", third)
        assert quality(model, own, DATA) > 30
    assert constants_of(own)["value_quantized"].dtype == np.uint8
    model = image_model("h = Conv(x, w, b) v = ReduceMean<keepdims=0>(h) y = Pad(h, pads, v)", PADS)
    own = quantized(model)
    assert node_of(own, "Pad").input[2] == "v_quantized"
    assert quality(model, own, DATA) > 30


@pytest.mark.ort(245)
def test_a_pad_beyond_the_codes_stays_float(tmp_path: Path) -> None:
    """The incumbent clips it to the largest code."""
    model = image_model(
        "h = Conv(x, w, b) y = Pad(h, pads, value)", {**PADS, "value": np.array(99, np.float32)}
    )
    own = quantized(model)
    assert node_of(own, "Pad").input[0] == "h"
    assert quality(model, own, DATA) > 30
    assert quality(model, quantize_incumbent(model, observe(model, DATA), tmp_path), DATA) < 10


@pytest.mark.ort(245)
def test_two_pads_with_one_value_each_have_their_own_code() -> None:
    """The incumbent's second Pad gets the code of the first."""
    text = "h = Conv(x, w, b) g = Sigmoid(h) p = Pad(h, pads, value) q = Pad(g, pads, value)"
    model = image_model(f"{text} y = Add(p, q)", PADS)
    own = quantized(model)
    codes = [node.input[2] for node in own.graph.node if node.op_type == "Pad"]
    assert codes == ["value_quantized", "value_quantized_1"]
    assert quality(model, own, DATA) > 30


@pytest.mark.ort(246)
def test_the_largest_code_is_looked_for() -> None:
    model = image_model("h = Conv(x, w, b) y = ArgMax<axis=1>(h)")
    own = quantized(model)
    assert op_types(own) == ["QuantizeLinear", "QLinearConv", "ArgMax"]
    assert node_of(own, "ArgMax").input[0] == "h_quantized"


TABLE = {"table": (10, 8), "indices": np.array([[1, 2], [3, 9]])}


@pytest.mark.ort(247, 259, 124)
@pytest.mark.parametrize("static", [True, False])
def test_tables_are_stored_in_8_bits(static: bool) -> None:
    model = parse("g = Gather(table, indices) y = Add(g, x)", TABLE, "float[2,2,8] x", "float y")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    data = batches({"x": (2, 2, 8)})
    own = quantize_own(model, observe(model, data) if static else None).model.model
    node = node_of(own, "Gather")
    assert list(node.input) == ["table_quantized", "indices"]
    stored = next(t for t in own.graph.initializer if t.name == "table_quantized")
    assert stored.data_type == TensorProto.UINT8
    assert "table" not in constants_of(own)
    assert quality(model, own, data) > 35


@pytest.mark.ort(105)
def test_names_that_the_model_has_already_are_not_taken_twice() -> None:
    """The incumbent takes the model's own ``x_scale`` for the scale of ``x``."""
    clash = {"x_scale": np.array(7, np.float32), "w_scale": np.array(3, np.float32)}
    model = image_model("s = Mul(x, x_scale) h = Conv(s, w, b) y = Mul(h, w_scale)", clash)
    own = quantized(model)
    assert quality(model, own, DATA) > 30
    dynamic = quantize_own(model, None).model.model
    assert quality(model, dynamic, DATA) > 30


@pytest.mark.ort("G53")
@pytest.mark.parametrize("missing", ["x", "h"])
@pytest.mark.parametrize("text", ["Conv(x, w, b)", "MatMul(x, m)"])
def test_without_a_scale_a_node_stays_float(missing: str, text: str) -> None:
    """The incumbent: AttributeError, for it appends to what is None."""
    model = image_model(f"h = {text} y = Sigmoid(h)", {"m": (8, 8)})
    ranges = {name: ends for name, ends in observe(model, DATA).items() if name != missing}
    own = quantize_own(model, ranges).model.model
    assert op_types(own)[0] == text[: text.index("(")]
    assert quality(model, own, DATA) > 30


@pytest.mark.ort("G11")
@pytest.mark.parametrize("static", [True, False])
def test_weights_of_constant_nodes_are_weights(static: bool) -> None:
    """The incumbent: AttributeError, and 'Expected w to be an initializer'."""
    model = image_model("y = Conv(x, w, b)")
    for tensor in list(model.graph.initializer):
        node = parse(f"{tensor.name} = Tanh(x)", {}).graph.node[0]
        node.op_type = "Constant"
        del node.input[:]
        attribute = node.attribute.add(name="value", type=4)
        attribute.t.CopyFrom(tensor)
        model.graph.node.insert(0, node)
    del model.graph.initializer[:]
    ranges = observe(model, DATA) if static else None
    own = quantize_own(model, ranges, per_channel=True).model.model
    assert constants_of(own)["w_quantized"].dtype == np.int8
    assert quality(model, own, DATA) > 35


ODD = {
    "bias read twice": "h = Conv(x, w, b) u = Unsqueeze(b, a) y = Add(h, u)",
    "sum of constants": "e = Add(b, b) u = Unsqueeze(e, a) h = Conv(x, w, b) y = Add(h, u)",
    "output read": "h = Conv(x, w, b) s = Sigmoid(h) y = Mul(h, s)",
    "difference": "h = Conv(x, w, b) d = Sub(h, h) y = Add(h, d)",
    "constant part": "h = Conv(x, w, b) y = Concat<axis=1>(h, c)",
    "indices": "h = Conv(x, w, b) y, i = MaxPool<kernel_shape=[2,2]>(h)",
    "small": "h = Conv(x, w, b) y = Resize<mode='linear'>(h, , halves)".replace("'", '"'),
    "scalar": "h = Conv(x, w, b) y = Mul(h, two)",
    "shape": "h = Conv(x, w, b) s = Shape(h) y = Reshape(h, s)",
    "turned weight": "t = Transpose<perm=[1,0]>(m) y = MatMul(x, t)",
}
ODD_WEIGHTS: dict[str, object] = {
    "a": np.array([1, 2]),
    "c": (2, 2, 6, 6),
    "halves": np.array([1, 1, 0.5, 0.5], np.float32),
    "two": np.array(2, np.float32),
    "m": (5, 8),
}


@pytest.mark.ort(249)
@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("kind", ["QUInt8", "QInt8"])
def test_odd_graphs_are_right(text: str, kind: str) -> None:
    model = image_model(ODD[text], ODD_WEIGHTS)
    own = quantized(model, activation=kind, per_channel=kind == "QInt8")
    assert quality(model, own, DATA) > 28
    assert quality(model, quantize_own(model, None).model.model, DATA) > 28


@pytest.mark.ort(249)
@pytest.mark.parametrize("domain", ["custom", "com.microsoft"])
def test_operators_of_other_domains_are_others(domain: str) -> None:
    """The incumbent goes by the name alone."""
    model = image_model("h = Conv(x, w, b) y = Tanh(h)")
    ranges = observe(model, DATA)
    model.graph.node[0].domain = domain
    model.opset_import.add(domain=domain, version=1)
    for observed in (ranges, None):
        options = {"DefaultTensorType": TensorProto.FLOAT}
        quantizer = quantize_own(model, observed, options=options)
        assert op_types(quantizer.model.model) == ["Conv", "Tanh"]
        assert f"domain '{domain}'" in quantizer.report.nodes[0].reason


MOVED = {
    "Slice(h, one, two, axes)": {"one": np.array([1]), "two": np.array([3])},
    "Transpose<perm=[0,2,3,1]>(h)": {},
    "Reshape(h, shape)": {},
    "Unsqueeze(h, axes)": {},
    "MaxPool<kernel_shape=[2,2]>(h)": {},
}


@pytest.mark.ort(249, "G25")
@pytest.mark.parametrize("text", MOVED)
@pytest.mark.parametrize("opset", [20, 21, 24])
@pytest.mark.parametrize("kind", ["QInt8", "QUInt8"])
def test_excluded_nodes_behind_codes_load(text: str, opset: int, kind: str) -> None:
    """The incumbent's int8 ones do not since opset 21: onnxruntime's optimizer breaks them."""
    model = image_model(f"h = Conv(x, w, b) y = {text}", {**SHAPES, **MOVED[text]}, opset)
    model.ir_version = 10
    own = quantized(model, activation=kind, exclude=["/y"])
    moved = opset >= 21 and kind == "QInt8"
    assert (op_types(own)[-1] == "DequantizeLinear") == moved
    for batch in DATA:
        assert sqnr(run(model, batch), run(own, batch, optimised=True)) > 30
