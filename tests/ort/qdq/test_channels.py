"""Scales of channels and blocks: along the right axis, and never such that onnxruntime stops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from one_operator import Case, Made, attributes_of, constants_of, make, run, sqnr
from onnx import ModelProto
from side_by_side import by_incumbent, by_qwrap, observed

IMAGE = {"x": (2, 8, 6, 6)}
ROWS = {"x": (5, 32)}


def quantized(
    case: Case, opset: int = 21, **settings: Any
) -> tuple[Made, ModelProto, dict[str, tuple[Any, Any]]]:
    made = make(case, opset)
    ranges = dict(observed(made.model, made.batches))
    return made, by_qwrap(made.model, ranges, **settings), ranges


def near(made: Made, model: ModelProto, least: float = 30) -> None:
    for optimised in (False, True):
        got = run(model, made.batches[0], optimised)
        assert sqnr(run(made.model, made.batches[0]), got) > least


def weight_settings(model: ModelProto) -> dict[str, object]:
    return attributes_of(next(n for n in model.graph.node if n.name == "w_DequantizeLinear"))


CONV = Case("y = Conv(x, w, b)", IMAGE, {"y": 4}, {"w": (6, 8, 3, 3), "b": (6,)})
GEMM = Case("y = Gemm(x, w, b)", ROWS, {"y": 2}, {"w": (32, 8), "b": (8,)})
TRANSPOSED = Case("y = Gemm<transB=1>(x, w, b)", ROWS, {"y": 2}, {"w": (8, 32), "b": (8,)})
MATMUL = Case("y = MatMul(x, w)", ROWS, {"y": 2}, {"w": (32, 8)})
STACK = Case("y = MatMul(x, w)", {"x": (3, 5, 32)}, {"y": 3}, {"w": (3, 32, 8)})
UPWARDS = Case("y = ConvTranspose(x, w, b)", IMAGE, {"y": 4}, {"w": (8, 6, 3, 3), "b": (6,)})
LEFT = Case("y = MatMul(w, x)", {"x": (32, 5)}, {"y": 2}, {"w": (8, 32)})


@pytest.mark.ort(10, 123, 182, 183, 184, 185, "G9")
@pytest.mark.parametrize("activation", ["QUInt8", "QInt8", "QUInt16"])
@pytest.mark.parametrize("weight", ["QInt8", "QUInt8", "QInt4", "QInt16"])
@pytest.mark.parametrize(
    ("case", "axis", "size"),
    [
        (CONV, 0, 6),
        (UPWARDS, 1, 6),
        (GEMM, 1, 8),
        (TRANSPOSED, 0, 8),
        (MATMUL, 1, 8),
        (STACK, 2, 8),
        (LEFT, 1, 32),
    ],
    ids=["Conv", "ConvTranspose", "Gemm", "transB", "MatMul", "MatMul 3-D", "constant left"],
)
def test_channels_are_those_of_the_output(
    case: Case, axis: int, size: int, weight: str, activation: str
) -> None:
    """onnxruntime's tool takes the rows of a 3-D MatMul weight, over which it sums."""
    made, model, _ = quantized(case, per_channel=True, weight=weight, activation=activation)
    assert weight_settings(model) == {"axis": axis}
    assert constants_of(model)["w_scale"].shape == (size,)
    near(made, model, 15 if weight == "QInt4" else 30)


@pytest.mark.ort("G9")
def test_the_incumbents_3d_weight_stops_onnxruntime() -> None:
    made, _, ranges = quantized(STACK)
    model = by_incumbent(made.model, ranges, per_channel=True)
    assert weight_settings(model) == {"axis": 1}
    with pytest.raises(Exception, match="QLinearMatMul"):
        run(model, made.batches[0], optimised=True)


