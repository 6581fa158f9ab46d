"""If: constant, host and tensor conditions, captured values, nesting, repeated names."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from qwrap.model import ValuePoint, load

Build = Callable[..., onnx.ModelProto]
Run = Callable[..., list[np.ndarray]]
X = np.array([[1, -2, 3], [-4, 5, -6]], np.float32)


def branch(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("o",)) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "b", [], [onnx.ValueInfoProto(name=n) for n in outputs])


def choose(
    condition: str, then: onnx.GraphProto, otherwise: onnx.GraphProto, *outputs: str
) -> onnx.NodeProto:
    return helper.make_node(
        "If", [condition], outputs or ["y"], "if", then_branch=then, else_branch=otherwise
    )


RELU = branch(helper.make_node("Relu", ["x"], ["t"]), helper.make_node("Neg", ["t"], ["o"]))
TWICE = branch(helper.make_node("Add", ["x", "x"], ["t"]), helper.make_node("Abs", ["t"], ["o"]))


@pytest.mark.parametrize("shape", [[], [1]])
@pytest.mark.parametrize("value", [True, False])
def test_a_tensor_condition_picks_the_branch(
    value: bool, shape: list[int], build: Build, run_ort: Run, run_qwrap: Run
) -> None:
    proto = build([choose("k", RELU, TWICE)], {"x": [2, 3], "k": (TensorProto.BOOL, shape)})
    feed = {"x": X, "k": np.full(shape, value)}
    np.testing.assert_array_equal(run_qwrap(load(proto), feed)[0], run_ort(proto, feed)[0])


@pytest.mark.parametrize("value", [True, False])
def test_only_the_taken_branch_of_a_constant_condition_must_be_supported(
    value: bool, build: Build
) -> None:
    odd = helper.make_node("Unknown", ["x"], ["o"], domain="com.example")
    branches = (RELU, branch(odd)) if value else (branch(odd), RELU)
    extra = [helper.make_opsetid("com.example", 1)]
    nodes = [choose("k", *branches)]
    proto = build(nodes, {"x": [2, 3]}, initializers={"k": np.array(value)}, extra=extra)
    model = load(proto)
    assert "if " not in model.source
    np.testing.assert_array_equal(model(torch.from_numpy(X)), -np.maximum(X, 0))


@pytest.mark.parametrize("rank_of_condition", [0, 1])
@pytest.mark.parametrize("rows", [2, 3])
def test_a_condition_on_shapes_is_a_python_number(
    rows: int, rank_of_condition: int, build: Build, run_ort: Run, run_qwrap: Run
) -> None:
    index = np.zeros([1] * rank_of_condition, np.int64)
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "i"], ["n"]),
        helper.make_node("Equal", ["n", "three"], ["k"]),
        choose("k", RELU, TWICE),
    ]
    arrays = {"i": index, "three": np.full_like(index, 3)}
    proto = build(nodes, {"x": ["n", 3]}, initializers=arrays)
    feed = {"x": np.resize(X, (rows, 3))}
    model = load(proto)
    np.testing.assert_array_equal(run_qwrap(model, feed)[0], run_ort(proto, feed)[0])
    assert "bool(" not in model.source


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_nested_branches_capture_values_of_every_level(
    outer: bool, inner: bool, build: Build, run_ort: Run, run_qwrap: Run
) -> None:
    deep = branch(
        helper.make_node("Mul", ["m", "w"], ["t"]), helper.make_node("Sub", ["t", "x"], ["o"])
    )
    flat = branch(helper.make_node("Add", ["a", "m"], ["o"]))
    then = branch(
        helper.make_node("Mul", ["a", "a"], ["m"]),
        helper.make_node("If", ["k2"], ["p"], "inner", then_branch=deep, else_branch=flat),
        helper.make_node("Identity", ["m"], ["q"]),
        outputs=("p", "q"),
    )
    otherwise = branch(
        helper.make_node("Neg", ["a"], ["t"]),
        helper.make_node("Identity", ["w"], ["u"]),
        helper.make_node("Add", ["u", "a"], ["v"]),
        outputs=("t", "v"),
    )
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        choose("k", then, otherwise, "r", "s"),
        helper.make_node("Add", ["r", "s"], ["y"]),
    ]
    flags = {"k": (TensorProto.BOOL, []), "k2": (TensorProto.BOOL, [])}
    weights = {"w": np.array([1, 2, 3], np.float32)}
    proto = build(nodes, {"x": [2, 3], **flags}, initializers=weights)
    feed = {"x": X, "k": np.array(outer), "k2": np.array(inner)}
    np.testing.assert_array_equal(run_qwrap(load(proto), feed)[0], run_ort(proto, feed)[0])


def test_unused_results_of_a_branch_are_dropped(build: Build) -> None:
    both = branch(
        helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["x"], ["b"]),
        outputs=("a", "b"),
    )  # fmt: skip
    other = branch(
        helper.make_node("Abs", ["x"], ["c"]), helper.make_node("Neg", ["x"], ["d"]),
        outputs=("c", "d"),
    )  # fmt: skip
    nodes = [choose("k", both, other, "", "y")]
    proto = build(nodes, {"x": [2, 3], "k": (TensorProto.BOOL, [])})
    assert load(proto)(x=torch.from_numpy(X), k=torch.tensor(True)).tolist() == (-X).tolist()


def test_branches_that_use_one_name_do_not_share_its_type(
    build: Build, run_ort: Run, run_qwrap: Run
) -> None:
    """In one branch ``s`` has three entries, in the other two: both reshape by it."""
    three = branch(
        helper.make_node("Unsqueeze", ["x", "axis"], ["u"]),
        helper.make_node("Shape", ["u"], ["s"]),
        helper.make_node("Reshape", ["x", "s"], ["r"]),
        helper.make_node("ReduceMax", ["r"], ["o"], axes=[0], keepdims=0),
    )
    two = branch(
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Reshape", ["x", "s"], ["o"]),
    )
    inputs = {"x": ["a", "b"], "k": (TensorProto.BOOL, [])}
    proto = build([choose("k", three, two)], inputs, initializers={"axis": np.array([0])})
    for value in (True, False):
        feed = {"x": X, "k": np.array(value)}
        np.testing.assert_array_equal(run_qwrap(load(proto), feed)[0], run_ort(proto, feed)[0])


def test_a_tap_inside_a_branch_works_and_passes_gradients(build: Build) -> None:
    proto = build([choose("k", RELU, TWICE)], {"x": [2, 3], "k": (TensorProto.BOOL, [])})
    model = load(proto)
    keys = [key for key in model.graph.values if key.endswith("t")]
    assert keys == ["t", "/if.then_branch/t"]
    scale = torch.nn.PReLU(init=3.0)  # relu's outputs are positive: PReLU changes only TWICE's
    model.attach({ValuePoint(key): scale for key in keys})
    x = torch.from_numpy(X).requires_grad_()
    result = model(x=x, k=torch.tensor(False))
    doubled = 2 * X
    np.testing.assert_array_equal(
        result.detach(), np.abs(np.where(doubled < 0, 3 * doubled, doubled))
    )
    result.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == np.where(X < 0, -6, 2).tolist()
    assert scale.weight.grad is not None
