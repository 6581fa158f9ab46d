"""Operators that move, select, create and reduce elements, against onnxruntime."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from qwrap import ops
from qwrap.errors import InputError

rng = np.random.default_rng(1)


def floats(*shape: int) -> np.ndarray:
    return rng.uniform(-3, 3, shape).astype(np.float32)


def function(op_type: str, opset: int) -> Callable[..., Any]:
    operator = ops.find("", op_type, opset)
    assert operator is not None
    return operator.function


def int64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def scalar(value: float, dtype: type = np.int64) -> np.ndarray:
    return np.array(value, dtype)


X = floats(2, 3, 4)
EMPTY = np.zeros((0, 3), np.float32)
IMAGE = floats(2, 8, 4, 6)
TIES = rng.integers(0, 3, (4, 9)).astype(np.float32)
MAX, MIN = np.iinfo(np.int64).max, np.iinfo(np.int64).min

NOTHING = np.zeros((2, 0, 3), np.float32)
NO_AXES = np.zeros((0,), np.int64)

MOVED = [
    ("Transpose", 13, [scalar(2.5, np.float32)], {}),
    ("Squeeze", 13, [floats(1, 3, 1), NO_AXES], {}),
    ("Pad", 13, [X > 0, int64(0, 1, 0, 0, 0, 1), scalar(True, np.bool_)], {}),
    ("Pad", 13, [TIES.astype(np.int64), int64(0, 1, 0, 2), scalar(2**60 + 1)], {}),
    *(
        (f"Reduce{kind}", opset, [NOTHING.astype(dtype), axis], {"keepdims": keepdims})
        for kind, opset in (("Max", 18), ("Min", 20), ("Mean", 18), ("Prod", 18), ("Sum", 13))
        for dtype in (np.float32, np.int32)
        for axis, keepdims in ((int64(1), 0), (int64(1, 2), 1), (NO_AXES, 0))
    ),
    ("ReduceMax", 13, [NOTHING], {"axes": [1]}),
    ("ReduceMax", 18, [NOTHING, int64(0)], {}),
    ("ReduceLogSumExp", 18, [NOTHING, int64(1)], {}),
    ("ReduceLogSum", 18, [(4 + X).astype(np.int32), int64(1)], {}),
    ("ReduceLogSumExp", 13, [(4 + X).astype(np.int32)], {"axes": [0, 2]}),
    ("Identity", 16, [X], {}),
    ("Shape", 13, [X], {}),
    ("Shape", 15, [X], {"start": 1}),
    ("Shape", 19, [X], {"start": -2, "end": -1}),
    ("Size", 13, [X], {}),
    ("Reshape", 13, [X, int64(0, -1)], {}),
    ("Reshape", 5, [X, int64(4, 6)], {}),
    ("Reshape", 14, [EMPTY, int64(3, 0)], {"allowzero": 1}),
    ("Reshape", 14, [EMPTY, int64(0, 1, 3)], {}),
    ("Flatten", 13, [X], {}),
    ("Flatten", 11, [X], {"axis": -1}),
    ("Flatten", 9, [X], {"axis": 0}),
    ("Flatten", 9, [X], {"axis": 3}),
    ("Transpose", 13, [X], {}),
    ("Transpose", 1, [X], {"perm": [0, 2, 1]}),
    ("Squeeze", 13, [floats(1, 3, 1), int64(-1)], {}),
    ("Squeeze", 13, [floats(1, 3, 1)], {}),
    ("Squeeze", 11, [floats(1, 3, 1)], {"axes": [0]}),
    ("Squeeze", 1, [floats(1, 3, 1)], {}),
    ("Unsqueeze", 13, [X, int64(-1, 0)], {}),
    ("Unsqueeze", 21, [X, int64(2)], {}),
    ("Unsqueeze", 11, [X], {"axes": [4, 1]}),
    ("Expand", 13, [floats(3, 1), int64(2, 1, 6)], {}),
    ("Expand", 8, [X, int64(1, 1)], {}),
    ("Expand", 13, [EMPTY[:, :1], int64(0, 4)], {}),
    ("Tile", 13, [X, int64(1, 2, 3)], {}),
    ("Tile", 6, [floats(3), int64(0)], {}),
    ("Concat", 13, [X, floats(2, 1, 4)], {"axis": -2}),
    ("Concat", 4, [EMPTY, floats(2, 3)], {"axis": 0}),
    ("DepthToSpace", 13, [IMAGE], {"blocksize": 2}),
    ("DepthToSpace", 11, [IMAGE], {"blocksize": 2, "mode": "CRD"}),
    ("DepthToSpace", 1, [IMAGE], {"blocksize": 2}),
    ("SpaceToDepth", 13, [IMAGE], {"blocksize": 2}),
    ("SpaceToDepth", 28, [IMAGE], {"blocksize": 2, "mode": "CRD"}),
    ("Gather", 13, [X, int64(0, -1, 1)], {"axis": 2}),
    ("Gather", 11, [X, int64(2, 0).reshape(2, 1).astype(np.int32)], {"axis": -2}),
    ("Gather", 1, [X, scalar(1)], {}),
    ("Gather", 13, [X, scalar(-1)], {"axis": 1}),
    ("Gather", 13, [X, np.zeros((0,), np.int64)], {"axis": 1}),
    ("GatherElements", 13, [X, int64(0, -1, 2, 1).reshape(2, 1, 2)], {"axis": 2}),
    ("GatherElements", 11, [X[0], int64(0, 1, 2, -3).reshape(1, 4).astype(np.int32)], {}),
    ("GatherND", 11, [X, int64(0, 1, 1, -1).reshape(2, 2)], {}),
    ("GatherND", 13, [X, int64(1, 0).reshape(2, 1)], {"batch_dims": 1}),
    ("GatherND", 12, [X, rng.integers(0, 4, (2, 3, 5, 1))], {"batch_dims": 2}),
    ("Slice", 13, [X, int64(0, 1), int64(1, MAX)], {}),
    ("Slice", 13, [X, int64(1), int64(-1), int64(2)], {}),
    ("Slice", 11, [X, int64(-1), int64(MIN), int64(-1), int64(-1)], {}),
    ("Slice", 10, [X, int64(MAX, 0), int64(0, 9), int64(2, 1), int64(-2, 2)], {}),
    ("Slice", 13, [X, int64(-2), int64(-9), int64(2), int64(-1)], {}),
    ("Slice", 13, [X, int64(3), int64(1), int64(2)], {}),
    ("Slice", 13, [EMPTY, int64(-1), int64(MIN), int64(0), int64(-1)], {}),
    ("Slice", 1, [X], {"starts": [1, -2], "ends": [2, 100], "axes": [1, 2]}),
    ("ConstantOfShape", 9, [int64(2, 3)], {}),
    ("ConstantOfShape", 9, [int64(2, 0)], {"value": np.array([7], np.int32)}),
    ("ConstantOfShape", 20, [np.zeros((0,), np.int64)], {"value": np.array([True])}),
    ("Range", 11, [scalar(3), scalar(10), scalar(3)], {}),
    ("Range", 11, [scalar(10, np.int32), scalar(4, np.int32), scalar(-2, np.int32)], {}),
    ("Range", 11, [scalar(4), scalar(4), scalar(1)], {}),
    ("Pad", 13, [X, int64(0, 1, 2, 0, 0, 1), scalar(0.5, np.float32)], {}),
    ("Pad", 11, [X, int64(0, -1, 2, 1, 0, -1)], {}),
    ("Pad", 18, [X, int64(1, 2), None, int64(-1)], {"mode": "edge"}),
    ("Pad", 13, [IMAGE, int64(0, 0, 1, 2, 0, 0, 3, 0)], {"mode": "reflect"}),
    ("Pad", 13, [IMAGE, int64(0, 0, 1, 2, 0, 0, 3, 9)], {"mode": "edge"}),
    ("Pad", 13, [X, int64(0, 2, 3, 0, 1, 1)], {"mode": "reflect"}),
    ("Pad", 19, [X, int64(1, 0, 3, 0, 2, 4)], {"mode": "wrap"}),
    ("Pad", 13, [X, int64(0, -1, 1, 0, 1, 2)], {"mode": "edge"}),
    ("Pad", 13, [TIES.astype(np.int64), int64(0, 1, 0, 2), scalar(-5)], {}),
    ("Pad", 2, [X], {"pads": [0, 1, 0, 1, 0, 2], "value": 1.5}),
    ("Pad", 2, [X], {"pads": [0, 1, 0, 0, 0, 2], "mode": "reflect"}),
    ("ReduceMax", 13, [X], {"axes": [0, -1]}),
    ("ReduceMax", 18, [X, int64(1)], {"keepdims": 0}),
    ("ReduceMax", 20, [X > 0, int64(1)], {}),
    ("ReduceMin", 12, [(X * 10).astype(np.int64)], {"axes": [2]}),
    ("ReduceMin", 18, [X], {}),
    ("ReduceMin", 18, [X], {"noop_with_empty_axes": 1}),
    ("ReduceSum", 13, [(X * 10).astype(np.int32), int64(0, 1)], {}),
    ("ReduceMean", 13, [(X * 10).astype(np.int32)], {"axes": [2]}),
    ("ReduceProd", 13, [(X * 10).astype(np.int32)], {"axes": [-1, 0]}),
    ("ReduceL2", 13, [(X * 10).astype(np.int32)], {"axes": [1]}),
    ("ArgMax", 13, [TIES], {"axis": -1}),
    ("ArgMax", 12, [TIES], {"axis": 1, "select_last_index": 1, "keepdims": 0}),
    ("ArgMax", 11, [TIES], {}),
    ("ArgMin", 13, [TIES], {"axis": 1, "keepdims": 0}),
    ("ArgMin", 12, [TIES], {"axis": 1, "select_last_index": 1}),
]

# Sums of at most 24 terms in another order: a few units in the last place of the largest term.
ROUNDED = [
    ("ReduceSum", 13, [X, int64(1, -1)], {"keepdims": 0}),
    ("ReduceSum", 11, [X], {"axes": [-1]}),
    ("ReduceSum", 13, [X], {}),
    ("ReduceSum", 13, [X], {"noop_with_empty_axes": 1}),
    ("ReduceSum", 13, [X, np.zeros((0,), np.int64)], {}),
    ("ReduceSum", 13, [EMPTY, int64(0)], {}),
    ("ReduceMean", 18, [X, int64(2)], {}),
    ("ReduceMean", 11, [X], {"keepdims": 0}),
    ("ReduceProd", 18, [X, int64(0, 2)], {}),
    ("ReduceL1", 13, [X], {"axes": [1]}),
    ("ReduceL2", 18, [X, int64(1)], {}),
    ("ReduceL2", 18, [X], {"noop_with_empty_axes": 1}),
    ("ReduceSumSquare", 13, [X], {"axes": [0, 1]}),
    ("ReduceSumSquare", 18, [X], {"noop_with_empty_axes": 1}),
    ("ReduceLogSum", 13, [np.abs(X)], {"axes": [2]}),
    ("ReduceLogSumExp", 18, [X, int64(1)], {"keepdims": 0}),
    ("Range", 11, [np.array(x, np.float32) for x in (0.5, 3.0, 0.25)], {}),
    ("Range", 11, [np.array(x, np.float32) for x in (1.0, -7.0, -0.3)], {}),
]


@pytest.mark.parametrize(("op_type", "opset", "inputs", "attributes"), MOVED)
def test_equals_onnxruntime(check, op_type, opset, inputs, attributes) -> None:
    check(op_type, opset, inputs, attributes)


@pytest.mark.parametrize(("op_type", "opset", "inputs", "attributes"), ROUNDED)
def test_equals_onnxruntime_up_to_rounding(check, op_type, opset, inputs, attributes) -> None:
    check(op_type, opset, inputs, attributes, rtol=2e-6, atol=2e-6)


def test_split_into_given_sizes(check) -> None:
    check("Split", 13, [X, int64(1, 3)], {"axis": 2}, outputs=2)
    check("Split", 11, [X], {"axis": -1, "split": [3, 1]}, outputs=2)
    check("Split", 18, [X, int64(2, 1)], {"axis": 1}, outputs=2)


def test_split_into_equal_parts(check) -> None:
    check("Split", 13, [X], {"axis": 1}, outputs=3)
    check("Split", 2, [X], {}, outputs=2)


def test_split_gives_the_last_of_num_outputs_less(check) -> None:
    check("Split", 18, [floats(7)], {"num_outputs": 3}, outputs=3)


@pytest.mark.parametrize("attributes", [{}, {"axis": 0}, {"largest": 0}, {"axis": -1}])
def test_topk_takes_the_first_of_equal_values(check, attributes) -> None:
    check("TopK", 11, [TIES, int64(3)], attributes, outputs=2)


def test_topk_of_older_opsets(check) -> None:
    check("TopK", 10, [TIES, int64(2)], {"axis": 0}, outputs=2)
    check("TopK", 1, [TIES], {"k": 4}, outputs=2)


def test_extremes_of_no_booleans_are_those_of_the_type() -> None:
    nothing = torch.zeros(2, 0, dtype=torch.bool)  # onnxruntime refuses them
    assert function("ReduceMax", 20)(nothing, [1], keepdims=0).tolist() == [False, False]
    assert function("ReduceMin", 20)(nothing, [1], keepdims=0).tolist() == [True, True]


def test_split_gives_empty_parts_where_nothing_is_left() -> None:
    parts = function("Split", 18)(torch.arange(4), num_outputs=3)
    assert [p.tolist() for p in parts] == [[0, 1], [2, 3], []]  # onnxruntime refuses these


def test_split_of_the_first_opset_takes_sizes_from_either_place() -> None:
    x = torch.from_numpy(X)
    split = function("Split", 1)
    for parts in (split(x, [1, 3], axis=2), split(x, axis=2, split=[1, 3])):
        assert [p.tolist() for p in parts] == [X[..., :1].tolist(), X[..., 1:].tolist()]
    assert [p.tolist() for p in split(x, output_count=2)] == [X[:1].tolist(), X[1:].tolist()]


@pytest.mark.parametrize("opset", [1, 2, 11, 13])
def test_split_into_unequal_parts_without_sizes_is_refused(opset: int) -> None:
    with pytest.raises(InputError, match="of axis 0, of size 7, into 3 equal parts"):
        function("Split", opset)(torch.zeros(7), output_count=3)


def test_squeeze_of_a_larger_axis_is_refused() -> None:
    for call in (
        lambda: function("Squeeze", 13)(torch.from_numpy(X), [1]),
        lambda: function("Squeeze", 11)(torch.from_numpy(X), axes=[1]),
    ):
        with pytest.raises(InputError, match="Squeeze of axis 1, of size 3"):
            call()


def test_forms_of_the_first_opset() -> None:
    """No other runtime has kernels for these; numpy says what they mean."""
    x = torch.from_numpy(X)
    padded = function("Pad", 1)(x, paddings=[0, 1, 0, 2, 0, 0], value=0.5)
    assert np.array_equal(padded, np.pad(X, [(0, 2), (1, 0), (0, 0)], constant_values=0.5))
    assert np.array_equal(function("Tile", 1)(x, 3, 1), np.tile(X, (1, 3, 1)))
    assert np.array_equal(function("Concat", 1)(x, x), np.concatenate([X, X], 1))
    assert np.array_equal(function("Reshape", 1)(x, shape=[0, -1]), X.reshape(2, -1))
    assert np.array_equal(function("Gather", 1)(x, torch.tensor([-1, 0])), X[[-1, 0]])


@pytest.mark.parametrize(
    ("op_type", "opset", "constants"),
    [
        (f"Reduce{kind}", 18, [[0, 2]])
        for kind in ("Max", "Min", "Mean", "Prod", "L1", "L2", "SumSquare", "LogSumExp")
    ]
    + [("ReduceSum", 13, [[1]]), ("Pad", 18, [[1, 2, 0, 0, 1, 3], None, None])],
)
def test_gradients(check_gradients, op_type, opset, constants) -> None:
    check_gradients(op_type, opset, [torch.from_numpy(X)], constants)