@pytest.mark.ort(62, "G17")
@pytest.mark.parametrize(
    ("case", "axis", "size"),
    [(CONV, 1, 8), (UPWARDS, 0, 8), (GEMM, 0, 32), (TRANSPOSED, -1, 32), (MATMUL, 0, 32)],
    ids=["Conv", "ConvTranspose", "Gemm", "transB", "MatMul"],
)
def test_the_axis_of_an_operator_type_is_the_users(case: Case, axis: int, size: int) -> None:
    """onnxruntime's tool asks MatMul and normalizations only."""
    kind = case.text(21).split("= ")[1].split("(")[0].split("<")[0]
    options = {"QDQOpTypePerChannelSupportToAxis": {kind: axis}}
    made, model, _ = quantized(case, per_channel=True, options=options)
    assert constants_of(model)["w_scale"].shape == (size,)
    near(made, model)


@pytest.mark.ort(62)
def test_without_per_channel_the_axis_has_no_effect() -> None:
    options = {"QDQOpTypePerChannelSupportToAxis": {"MatMul": 0}}
    _, model, _ = quantized(MATMUL, options=options)
    assert constants_of(model)["w_scale"].shape == ()


@pytest.mark.ort(69, 120, "G48")
@pytest.mark.parametrize("weight", ["QInt8", "QUInt8", "QInt4"])
@pytest.mark.parametrize(
    ("case", "per_channel", "shape", "axis"),
    [
        (MATMUL, False, (2, 8), 0),
        (MATMUL, True, (32, 1), 1),
        (GEMM, False, (2, 8), 0),
        (TRANSPOSED, False, (1, 32), 0),
        (STACK, False, (3, 2, 8), 1),
    ],
    ids=["MatMul", "MatMul along columns", "Gemm", "transB", "MatMul 3-D"],
)
def test_blocks_of_matrices_run_in_onnxruntime(
    case: Case, per_channel: bool, shape: tuple[int, ...], axis: int, weight: str
) -> None:
    made, model, _ = quantized(
        case, weight=weight, per_channel=per_channel, options={"BlockSize": 16}
    )
    assert constants_of(model)["w_scale"].shape == shape
    assert weight_settings(model) == {"axis": axis, "block_size": 16}
    near(made, model, 15 if weight == "QInt4" else 30)


@pytest.mark.ort(69)
def test_the_incumbents_blocks_stop_onnxruntime() -> None:
    made, _, ranges = quantized(MATMUL)
    model = by_incumbent(made.model, ranges, options={"BlockSize": 16})
    with pytest.raises(Exception, match="QLinearMatMul"):
        run(model, made.batches[0], optimised=True)


@pytest.mark.ort("G48")
@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_of_convolutions_have_no_blocks(per_channel: bool) -> None:
    """onnxruntime's tool refuses a model with a convolution: NotImplementedError."""
    nodes = "c = Conv(x, k, b) r = Reshape(c, s) y = MatMul(r, w)"
    weights = {"k": (6, 8, 3, 3), "b": (6,), "s": np.array([2, 6, 16]), "w": (16, 4)}
    made, model, ranges = quantized(
        Case(nodes, IMAGE, {"y": 3}, weights), per_channel=per_channel, options={"BlockSize": 16}
    )
    found = constants_of(model)
    assert found["k_scale"].shape == ((6,) if per_channel else ())
    assert found["w_scale"].ndim == 2
    near(made, model)
    with pytest.raises(NotImplementedError):
        by_incumbent(made.model, ranges, options={"BlockSize": 16})


@pytest.mark.ort(134, "G23")
def test_one_dictionary_of_limits_is_for_all_channels() -> None:
    """onnxruntime's tool gives it to channel 0."""
    limits = {"axis": 0, "rmin": -0.5, "rmax": 0.5}
    made, model, _ = quantized(CONV, options={"TensorQuantOverrides": {"w": [limits]}})
    np.testing.assert_array_equal(constants_of(model)["w_scale"], np.full(6, 1 / 254, np.float32))
    near(made, model, 10)


@pytest.mark.ort(68, 142, "G38")
@pytest.mark.parametrize("per_channel", [False, True])
def test_overrides_of_a_weight_go_before_per_channel(per_channel: bool) -> None:
    given = {"scale": np.array(0.01, np.float32), "zero_point": np.array(0, np.int8)}
    for entry, shape in (({"axis": 0, **given}, (6,)), (given, ()), ({"axis": 0}, (6,))):
        made, model, _ = quantized(
            CONV, per_channel=per_channel, options={"TensorQuantOverrides": {"w": [entry]}}
        )
        assert constants_of(model)["w_scale"].shape == shape
        near(made, model, 25)


