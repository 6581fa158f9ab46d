"""Options, overrides and errors of the QOperator form, and what the graph says of itself."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import onnx
import pytest
from models_of_text import batches, parse
from one_operator import constants_of, make, node_of, open_session
from onnx import TensorProto, helper
from operator_cases import CASES
from quantizer_pairs import form, observe, op_types, quality, quantize_incumbent, quantize_own

from qwrap.ort import registry
from qwrap.ort.operators.base_operator import QuantOperatorBase

LINEAR = {"w": (16, 8)}
IMAGE = "float[2,3,8,8] x"
PIXELS = batches({"x": (2, 3, 8, 8)})
CONV = {"w": (4, 3, 3, 3), "b": (4,)}


@pytest.mark.ort(6)
def test_types_without_operator_on_codes_pass_through() -> None:
    model = parse("y = Tanh(x)", {})
    own = quantize_own(model, observe(model, batches()), op_types=["Tanh"]).model.model
    assert own.graph.node == model.graph.node
    assert own.producer_name == "onnx.quantize"
    assert own.producer_version == "0.1.0"


@pytest.mark.ort(57)
@pytest.mark.parametrize("static", [True, False])
def test_products_of_activations_stay_float_where_b_has_to_be_constant(static: bool) -> None:
    model = parse("h = MatMul(x, w) t = Transpose(x) y = MatMul(h, t)", {"w": (16, 16)})
    ranges = observe(model, batches()) if static else None
    for only, count in ((True, 1), (False, 2)):
        own = quantize_own(model, ranges, options={"MatMulConstBOnly": only}).model.model
        kinds = [kind for kind in op_types(own) if kind in ("QLinearMatMul", "MatMulInteger")]
        assert len(kinds) == count
        assert quality(model, own, batches()) > 30


@pytest.mark.ort(58)
def test_a_type_that_cannot_be_inferred_is_what_the_user_says() -> None:
    model = parse("h = custom.Unknown(x) y = MatMul(h, w)", LINEAR)
    model.opset_import.append(helper.make_opsetid("custom", 1))
    model.graph.output[0].type.tensor_type.elem_type = 0
    del model.graph.output[:]
    model.graph.node.append(helper.make_node("custom.Out", ["y"], ["z"], domain="custom"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    with pytest.raises(RuntimeError, match="DefaultTensorType"):
        quantize_own(model, None)
    options = {"DefaultTensorType": TensorProto.FLOAT}
    own = quantize_own(model, None, options=options).model.model
    assert node_of(own, "Cast").attribute[0].i == TensorProto.FLOAT
    assert "MatMulInteger" in op_types(own)


@pytest.mark.ort(79)
def test_sigmoid_for_nnapi_has_the_whole_scale() -> None:
    model = parse("y = Sigmoid(x)", {})
    options = {"extra.Sigmoid.nnapi": True}
    own = quantize_own(model, observe(model, batches()), options=options).model.model
    assert constants_of(own)["y_scale"] == np.float32(1 / 256)
    assert constants_of(own)["y_zero_point"] == 0
    assert quality(model, own, batches()) > 40


OVERRIDES: dict[str, list[dict[str, Any]]] = {
    "w_type": [{"quant_type": "QUInt8"}],
    "w_scale": [{"scale": np.float32(0.01), "zero_point": np.int8(3)}],
    "w_range": [{"rmin": np.float32(-0.5), "rmax": np.float32(0.5), "symmetric": False}],
    "w_bits": [{"reduce_range": True, "symmetric": True}],
    "x_range": [{"rmin": np.float32(-4), "rmax": np.float32(3)}],
    "x_symmetric": [{"symmetric": True}],
    "x_scale": [{"scale": np.array(0.03, np.float32), "zero_point": np.array(128, np.uint8)}],
    "y_range": [{"rmin": np.float32(-3), "rmax": np.float32(4)}],
}


@pytest.mark.ort(145)
@pytest.mark.parametrize("override", OVERRIDES)
def test_overrides_are_honoured_as_by_onnxruntimes_tool(tmp_path: Any, override: str) -> None:
    model = parse("y = Conv(x, w, b)", CONV, IMAGE, "float[N,M,H,W] y")
    options = {"TensorQuantOverrides": {override[0]: OVERRIDES[override]}}
    ranges = observe(model, PIXELS)
    own = quantize_own(model, ranges, reduce_range=True, options=options).model.model
    theirs = quantize_incumbent(model, ranges, tmp_path, reduce_range=True, options=options)
    assert form(own) == form(theirs)
    assert quality(model, own, PIXELS) > 20


@pytest.mark.ort(145, 142, "G23", "G38")
def test_overrides_of_channels_reach_every_channel() -> None:
    model = parse("y = Conv(x, w, b)", CONV, IMAGE, "float[N,M,H,W] y")
    entry = {"axis": 0, "rmin": np.float32(-0.25), "rmax": np.float32(0.25)}
    options = {"TensorQuantOverrides": {"w": [entry]}}
    own = quantize_own(model, observe(model, PIXELS), options=options).model.model
    np.testing.assert_allclose(constants_of(own)["w_scale"], np.full(4, 0.25 / 127), rtol=1e-6)


@pytest.mark.ort(145)
def test_scales_of_plain_numbers_will_do() -> None:
    """The incumbent: AttributeError, for it asks a float for its dtype."""
    model = parse("y = MatMul(x, w)", LINEAR)
    options = {"TensorQuantOverrides": {"x": [{"scale": 0.03, "zero_point": 120}]}}
    own = quantize_own(model, observe(model, batches()), options=options).model.model
    assert constants_of(own)["x_scale"] == np.float32(0.03)
    assert constants_of(own)["x_zero_point"] == 120


@pytest.mark.ort(145)
def test_types_that_no_kernel_takes_together_leave_a_node_float() -> None:
    """The incumbent writes a QLinearAdd of int8 and uint8, which does not load."""
    model = parse("h = MatMul(x, w) y = Add(h, b)", {**LINEAR, "b": (8,)})
    options = {"TensorQuantOverrides": {"h": [{"quant_type": "QInt8"}]}}
    quantizer = quantize_own(model, observe(model, batches()), options=options)
    own = quantizer.model.model
    assert op_types(own) == ["MatMul", "Add"]
    assert "several types" in quantizer.report.nodes[0].reason
    open_session(own)


@pytest.mark.ort(249)
def test_other_operators_read_floats() -> None:
    model = parse("h = Conv(x, w, b) y = Tanh(h)", CONV, IMAGE, "float[N,M,H,W] y")
    own = quantize_own(model, observe(model, PIXELS)).model.model
    assert op_types(own) == ["QuantizeLinear", "QLinearConv", "DequantizeLinear", "Tanh"]
    assert own.graph.node[2].name == "h_DequantizeLinear"


@pytest.mark.ort(250)
def test_the_quantizer_takes_names_of_nodes_and_leaves_its_input_alone() -> None:
    model = make(CASES["two_MatMuls_of_one_input"]).model
    before = model.SerializeToString()
    data = make(CASES["two_MatMuls_of_one_input"]).batches
    names = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    excluded = quantize_own(model, observe(model, data), exclude=names[:1])
    chosen = quantize_own(model, observe(model, data), include=names[1:])
    for quantizer in (excluded, chosen):
        kinds = op_types(quantizer.model.model)
        assert kinds.count("QLinearMatMul") == kinds.count("MatMul") == 1
        assert quality(model, quantizer.model.model, data) > 30
    assert model.SerializeToString() == before
    assert {n.name: n.quantized for n in excluded.report.nodes}[names[0]] is False


@pytest.mark.ort(251)
def test_a_model_with_quantized_nodes_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    text = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, w)"
    model = parse(text, {**LINEAR, "s": np.float32(0.03), "z": np.uint8(128)})
    with caplog.at_level(logging.WARNING):
        own = quantize_own(model, observe(model, batches())).model.model
    assert "Please check if the model is already quantized" in caplog.text
    assert quality(model, own, batches()) > 30


@pytest.mark.ort(252)
def test_a_tensor_that_nothing_makes_is_an_error() -> None:
    class Forgetful(QuantOperatorBase):
        def quantize(self) -> None:
            node = helper.make_node("Tanh", ["nowhere"], self.node.output)
            self.quantizer.new_nodes.append(node)

    registry.QLinearOpsRegistry["Tanh"] = Forgetful
    try:
        model = parse("y = Tanh(x)", {})
        with pytest.raises(RuntimeError, match="Invalid model with unknown initializers/tensors"):
            quantize_own(model, observe(model, batches()))
    finally:
        del registry.QLinearOpsRegistry["Tanh"]


@pytest.mark.ort(181)
def test_a_class_of_the_user_calls_back() -> None:
    class AsIs(QuantOperatorBase):
        def quantize(self) -> None:
            names, zero_points, scales, nodes = self.quantizer.quantize_activation(self.node, [0])
            assert (len(names), len(zero_points), len(scales)) == (1, 1, 1)
            made = helper.make_node("Identity", names, ["codes"])
            self.quantizer.new_nodes += [*nodes, made]
            self.quantizer.new_nodes.append(
                helper.make_node(
                    "DequantizeLinear", ["codes", scales[0], zero_points[0]], self.node.output
                )
            )

    registry.QLinearOpsRegistry["Identity"] = AsIs
    try:
        model = parse("y = Identity(x)", {})
        own = quantize_own(model, observe(model, batches())).model.model
        assert op_types(own) == ["QuantizeLinear", "Identity", "DequantizeLinear"]
        assert quality(model, own, batches()) > 35
    finally:
        del registry.QLinearOpsRegistry["Identity"]


@pytest.mark.ort(253)
def test_contrib_operators_are_imported_where_there_are_some() -> None:
    for text, wanted in (("y = MatMul(x, w)", False), ("h = MatMul(x, w) y = Mul(h, h)", True)):
        model = parse(text, LINEAR)
        own = quantize_own(model, observe(model, batches())).model.model
        assert ("com.microsoft" in {o.domain for o in own.opset_import}) == wanted


@pytest.mark.ort("G40", 47)
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("kind", ["QInt4", "QUInt4"])
def test_four_bits_are_refused_before_any_work(static: bool, kind: str) -> None:
    """The incumbent: 'must be 8-bit before packing as 4-bit values', out of the middle."""
    model = parse("y = MatMul(x, w)", LINEAR)
    ranges = observe(model, batches()) if static else None
    with pytest.raises(ValueError, match="8-bit types only"):
        quantize_own(model, ranges, weight=kind)


@pytest.mark.ort("G41", 46)
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("kind", ["QInt16", "QUInt16"])
def test_sixteen_bits_are_refused_before_any_work(static: bool, kind: str) -> None:
    """The incumbent writes a dynamic model that does not load."""
    model = parse("y = MatMul(x, w)", LINEAR)
    ranges = observe(model, batches()) if static else None
    with pytest.raises(ValueError, match=f"weights cannot be {kind[1:].upper()}"):
        quantize_own(model, ranges, weight=kind)
    overrides = {"TensorQuantOverrides": {"w": [{"quant_type": kind}]}}
    with pytest.raises(ValueError, match="TensorQuantOverrides cannot be"):
        quantize_own(model, ranges, options=overrides)


@pytest.mark.ort(48, 225)
def test_float8_products_are_of_the_contrib_domain() -> None:
    model = parse("y = MatMul(x, w)", LINEAR, opset=19)
    ranges = observe(model, batches())
    own = quantize_float8(model, ranges)
    node = node_of(own, "QLinearMatMul")
    assert node.domain == "com.microsoft"
    assert next(t for t in own.graph.initializer if t.name == "w_quantized").data_type == (
        TensorProto.FLOAT8E4M3FN
    )


@pytest.mark.ort(222)
def test_float8_convolutions_have_no_bias() -> None:
    model = parse("y = Conv(x, w, b)", CONV, IMAGE, "float[N,M,H,W] y", opset=19)
    with pytest.raises(RuntimeError, match="FLOAT8E4M3FN for operator Conv is not supported"):
        quantize_float8(model, observe(model, PIXELS))


def quantize_float8(model: onnx.ModelProto, ranges: Any) -> onnx.ModelProto:
    from qwrap.ort.calibrate import TensorData
    from qwrap.ort.enums import QuantizationMode, QuantType
    from qwrap.ort.onnx_quantizer import ONNXQuantizer

    data = {n: TensorData(avg=np.float32(0), std=np.float32(1)) for n in ranges}
    types = QuantType.QFLOAT8E4M3FN, QuantType.QFLOAT8E4M3FN
    mode = QuantizationMode.QLinearOps
    quantizer = ONNXQuantizer(
        model, False, False, mode, True, *types, data, [], [], list(registry.QLinearOpsRegistry)
    )
    return quantizer.quantize_model()
