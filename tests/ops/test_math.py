"""Arithmetic, logic, casts and activations against onnxruntime."""

import itertools

import numpy as np
import pytest
import torch
from onnx import TensorProto

from qwrap import ops

rng = np.random.default_rng(0)


def floats(*shape: int, low: float = -3.0, high: float = 3.0) -> np.ndarray:
    return rng.uniform(low, high, shape).astype(np.float32)


def ints(*shape: int, low: int = -9, high: int = 9, dtype: type = np.int64) -> np.ndarray:
    return rng.integers(low, high, shape).astype(dtype)


def scalar(value: float, dtype: type = np.float32) -> np.ndarray:
    return np.array(value, dtype)


HALVES = np.arange(-4, 4.5, 0.5, dtype=np.float32)
X = floats(2, 3, 4)
FLAGS = X > 0

EXACT = [
    ("Abs", 13, [X], {}),
    ("Abs", 13, [ints(5)], {}),
    ("Neg", 13, [X], {}),
    ("Neg", 13, [ints(5, dtype=np.int32)], {}),
    ("Ceil", 13, [HALVES], {}),
    ("Floor", 13, [HALVES], {}),
    ("Round", 11, [HALVES], {}),
    ("Round", 22, [HALVES.astype(np.float64)], {}),
    ("Sign", 13, [HALVES], {}),
    ("Sign", 9, [ints(7)], {}),
    ("Reciprocal", 13, [X], {}),
    ("Add", 14, [X, floats(3, 1)], {}),
    ("Add", 7, [ints(3, 1), ints(1, 4)], {}),
    ("Add", 13, [np.zeros((0, 3), np.float32), floats(3)], {}),
    ("Sub", 14, [X, scalar(2)], {}),
    ("Mul", 13, [X, floats(1, 3, 1)], {}),
    ("Mul", 7, [ints(3, dtype=np.int32), ints(3, dtype=np.int32)], {}),
    ("Div", 14, [X, floats(4, low=1)], {}),
    ("Div", 7, [ints(40, low=-50, high=50), ints(1, low=2, high=5)], {}),
    ("Div", 14, [ints(9, dtype=np.int32), -ints(1, low=2, high=5, dtype=np.int32)], {}),
    ("Mod", 10, [ints(50, low=-50, high=50), ints(50, low=1, high=7)], {}),
    ("Mod", 13, [ints(50, low=-50, high=50), -ints(50, low=1, high=7)], {}),
    ("Mod", 13, [ints(50, low=-50, high=50), -ints(50, low=1, high=7)], {"fmod": 1}),
    ("Mod", 13, [floats(50), floats(50)], {"fmod": 1}),
    ("Sum", 13, [X, floats(3, 4), floats(4)], {}),
    ("Sum", 8, [X], {}),
    ("Max", 13, [X, floats(4), floats(3, 1)], {}),
    ("Max", 12, [ints(4), ints(2, 4)], {}),
    ("Max", 8, [X, np.full((4,), np.nan, np.float32)], {}),
    ("Min", 13, [X, floats(4), floats(3, 1)], {}),
    ("Min", 12, [ints(4, dtype=np.int32), ints(2, 4, dtype=np.int32)], {}),
    ("Clip", 6, [X], {"min": -1.0, "max": 0.5}),
    ("Clip", 6, [np.array([np.inf, -np.inf, 1], np.float32)], {}),
    ("Clip", 11, [X, scalar(-1), scalar(0.5)], {}),
    ("Clip", 12, [X, None, scalar(0.5)], {}),
    ("Clip", 13, [X, scalar(0.5)], {}),
    ("Clip", 13, [X], {}),
    ("Clip", 13, [X, scalar(1), scalar(-1)], {}),
    ("Clip", 13, [ints(9, dtype=np.int8), scalar(-3, np.int8), scalar(3, np.int8)], {}),
    ("Pow", 15, [X, scalar(2)], {}),
    ("Pow", 13, [ints(9), scalar(2, np.int64)], {}),
    ("Pow", 13, [ints(9, low=1), scalar(0.5)], {}),
    ("Pow", 12, [X, ints(4, low=0, high=3)], {}),
    ("CumSum", 14, [ints(3, 4), scalar(1, np.int64)], {}),
    ("CumSum", 11, [ints(3, 4, dtype=np.int32), scalar(-2, np.int32)], {"reverse": 1}),
    ("CumSum", 14, [ints(3, 4), scalar(0, np.int64)], {"exclusive": 1}),
    ("CumSum", 14, [ints(3, 4), scalar(1, np.int64)], {"exclusive": 1, "reverse": 1}),
    ("CumSum", 14, [np.zeros((0, 3), np.float32), scalar(0, np.int64)], {"exclusive": 1}),
    *(
        ("CumProd", 26, [ints(3, 4), scalar(axis, np.int64)], {"exclusive": e, "reverse": r})
        for axis, e, r in itertools.product((0, -1), (0, 1), (0, 1))
    ),
    ("IsNaN", 9, [np.array([np.nan, 1, np.inf], np.float32)], {}),
    ("IsNaN", 20, [np.array([np.nan, 1, np.inf], np.float16)], {}),
    *(
        ("IsInf", opset, [np.array([np.nan, -np.inf, 1, np.inf], np.float32)], attributes)
        for opset in (10, 20)
        for attributes in (
            {},
            {"detect_negative": 0},
            {"detect_positive": 0},
            {"detect_negative": 0, "detect_positive": 0},
        )
    ),
    ("Not", 1, [FLAGS], {}),
    ("And", 7, [FLAGS, FLAGS[0, :1]], {}),
    ("Or", 7, [FLAGS, ~FLAGS[0, :1]], {}),
    ("Xor", 7, [FLAGS, FLAGS[0, :1]], {}),
    ("Equal", 13, [HALVES, scalar(0.5)], {}),
    ("Equal", 7, [ints(3, 4, high=-7), ints(4, high=-7)], {}),
    ("Equal", 11, [FLAGS, FLAGS[:1]], {}),
    ("Greater", 13, [HALVES, scalar(0.5)], {}),
    ("GreaterOrEqual", 16, [HALVES, scalar(0.5)], {}),
    ("GreaterOrEqual", 12, [ints(9), ints(9)], {}),
    ("Less", 9, [ints(9), ints(9)], {}),
    ("LessOrEqual", 16, [HALVES, scalar(0.5)], {}),
    ("Where", 16, [FLAGS, X, scalar(0)], {}),
    ("Where", 9, [FLAGS[0, :, :1], ints(3, 1), ints(4)], {}),
    ("Relu", 14, [X], {}),
    ("Relu", 6, [X], {}),
    ("LeakyRelu", 16, [X], {}),
    ("LeakyRelu", 6, [X], {"alpha": 0.3}),
    ("PRelu", 16, [X, floats(3, 1)], {}),
    ("PRelu", 9, [X, floats(1)], {}),
    ("PRelu", 7, [X, floats(2, 3, 4)], {}),
    ("PRelu", 16, [ints(2, 3, dtype=np.int32), ints(3, dtype=np.int32)], {}),
    ("HardSigmoid", 6, [floats(1000)], {}),
    ("HardSigmoid", 22, [floats(1000, low=-5)], {"alpha": 1 / 6, "beta": 0.5}),
    ("HardSwish", 14, [floats(1000, low=-5, high=5)], {}),
    ("CastLike", 19, [HALVES, ints(1)], {}),
    ("CastLike", 15, [FLAGS, X], {}),
]