@pytest.mark.ort(143)
def test_a_bias_with_overrides_is_a_plain_weight() -> None:
    options = {"TensorQuantOverrides": {"b": [{"quant_type": "QInt16"}]}}
    made, model, _ = quantized(CONV, options=options)
    assert constants_of(model)["b_quantized"].dtype == np.int16
    near(made, model)


TABLE = Case(
    "h = Gather(w, i) y = MatMul(h, v)",
    {"i": (3, 4)},
    {"y": 3},
    {"w": (20, 16), "v": (16, 4)},
    integers={"i": 20},
)


@pytest.mark.ort(200, "G31")
def test_a_table_has_the_type_of_activations_and_its_output_shares_it() -> None:
    made, model, _ = quantized(TABLE, activation="QUInt8", weight="QInt8")
    found = constants_of(model)
    assert found["w_quantized"].dtype == np.uint8
    assert found["w_scale"].shape == ()
    quantize = next(n for n in model.graph.node if n.name == "h_QuantizeLinear")
    assert quantize.input[1] == "w_scale"
    near(made, model)


@pytest.mark.ort(200, "G31")
@pytest.mark.parametrize(
    ("settings", "dtype", "shape"),
    [
        (
            {"per_channel": True, "options": {"QDQOpTypePerChannelSupportToAxis": {"Gather": 0}}},
            np.int8,
            (20,),
        ),
        (
            {"per_channel": True, "options": {"QDQOpTypePerChannelSupportToAxis": {"Gather": 1}}},
            np.int8,
            (16,),
        ),
        ({"options": {"TensorQuantOverrides": {"w": [{"axis": 0}]}}}, np.int8, (20,)),
        ({"options": {"TensorQuantOverrides": {"w": [{"quant_type": "QInt8"}]}}}, np.int8, ()),
    ],
)
def test_a_table_is_a_weight_with_channels_where_the_user_says_so(
    settings: dict[str, Any], dtype: Any, shape: tuple[int, ...]
) -> None:
    made, model, _ = quantized(TABLE, **settings)
    found = constants_of(model)
    assert (found["w_quantized"].dtype, found["w_scale"].shape) == (dtype, shape)
    near(made, model)


@pytest.mark.ort(57, "G18")
def test_products_of_activations_stay_float_where_that_is_asked_for() -> None:
    """onnxruntime's tool ignores the option in this form."""
    inputs = {"x": (4, 16), "z": (8, 3)}
    case = Case("m = MatMul(x, w) y = MatMul(m, z)", inputs, {"y": 2}, {"w": (16, 8)})
    made, model, ranges = quantized(case, options={"MatMulConstBOnly": True})
    last = next(n for n in model.graph.node if n.name == "/y")
    assert (list(last.input), list(last.output)) == (["m_DequantizeLinear_Output", "z"], ["y"])
    near(made, model)
    wrong = by_incumbent(made.model, ranges, options={"MatMulConstBOnly": True})
    assert next(n for n in wrong.graph.node if n.name == "/y").output[0] != "y"


@pytest.mark.ort(10, 263)
@pytest.mark.parametrize("opset", [11, 12])
def test_channels_below_opset_13_take_the_operators_of_onnxruntime(opset: int) -> None:
    """ONNX has no ``axis`` there: what onnxruntime's tool writes does not load."""
    made, model, ranges = quantized(CONV, opset, per_channel=True)
    domains = {n.domain for n in model.graph.node if "antizeLinear" in n.op_type}
    assert domains == {"com.microsoft"}
    near(made, model)
    with pytest.raises(Exception, match="Unrecognized attribute: axis"):
        run(by_incumbent(made.model, ranges, per_channel=True), made.batches[0])


@pytest.mark.ort(267)
@pytest.mark.parametrize("opset", [13, 17])
def test_4_bits_below_opset_21_take_the_operators_of_onnxruntime(opset: int) -> None:
    made, model, _ = quantized(CONV, opset, weight="QInt4")
    assert {(o.domain, o.version) for o in model.opset_import} >= {("com.microsoft", 1)}
    near(made, model, 15)
