"""Shape arithmetic on Python integers against onnxruntime and the ONNX reference."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qwrap.model import host, load
from qwrap.model.writer import as_tensor

Build = Callable[..., onnx.ModelProto]
Run = Callable[..., list[np.ndarray]]
small = st.integers(-5, 5)
lists = st.lists(small, max_size=6)
broadcast = st.one_of(
    small, st.lists(small, min_size=1, max_size=1), st.lists(small, min_size=4, max_size=4)
)


def reference(op_type: str, inputs: list[Any], opset: int = 17, **attributes: Any) -> np.ndarray:
    arrays = [None if x is None else np.array(x, bool if is_bool(x) else np.int64) for x in inputs]
    names = ["" if a is None else f"i{n}" for n, a in enumerate(arrays)]
    given_names = [n for n in names if n]
    graph = helper.make_graph(
        [helper.make_node(op_type, names, ["y"], **attributes)],
        "g",
        [onnx.ValueInfoProto(name=n) for n in given_names],
        [onnx.ValueInfoProto(name="y")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    feed = {n: a for n, a in zip(names, arrays, strict=True) if a is not None}
    return ReferenceEvaluator(model).run(None, feed)[0]


def is_bool(x: Any) -> bool:
    return isinstance(x, bool) or (isinstance(x, list) and bool(x) and isinstance(x[0], bool))


def check(op_type: str, inputs: list[Any], opset: int = 17, **attributes: Any) -> None:
    operator = host.HOST_OPERATORS[op_type]
    types = [
        None if x is None else host.HostType(len(x)) if isinstance(x, list) else host.SCALAR
        for x in inputs
    ]
    mine = operator.function(*inputs, **attributes)
    expected = reference(op_type, inputs, opset, **attributes)
    assert mine == expected.tolist()
    # what is predicted without running is what comes out
    predicted = operator.rule(types, inputs, attributes)
    assert predicted is not None
    assert predicted.length == (len(mine) if isinstance(mine, list) else None)


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Min", "Max", "Equal", "Less", "Greater"])
@given(a=broadcast, b=broadcast)
def test_elementwise_operators_broadcast(op_type: str, a: Any, b: Any) -> None:
    check(op_type, [a, b])


@given(a=broadcast, b=broadcast, c=broadcast)
def test_where_picks_by_element(a: Any, b: Any, c: Any) -> None:
    check("Where", [[x > 0 for x in a] if isinstance(a, list) else a > 0, b, c])


@given(a=small, b=small.filter(bool))
def test_division_truncates_towards_zero(a: int, b: int) -> None:
    # the reference evaluator floors; the specification, like onnxruntime, truncates
    assert host.HOST_OPERATORS["Div"].function(a, b) == int(a / b)


def test_division_equals_onnxruntime(build: Build, run_ort: Run) -> None:
    int64 = (TensorProto.INT64, [81])
    a, b = (
        np.array(v) for v in zip(*[(a, b) for a in range(-4, 5) for b in range(-4, 5)], strict=True)
    )
    b = np.where(b == 0, 7, b)
    proto = build([helper.make_node("Div", ["a", "b"], ["y"])], {"a": int64, "b": int64})
    mine = host.HOST_OPERATORS["Div"].function(a.tolist(), b.tolist())
    assert mine == run_ort(proto, {"a": a, "b": b})[0].tolist()


def test_an_empty_list_broadcasts_with_one_entry() -> None:
    check("Add", [[], [1]])
    check("Mul", [[], 3])


@given(data=lists, start=st.integers(-9, 9), end=st.integers(-9, 9), step=small.filter(bool))
def test_slice_cuts_forwards_and_backwards(data: Any, start: int, end: int, step: int) -> None:
    n = len(data)
    first, last = (p + n if p < 0 else p for p in (start, end))
    # the clamping that the specification of Slice spells out
    first = min(max(first, 0), n if step > 0 else n - 1)
    last = min(max(last, 0 if step > 0 else -1), n if step > 0 else n - 1)
    expected = [data[i] for i in range(first, last, step)]
    assert host.slice_(data, [start], [end], [0], [step]) == expected


@pytest.mark.parametrize("start", [-(2**63), -4, -3, -1, 0, 1, 3, 4, 2**63 - 1])
@pytest.mark.parametrize("end", [-(2**63), -4, -3, -1, 0, 1, 3, 4, 2**63 - 1])
@pytest.mark.parametrize("step", [-2, -1, 1, 2])
def test_slice_equals_onnxruntime(
    start: int, end: int, step: int, build: Build, run_ort: Run
) -> None:
    nodes = [helper.make_node("Slice", ["x", "s", "e", "a", "t"], ["y"])]
    arrays = {"s": np.array([start]), "e": np.array([end]), "a": np.array([0])}
    arrays["t"] = np.array([step])
    if step < 0 and end == 2**63 - 1:
        pytest.skip("onnxruntime takes it for the beginning; the specification says: nothing")
    proto = build(nodes, {"x": (TensorProto.INT64, [3])}, initializers=arrays)
    theirs = run_ort(proto, {"x": np.array([7, 8, 9])})[0].tolist()
    assert host.slice_([7, 8, 9], [start], [end], [0], [step]) == theirs


@given(data=st.lists(small, min_size=1, max_size=4), keepdims=st.sampled_from([0, 1]))
def test_the_rest_of_the_table(data: list[int], keepdims: int) -> None:
    check("Concat", [data, [3], []], axis=0)
    check("Gather", [data, 0])
    check("Gather", [data, [-1, 0]])
    check("Unsqueeze", [data[0], [0]])
    check("Squeeze", [data[:1], [0]])
    check("Reshape", [data, [-1]])
    check("Reshape", [data[0], [1]])
    check("ReduceProd", [data], keepdims=keepdims)
    check("Cast", [data], to=TensorProto.BOOL)
    check("Cast", [[x > 0 for x in data]], to=TensorProto.INT64)
    check("Not", [[x > 0 for x in data]])
    for op_type in ("Neg", "Abs", "Identity"):
        check(op_type, [data])


def chain(
    build: Build, opset: int, *nodes: onnx.NodeProto, **arrays: np.ndarray
) -> onnx.ModelProto:
    first = helper.make_node("Shape", ["x"], ["s"])
    return build([first, *nodes], {"x": ["a", "b", 4]}, ["y"], arrays, opset)


def node(op_type: str, *names: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, names[:-1], names[-1:], **attributes)


CHAINS: dict[str, tuple[int, list[onnx.NodeProto], dict[str, np.ndarray]]] = {
    "slice with attributes": (9, [node("Slice", "s", "y", starts=[1], ends=[9], axes=[0])], {}),
    "squeeze with attributes": (
        9,
        [node("Slice", "s", "t", starts=[0], ends=[1]), node("Squeeze", "t", "y", axes=[0])],
        {},
    ),
    "slice without axes but with steps": (
        13,
        [node("Slice", "s", "i", "j", "", "k", "y")],
        {"i": np.array([2]), "j": np.array([-9]), "k": np.array([-1])},
    ),
    "cast to int32": (19, [node("Cast", "s", "y", to=TensorProto.INT32)], {}),
    "an empty list": (
        13, [node("Slice", "s", "i", "j", "y")], {"i": np.array([3]), "j": np.array([5])}
    ),
    "a boolean": (13, [node("Equal", "s", "i", "y")], {"i": np.array([2])}),
    "a reduction over nothing": (
        18,
        [node("ReduceProd", "s", "i", "y", noop_with_empty_axes=1)],
        {"i": np.zeros(0, np.int64)},
    ),
    "a reduction with axes": (17, [node("ReduceProd", "s", "y", axes=[0], keepdims=0)], {}),
    "part of a shape": (15, [node("Shape", "x", "y", start=-2, end=9)], {}),
    "the shape of a shape": (15, [node("Shape", "s", "y")], {}),
    "the number of elements": (13, [node("Size", "x", "y")], {}),
    "data dependent": (
        13, [node("Gather", "s", "i", "y")], {"i": np.array([[0], [1]])}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_shape_arithmetic_equals_onnxruntime_in_value_and_type(
    name: str, build: Build, run_ort: Run, run_qwrap: Run
) -> None:
    opset, nodes, arrays = CHAINS[name]
    proto = chain(build, opset, *nodes, **arrays)
    feed = {"x": np.zeros((2, 3, 4), np.float32)}
    (mine,), (theirs,) = run_qwrap(load(proto), feed), run_ort(proto, feed)
    assert (mine.tolist(), mine.dtype, mine.shape) == (theirs.tolist(), theirs.dtype, theirs.shape)


def test_attributes_that_do_not_concern_integers_are_no_obstacle(build: Build) -> None:
    # onnxruntime refuses this flag on integers, ONNX does not
    proto = chain(build, 19, node("Cast", "s", "y", to=TensorProto.INT32, saturate=0))
    assert load(proto)(torch.zeros(2, 3, 4)).tolist() == [2, 3, 4]


@pytest.mark.parametrize("value", [3, True, 2.5, [1, 2], [True], []])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_number_becomes_the_same_tensor_on_any_device(value: Any, dtype: Any) -> None:
    if value == 2.5 and dtype is None:
        dtype = torch.float64
    there = as_tensor(value, dtype, torch.device("meta"))
    here = as_tensor(value, dtype, torch.device("cpu"))
    assert (there.shape, there.dtype) == (here.shape, here.dtype)
    assert here.tolist() == value