# Both are within one or two units in the last place of the true value (1.2e-7 relative), and
# exp(x) - 1 loses digits to cancellation near 0: an absolute bound of the same size.
ROUNDED = [
    ("Sqrt", 13, [np.abs(X)], {}),
    ("Exp", 13, [X], {}),
    ("Log", 6, [np.abs(X)], {}),
    ("Erf", 13, [X], {}),
    ("Sin", 7, [X], {}),
    ("Cos", 22, [X], {}),
    ("Mean", 13, [X, floats(3, 4), floats(4)], {}),
    ("Mod", 28, [floats(50), floats(50, low=1)], {}),
    ("Pow", 7, [np.abs(X), floats(4)], {}),
    ("Pow", 13, [np.abs(X), scalar(0.5, np.float64)], {}),
    ("Pow", 13, [X, scalar(3, np.int64)], {}),
    ("CumSum", 14, [X, scalar(2, np.int64)], {}),
    ("Sigmoid", 13, [X], {}),
    ("Tanh", 13, [X], {}),
    ("Softplus", 1, [floats(50, low=-30, high=30)], {}),
    ("Elu", 6, [X], {"alpha": 0.7}),
    ("Selu", 22, [X], {}),
    ("Selu", 6, [X], {"alpha": 1.5, "gamma": 1.2}),
    ("Gelu", 20, [X], {}),
    ("Gelu", 20, [X], {"approximate": "tanh"}),
    ("Softmax", 13, [X], {}),
    ("Softmax", 13, [X], {"axis": 1}),
    ("Softmax", 11, [X], {}),
    ("Softmax", 8, [X], {"axis": 2}),
    ("Softmax", 11, [X], {"axis": -2}),
    ("LogSoftmax", 13, [X], {"axis": 0}),
    ("LogSoftmax", 11, [X], {"axis": 0}),
    ("MatMul", 13, [floats(2, 3, 4), floats(4, 5)], {}),
    ("MatMul", 9, [floats(4), floats(3, 4, 2)], {}),
    ("MatMul", 13, [ints(3, 4), ints(4, 2)], {}),
    ("Gemm", 13, [floats(3, 4), floats(4, 5)], {}),
    ("Gemm", 11, [floats(3, 4), floats(5, 4), floats(5)], {"transB": 1}),
    ("Gemm", 9, [floats(4, 3), floats(4, 5), floats(3, 1)], {"transA": 1, "alpha": 0.5}),
    ("Gemm", 7, [floats(3, 4), floats(4, 5), floats(3, 5)], {"beta": 2.0}),
    ("Gemm", 13, [floats(0, 4), floats(4, 5), scalar(2)], {"alpha": 2.0}),
]


