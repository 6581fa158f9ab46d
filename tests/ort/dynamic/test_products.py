"""MatMul, Gemm and Conv with measured scales, and the weights they share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models_of_text import batches, parse
from one_operator import constants_of, node_of, open_session
from onnx import ModelProto, TensorProto
from quantizer_pairs import op_types, quality, quantize_incumbent, quantize_own

from qwrap.ort.enums import QuantizationMode, QuantType
from qwrap.ort.onnx_quantizer import ONNXQuantizer
from qwrap.ort.qoperator.code_graph import CodeGraph

SUMS = ["DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul"]


def loose(model: ModelProto) -> ModelProto:
    """The model without declared shapes of its outputs."""
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    return model


@pytest.mark.ort(254)
@pytest.mark.parametrize("weight", ["QInt8", "QUInt8"])
@pytest.mark.parametrize("reduced", [False, True])
def test_a_product_is_five_nodes(weight: str, reduced: bool) -> None:
    model = parse("y = MatMul(x, w)", {"w": (16, 8)})
    own = quantize_own(
        model, None, weight=weight, per_channel=True, reduce_range=reduced
    ).model.model
    assert op_types(own) == SUMS
    codes = constants_of(own)["w_quantized"].astype(int)
    assert constants_of(own)["w_scale"].shape == (8,)
    assert np.abs(codes).max() <= ({"QInt8": 64, "QUInt8": 127}[weight] if reduced else 255)
    assert quality(model, own, batches()) > 30


@pytest.mark.ort(262)
def test_one_node_measures_a_tensor_for_all_its_readers() -> None:
    model = parse("a = MatMul(x, w) b = MatMul(x, v) y = Add(a, b)", {"w": (16, 8), "v": (16, 8)})
    own = quantize_own(model, None).model.model
    assert op_types(own).count("DynamicQuantizeLinear") == 1
    assert op_types(own).count("MatMulInteger") == 2


@pytest.mark.ort(254)
def test_nodes_without_names_work_too() -> None:
    model = parse("a = MatMul(x, w) b = MatMul(x, w) y = Add(a, b)", {"w": (16, 8)})
    for node in model.graph.node:
        node.name = ""
    own = quantize_own(model, None).model.model
    assert op_types(own).count("Mul") == 3  # one product of the scales, which are the same
    assert quality(model, own, batches()) > 30


@pytest.mark.ort(255)
@pytest.mark.parametrize("weight", ["QInt8", "QUInt8"])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_a_convolution_is_five_nodes_and_two_for_its_bias(weight: str, bias: str) -> None:
    """onnxruntime 1.31 runs either sign of the weights; older ones have no kernel for int8."""
    model = loose(
        parse(f"y = Conv(x, w{bias})", {"w": (4, 3, 3, 3), "b": (4,)}, "float[2,3,8,8] x")
    )
    data = batches({"x": (2, 3, 8, 8)})
    own = quantize_own(model, None, weight=weight).model.model
    wanted = ["DynamicQuantizeLinear", "ConvInteger", "Cast", "Mul", "Mul"]
    assert op_types(own) == wanted + (["Reshape", "Add"] if bias else [])
    assert quality(model, own, data) > 30


def test_a_convolution_with_a_computed_weight_stays_float() -> None:
    """The incumbent: 'Expected v to be an initializer'."""
    model = loose(
        parse("v = Tanh(w) y = Conv(x, v, b)", {"w": (4, 3, 3, 3), "b": (4,)}, "float[2,3,8,8] x")
    )
    quantizer = quantize_own(model, None)
    assert op_types(quantizer.model.model) == ["Tanh", "Conv"]
    assert "not constant" in quantizer.report.nodes[1].reason


@pytest.mark.ort(256)
@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_becomes_product_and_sum(transposed: int) -> None:
    shape = (8, 16) if transposed else (16, 8)
    model = parse(f"y = Gemm<transB={transposed}>(x, w, b)", {"w": shape, "b": (8,)})
    own = quantize_own(model, None).model.model
    assert op_types(own) == [*SUMS, "Add"]
    assert constants_of(own)["w_quantized"].shape == (16, 8)
    assert quality(model, own, batches()) > 30


@pytest.mark.ort(256)
@pytest.mark.parametrize("attributes", ["alpha=2.0", "beta=0.5", "transA=1"])
def test_other_gemms_stay(attributes: str) -> None:
    model = loose(parse(f"y = Gemm<{attributes}>(x, w, b)", {"w": (16, 8), "b": (8,)}))
    data = batches()
    if attributes == "transA=1":
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 16
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2
        data = batches({"x": (16, 2)})
    own = quantize_own(model, None).model.model
    assert op_types(own) == ["Gemm"]
    assert quality(model, own, data) > 100


TIED = {
    "two Gemm": "a = Gemm<transB=1>(x, w) b = Gemm<transB=1, alpha=2.0>(x, w) y = Add(a, b)",
    "MatMul and Gemm": "a = MatMul(x, w) b = Gemm<transB=1>(x, w) y = Add(a, b)",
    "Gather and Gemm": "g = Gather(w, i) b = Gemm<transB=1>(x, w) y = Add(g, b)",
    "Gemm and Gather": "b = Gemm<transB=1>(x, w) g = Gather(w, i) y = Add(g, b)",
    "MatMul and Gather": "b = MatMul(x, w) g = Gather(w, i) y = Add(g, b)",
    "MatMul and Tanh": "b = MatMul(x, w) t = Tanh(w) y = MatMul(b, t)",
    "Tanh and MatMul": "t = Tanh(w) b = MatMul(x, w) y = MatMul(b, t)",
    "MatMul and Add": "b = MatMul(x, w) c = MatMul(b, w) d = Transpose(c) y = MatMul(w, d)",
}


@pytest.mark.ort(256, "G3")
@pytest.mark.parametrize("tied", TIED)
@pytest.mark.parametrize("channels", [False, True])
def test_tied_weights_are_right_for_all(tied: str, channels: bool) -> None:
    """The incumbent transposes a shared weight in place, and shares channels with tables."""
    indices = np.array([[0, 1, 2, 3]] * 1).ravel()[:2]
    model = loose(parse(TIED[tied], {"w": (16, 16), "i": indices}))
    for options in ({}, {"MatMulConstBOnly": False}):
        own = quantize_own(model, None, per_channel=channels, options=options).model.model
        assert quality(model, own, batches()) > 25


@pytest.mark.ort("G3")
def test_onnxruntimes_tool_breaks_what_is_tied(tmp_path: Path) -> None:
    model = loose(parse(TIED["two Gemm"], {"w": (16, 16)}))
    assert quality(model, quantize_incumbent(model, None, tmp_path), batches()) < 5


@pytest.mark.ort(254)
def test_a_table_and_a_product_store_a_weight_once() -> None:
    model = loose(parse(TIED["Gather and Gemm"].replace("<transB=1>", ""), {"w": (16, 16)}))
    model.graph.initializer.add().CopyFrom(
        parse("y = Tanh(x)", {"i": np.array([0, 1])}).graph.initializer[0]
    )
    own = quantize_own(model, None).model.model
    names = {name for name in constants_of(own) if name.startswith("w")}
    assert names == {"w_quantized", "w_scale", "w_zero_point"}
    assert quality(model, own, batches()) > 25


@pytest.mark.ort("G25")
@pytest.mark.parametrize("first", [True, False])
def test_an_excluded_node_reads_the_float_weight(first: bool) -> None:
    nodes = ["t = MatMul(x, w)", "b = MatMul(x, w)"]
    text = " ".join(nodes if first else nodes[::-1])
    model = parse(f"{text} y = Sub(b, t)", {"w": (16, 16)})
    own = quantize_own(model, None, exclude=["/t"]).model.model
    assert list(node_of(own, "MatMul").input) == ["x", "w"]
    assert constants_of(own)["w"].dtype == np.float32
    assert "DequantizeLinear" not in op_types(own)
    open_session(own)


def by_hand(model: ModelProto, activation: QuantType) -> ModelProto:
    options = {"MatMulConstBOnly": True}
    mode = QuantizationMode.IntegerOps
    types = QuantType.QInt8, activation
    kinds = ["MatMul", "Conv"]
    made = ONNXQuantizer(model, True, False, mode, False, *types, None, [], [], kinds, options)
    assert isinstance(made, CodeGraph)
    return made.quantize_model()


@pytest.mark.ort(250, "G30")
@pytest.mark.parametrize("opset", [10, 11, 17, 21])
def test_activations_may_be_measured_as_int8(opset: int) -> None:
    """The incumbent divides by a range of -1, int8 overflowing."""
    model = parse("y = MatMul(x, w)", {"w": (16, 8)}, opset=opset)
    own = by_hand(model, QuantType.QInt8)
    assert op_types(own)[:2] == ["ReduceMin", "ReduceMax"]
    assert quality(model, own, batches()) > 30


@pytest.mark.ort(261)
@pytest.mark.parametrize("shift", [-30.0, 0.0, 30.0])
def test_opset_10_measures_ranges_that_hold_zero(shift: float, tmp_path: Path) -> None:
    """The incumbent's zero point does not fit uint8 where all values have one sign."""
    model = parse("y = MatMul(x, w)", {"w": (16, 8)}, opset=10)
    own = quantize_own(model, None).model.model
    assert op_types(own).count("QuantizeLinear") == 1
    assert "DynamicQuantizeLinear" not in op_types(own)
    assert {"ReduceMin", "ReduceMax", "Sub", "Div", "Floor", "Cast"} <= set(op_types(own))
    data = batches(shift=shift)
    assert quality(model, own, data) > 20
    if shift > 0:
        assert quality(model, quantize_incumbent(model, None, tmp_path), data) < 10


