"""The scale of an operator whose outputs are bounded, for every type."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import qwrap
from qwrap.config import QuantSpec
from qwrap.dtypes import INTEGERS, codebook_type
from qwrap.model.points import ValuePoint
from qwrap.numerics import fake_quantize
from qwrap.ops.traits import OUTPUT_RANGES
from qwrap.quant.bounds import operator_qparams

UNIT, BOTH = (0.0, 1.0), (-1.0, 1.0)


@pytest.mark.parametrize(
    ("span", "dtype", "settings", "scale", "zero_point"),
    [
        (UNIT, "uint8", {"symmetric": False}, 1 / 256, 0),
        (UNIT, "int8", {"symmetric": False}, 1 / 256, -128),
        (UNIT, "uint16", {"symmetric": False}, 1 / 65536, 0),
        (UNIT, "int4", {"symmetric": False}, 1 / 16, -8),
        (UNIT, "int3", {"symmetric": False}, 1 / 8, -4),
        (UNIT, "uint8", {}, 1 / 128, 128),
        (UNIT, "int8", {}, 1 / 128, 0),
        (UNIT, "int8", {"narrow_range": True}, 1 / 128, 0),
        (UNIT, "uint8", {"symmetric": False, "reduce_range": True}, 1 / 128, 0),
        (UNIT, "uint8", {"symmetric": False, "restricted": True}, 1 / 256, 0),
        (BOTH, "uint8", {"symmetric": False}, 1 / 128, 128),
        (BOTH, "int8", {"symmetric": False}, 1 / 128, 0),
        (BOTH, "int8", {}, 1 / 128, 0),
        (BOTH, "int8", {"reduce_range": True}, 1 / 64, 0),
        (BOTH, "int16", {}, 1 / 32768, 0),
        (BOTH, "uint8", {"symmetric": False, "restricted": True}, 1 / 128, 128),
        (BOTH, "uint8", {"symmetric": False, "power_of_two": True}, 1 / 128, 128),
        (UNIT, "float8e4m3fn", {}, 1 / 448, 0),
        (BOTH, "float8e5m2", {}, 1 / 57344, 0),
        (UNIT, "float4e2m1", {}, 1 / 6, 0),
    ],
)
def test_the_step_is_the_width_over_the_number_of_codes(
    span, dtype, settings, scale, zero_point
) -> None:
    qparams = operator_qparams(*span, QuantSpec(dtype=dtype, **settings))
    assert float(qparams.scale) == np.float32(scale)
    assert int(qparams.zero_point) == zero_point


def test_a_code_book_reaches_the_end_of_the_range() -> None:
    spec = QuantSpec(dtype=codebook_type("halves", [0, 0.5, 0.25, -0.5, -0.25]))
    assert float(operator_qparams(*BOTH, spec).scale) == 2


@pytest.mark.parametrize("dtype", [str(t) for t in INTEGERS])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("span", [UNIT, BOTH])
def test_every_value_below_the_upper_end_is_at_most_one_step_off(dtype, symmetric, span) -> None:
    spec = QuantSpec(dtype=dtype, symmetric=symmetric)
    qparams = operator_qparams(*span, spec)
    x = torch.linspace(*span, 4001)
    off = (fake_quantize(x, qparams.scale, qparams.zero_point, spec) - x).abs()
    assert off.max() <= qparams.scale  # at the end itself
    inner = x <= span[1] - float(qparams.scale) / 2
    assert off[inner].max() <= float(qparams.scale) * (0.5 + 1e-6)


@pytest.mark.parametrize("operator", sorted(OUTPUT_RANGES))
def test_the_operator_stays_in_its_range(operator: str) -> None:
    value = helper.make_tensor_value_info
    x, y = value("x", TensorProto.FLOAT, ["N", 8]), value("y", TensorProto.FLOAT, ["N", 8])
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    extremes = np.concatenate([np.linspace(-9, 9, 800), np.linspace(-1e4, 1e4, 800)])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (found,) = session.run(None, {"x": extremes.reshape(-1, 8).astype(np.float32)})
    low, high = OUTPUT_RANGES[operator]
    assert low - 1e-6 <= found.min()  # onnxruntime's Tanh goes one float beyond
    assert found.max() <= high + 1e-6
    assert found.max() - found.min() > 0.99 * (high - low)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("length", [8, 1000])
def test_onnxruntimes_softmax_kernel_is_right_for_the_scale(dtype, symmetric, length) -> None:
    """As the kernel ought to compute it in float64; for a scale of 1/8000 the two differ."""
    qparams = operator_qparams(*UNIT, QuantSpec(dtype=dtype, symmetric=symmetric))
    scale, zero_point = float(qparams.scale), int(qparams.zero_point)
    info = np.iinfo(dtype)
    x = np.random.default_rng(0).integers(info.min, info.max + 1, (32, length)).astype(dtype)
    exp = np.exp((x.astype(np.float64) - x.max(-1, keepdims=True)) * np.float32(0.03))
    steps = exp / exp.sum(-1, keepdims=True) / scale
    expected = np.clip(np.rint(steps) + zero_point, info.min, info.max)
    assert np.array_equal(qlinear_softmax(x, scale, zero_point), expected)


def qlinear_softmax(x: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    names = ["x", "xs", "xz", "ys", "yz"]
    node = helper.make_node(
        "QLinearSoftmax", names, ["y"], domain="com.microsoft", axis=-1, opset=13
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kind, ["A", "B"])],
        [helper.make_tensor_value_info("y", kind, ["A", "B"])],
        [
            helper.make_tensor("xs", TensorProto.FLOAT, [], [0.03]),
            helper.make_tensor("xz", kind, [], [0]),
            helper.make_tensor("ys", TensorProto.FLOAT, [], [scale]),
            helper.make_tensor("yz", kind, [], [zero_point]),
        ],
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


SIGMOID = "a = Conv(x, w) s = Sigmoid(a) y = Conv(s, v)"


def sigmoid_scale(small, gain: float, method: str = "minmax", dtype: str = "uint8") -> float:
    """The scale behind a Sigmoid of values from about -5 to 5 times ``gain``."""
    weights = {"w": np.eye(3).reshape(3, 3, 1, 1) * gain, "v": (4, 3, 1, 1)}
    model = qwrap.load(small.build(SIGMOID, weights)).eval()
    config = qwrap.QConfig(scope="kernels", method=method, activation=dtype)
    qwrap.prepare(model, config)
    qwrap.calibrate(model, small.batches(8), progress=False)
    return float(model.tap(ValuePoint("s")).scale)


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_data_that_fills_an_operators_range_gives_it_the_whole(small, method: str) -> None:
    assert sigmoid_scale(small, 1.5, method) == 1 / 256


def test_data_that_does_not_fill_it_keeps_its_own_range(small) -> None:
    assert sigmoid_scale(small, 0.3) < 0.8 / 255


def test_data_that_reaches_the_upper_end_is_not_cut(small) -> None:
    assert sigmoid_scale(small, 100.0) == np.float32(1 / 255)