@pytest.mark.parametrize(("op_type", "opset", "inputs", "attributes"), EXACT)
def test_equals_onnxruntime(check, op_type, opset, inputs, attributes) -> None:
    check(op_type, opset, inputs, attributes)


@pytest.mark.parametrize(("op_type", "opset", "inputs", "attributes"), ROUNDED)
def test_equals_onnxruntime_up_to_rounding(check, op_type, opset, inputs, attributes) -> None:
    check(op_type, opset, inputs, attributes, rtol=1e-6, atol=1e-6)


NUMBERS = np.array(
    [np.nan, np.inf, -np.inf, 1e10, -1e10, 3e9, 300.7, -300.7, -1.5, 1.5, 0, 0.5, 65536, 1e20],
    np.float32,
)
TARGETS = [
    TensorProto.BOOL,
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT16,
    TensorProto.UINT16,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.FLOAT16,
    TensorProto.DOUBLE,
]


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
def test_cast_from_float_equals_onnxruntime_out_of_range_too(check, to: int) -> None:
    check("Cast", 13, [NUMBERS], {"to": to})


@pytest.mark.parametrize(
    ("dtype", "to"), [*itertools.product([np.int64, np.uint8, np.bool_], TARGETS)]
)
def test_cast_from_integers_equals_onnxruntime(check, dtype: type, to: int) -> None:
    check("Cast", 9, [ints(20, low=-500, high=500).astype(dtype)], {"to": to})


LEGACY = [
    ({}, (2, 3, 4), (2, 3, 4), (2, 3, 4)),
    ({"broadcast": 1}, (2, 3, 4), (3, 4), (1, 3, 4)),
    ({"broadcast": 1}, (2, 3, 4), (), (1, 1, 1)),
    ({"broadcast": 1, "axis": 0}, (2, 3, 4), (2,), (2, 1, 1)),
    ({"broadcast": 1, "axis": 1}, (2, 3, 4), (3,), (1, 3, 1)),
    ({"broadcast": 1, "axis": 1}, (2, 3, 4, 5), (3, 4), (1, 3, 4, 1)),
    ({"broadcast": 1, "axis": -1}, (2, 3, 4), (4,), (1, 1, 4)),
]
MEANINGS = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Equal": np.equal,
    "Greater": np.greater,
    "Less": np.less,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Xor": np.logical_xor,
}


@pytest.mark.parametrize("op_type", MEANINGS)
@pytest.mark.parametrize(("attributes", "a", "b", "meant"), LEGACY)
def test_broadcasting_before_opset_7_aligns_at_an_axis(op_type, attributes, a, b, meant) -> None:
    x, y = (rng.integers(1, 4, shape) for shape in (a, b))
    kind = np.bool_ if op_type in ("And", "Or", "Xor") else np.float32
    x, y = (x > 1, y > 1) if kind is np.bool_ else (x.astype(kind), y.astype(kind))
    wanted = MEANINGS[op_type](x, y.reshape(meant))  # no runtime has kernels for these opsets
    for opset in (1, 6):
        operator = ops.find("", op_type, opset)
        assert operator is not None
        got = operator.function(torch.as_tensor(x), torch.as_tensor(y), **attributes)
        np.testing.assert_allclose(got, wanted, rtol=1e-6)  # powers are rounded