@pytest.mark.ort(261)
def test_zeros_stay_zeros_at_opset_10() -> None:
    model = parse("y = MatMul(x, w)", {"w": (16, 8)}, opset=10)
    own = quantize_own(model, None).model.model
    zeros = {"x": np.zeros((2, 16), np.float32)}
    (output,) = open_session(own).run(None, zeros)
    np.testing.assert_array_equal(output, np.zeros((2, 8), np.float32))


@pytest.mark.ort(259, 56)
def test_transposes_pass_codes_on() -> None:
    model = parse("g = Gather(w, i) t = Transpose(g) y = MatMul(x, t)", {"w": (16, 16)})
    model.graph.initializer.add().CopyFrom(
        parse("y = Tanh(x)", {"i": np.array([1, 2, 3])}).graph.initializer[0]
    )
    own = quantize_own(model, None).model.model
    assert op_types(own) == ["Gather", "Transpose", "DequantizeLinear", "MatMul"]
    assert node_of(own, "Transpose").input[0] == "g_quantized"
    stored = next(t for t in own.graph.initializer if t.name == "w_quantized")
    assert stored.data_type == TensorProto.UINT8
    assert quality(model, own, batches()) > 30


@pytest.mark.ort(254)
@pytest.mark.parametrize("opset", [10, 12, 13])
def test_channels_of_a_tied_weight_before_opset_13(opset: int) -> None:
    """DequantizeLinear has no channels before; the incumbent writes one that does not load."""
    model = loose(parse(TIED["MatMul and Tanh"], {"w": (16, 16)}, opset=opset))
    own = quantize_own(model, None, per_channel=True).model.model
    assert ("DequantizeLinear" in op_types(own)) == (opset >= 13)
    assert quality(model, own, batches()) > 25
