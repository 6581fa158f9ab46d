"""Picking elements by condition, sequence length or rank: onnxruntime as the oracle."""

import numpy as np
import pytest
import torch

from qwrap import ops

rng = np.random.default_rng(6)
X = rng.uniform(-3, 3, (3, 4, 5)).astype(np.float32)
TIES = rng.integers(-2, 2, (4, 3, 6)).astype(np.float32)


def int64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


CASES = [
    ("Compress", 9, [X, np.array([True, False, True])], {"axis": 1}),
    ("Compress", 11, [X, np.array([False, True])], {"axis": -1}),
    ("Compress", 11, [X, np.array([False, True, False, True])], {}),
    ("Compress", 28, [X, np.zeros(3, np.bool_)], {"axis": 0}),
    ("NonZero", 9, [TIES], {}),
    ("NonZero", 13, [TIES > 0], {}),
    ("NonZero", 13, [np.array(3, np.int64)], {}),
    ("NonZero", 13, [np.zeros((0, 3), np.float32)], {}),
    ("OneHot", 9, [int64(0, 2, 5, 1), int64(4), np.array([-1, 3], np.float32)], {}),
    ("OneHot", 11, [int64(-1, -4, -5, 9, 3), np.array(4), int64(2, 7)], {"axis": 0}),
    ("OneHot", 11, [TIES, np.array(3, np.float32), int64(0, 1)], {"axis": 1}),
    ("OneHot", 11, [TIES, int64(3), int64(0, 1)], {"axis": -4}),
    ("ReverseSequence", 10, [X, int64(1, 3, 2, 3)], {}),
    ("ReverseSequence", 28, [X, int64(4, 1, 3)], {"batch_axis": 0, "time_axis": 1}),
    ("Slice", 13, [X, int64(-9), int64(-20), int64(2), int64(-1)], {}),
    ("Slice", 10, [X, int64(-9, 9), int64(-20, -20), int64(2, 1), int64(-1, -3)], {}),
    ("Slice", 11, [X, int64(-20), int64(2), int64(1)], {}),
    ("Slice", 13, [X[:, :0], int64(-9), int64(-20), int64(1), int64(-1)], {}),
]


@pytest.mark.parametrize(("op_type", "opset", "inputs", "attributes"), CASES)
def test_equals_onnxruntime(check, op_type, opset, inputs, attributes) -> None:
    check(op_type, opset, inputs, attributes)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.int8, np.float64])
@pytest.mark.parametrize("attributes", [{}, {"axis": 0}, {"axis": -1}, {"axis": 1}])
@pytest.mark.parametrize("in_order", [0, 1])
def test_unique_equals_onnxruntime(check, dtype, attributes, in_order) -> None:
    for data in (TIES, TIES[:, :1, :2]):
        check("Unique", 11, [data.astype(dtype)], {**attributes, "sorted": in_order}, outputs=4)


def test_unique_of_nothing_is_nothing() -> None:
    operator = ops.find("", "Unique", 11)
    assert operator is not None
    assert [len(part) for part in operator.function(torch.zeros(0))] == [0, 0, 0, 0]


TOPK_TYPES = [np.float32, np.float64, np.float16, np.int64, np.int32, np.int8, np.uint8]


@pytest.mark.parametrize("dtype", TOPK_TYPES)
@pytest.mark.parametrize("largest", [0, 1])
def test_topk_of_every_type_takes_the_first_of_equal_values(check, dtype, largest) -> None:
    x = (TIES + 2 if dtype == np.uint8 else TIES).astype(dtype)
    for axis in (0, 1, -1):
        check("TopK", 11, [x, int64(2)], {"largest": largest, "axis": axis}, outputs=2)


@pytest.mark.parametrize("largest", [0, 1])
def test_topk_of_special_floats(check, largest: int) -> None:
    x = np.array([-0.0, 0.0, np.inf, -np.inf, 1e-45, -1e-45, 3e38, -3e38, -0.0], np.float32)
    check("TopK", 11, [x, int64(9)], {"largest": largest}, outputs=2)


@pytest.mark.parametrize(
    ("op_type", "opset", "constants", "attributes"),
    [
        ("TopK", 11, [[3]], {"axis": 1}),
        ("Compress", 11, [torch.tensor([True, False, True])], {"axis": 1}),
        ("ReverseSequence", 10, [torch.tensor([1, 3, 2, 3])], {}),
        ("Slice", 13, [[-1], [-20], [2], [-2]], {}),
    ],
)
def test_gradients(check_gradients, op_type, opset, constants, attributes) -> None:
    check_gradients(op_type, opset, [torch.from_numpy(X)], constants, **attributes)


def test_gradients_reach_unique_elements_and_the_values_of_one_hot(check_gradients) -> None:
    check_gradients("Unique", 11, [torch.from_numpy(X)], axis=1)
    operator = ops.find("", "OneHot", 11)
    assert operator is not None
    values = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    operator.function(torch.tensor([0, 2]), 3, values).sum().backward()
    assert values.grad.tolist() == [4.0, 2.0]
