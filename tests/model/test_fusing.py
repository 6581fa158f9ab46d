"""Nodes that run as one call: when they do, when they do not, and that both give the same."""

import copy
import pickle

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qwrap.model import Program, UsePoint, ValuePoint, WrappedModel, load

SILU = "s = Sigmoid(x) y = Mul(x, s)"
GELU = "d = Div(x, root) e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Mul(m, half)"
LINEAR = "p = MatMul(x, w) y = Add(b, p)"
ROOT = {"root": np.array(2**0.5), "one": np.array(1.0), "half": np.array(0.5)}
LINEAR_WEIGHTS = {"w": np.random.default_rng(0).normal(size=(4, 5)), "b": np.arange(5.0)}
CASES = {"silu": (SILU, {}), "gelu": (GELU, ROOT), "linear": (LINEAR, LINEAR_WEIGHTS)}


def proto(
    nodes: str, weights: dict[str, np.ndarray], outputs: str = "float[N,3,M] y"
) -> onnx.ModelProto:
    header = '<ir_version: 8, opset_import: ["": 17]>'
    model = onnx.parser.parse_model(f"{header} g (float[N,3,4] x) => ({outputs}) {{{nodes}}}")
    for node in model.graph.node:
        node.name = f"/{node.output[0]}"
    for name, array in weights.items():
        tensor = numpy_helper.from_array(array.astype(np.float32), name)
        model.graph.initializer.append(tensor)
    return model


def lines(model: WrappedModel) -> int:
    """How many calls the forward makes."""
    return model.source.count(" = ")


X = torch.linspace(-6, 6, 24).reshape(2, 3, 4)


@pytest.mark.parametrize("name", CASES)
def test_the_call_computes_what_the_nodes_compute(name: str) -> None:
    model = load(proto(*CASES[name]))
    assert f"{name}(" in model.source
    assert lines(model) == 1
    assert all(f"'/{node.output[0]}'" in model.source for node in proto(*CASES[name]).graph.node)
    x = X.clone().requires_grad_()
    inputs = [x, *model.parameters()]
    results = []
    for program in (model.program, Program(taps={ValuePoint("y"): lambda t: t})):
        with model.running(program):
            y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)  # a few roundings


@pytest.mark.parametrize("name", CASES)
def test_whatever_looks_at_a_node_lets_all_run_alone(name: str) -> None:
    model = load(proto(*CASES[name]))
    inner = proto(*CASES[name]).graph.node[0].output[0]
    seen: list[torch.Tensor] = []
    programs = (
        Program(watchers={inner: seen.append}),
        Program(taps={ValuePoint(inner): lambda t: t}),
        Program(taps={UsePoint("/y", 0): lambda t: t}),
        Program(kernels={"/y": torch.add}),
    )
    for program in programs:
        with model.running(program):
            assert f"{name}(" not in model.source
            model(X)
    assert len(seen) == 1
    with model.watching({"x": seen.append, "y": seen.append}):
        assert f"{name}(" in model.source
        result = model(X)
    assert [value is X for value in seen[1:]] == [True, False]
    assert seen[2] is result


NOT_FUSED = {
    "the gate of another value": ("n = Neg(x) s = Sigmoid(n) y = Mul(x, s)", {}),
    "an inner value that goes on": ("s = Sigmoid(x) m = Mul(x, s) y = Add(m, s)", {}),
    "another constant": (GELU, {**ROOT, "root": np.array(1.5)}),
    "a constant that trains": (GELU, {**ROOT, "half": np.full(4, 0.5)}),
    "a bias for each row": (LINEAR, {**LINEAR_WEIGHTS, "b": np.ones((3, 1))}),
    "a bias of one number": (LINEAR, {**LINEAR_WEIGHTS, "b": np.ones(1)}),
    "a stack of matrices": (LINEAR, {**LINEAR_WEIGHTS, "w": np.ones((2, 4, 5))}),
    "a computed matrix": (
        "v = Neg(w) p = MatMul(x, v) y = Add(b, p)", LINEAR_WEIGHTS
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_FUSED)
def test_what_is_not_the_pattern_stays_as_it_is(name: str) -> None:
    nodes, weights = NOT_FUSED[name]
    model = load(proto(nodes, weights))
    assert lines(model) == len(proto(nodes, weights).graph.node)


def test_an_inner_value_that_is_an_output_stays() -> None:
    model = load(proto(SILU, {}, "float[N,3,M] y, float[N,3,M] s"))
    y, s = model(X)
    assert torch.equal(s, X.sigmoid())
    assert torch.equal(y, X * s)


def test_a_number_that_is_trained_by_request_stays_an_operand() -> None:
    model = load(proto(GELU, ROOT), parameters=["half"])
    model(X).sum().backward()
    assert model.stored("half").grad is not None


@pytest.mark.parametrize("name", CASES)
def test_copies_and_half_precision(name: str) -> None:
    model = load(proto(*CASES[name]))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), model(X))
    half = model.bfloat16()(X.bfloat16())
    assert half.dtype == torch.bfloat16


def test_additions_of_opset_6_that_name_an_axis_stay() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], "/p"),
        helper.make_node("Add", ["p", "b"], ["y"], "/y", broadcast=1, axis=0),
    ]
    arrays = {"w": np.eye(5, dtype=np.float32), "b": np.arange(5, dtype=np.float32)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 5])],
        [numpy_helper.from_array(a, name) for name, a in arrays.items()],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 6)], ir_version=3))
    y = model(torch.zeros(5, 5))
    assert torch.equal(y, torch.arange(5.0)[:, None].expand(5, 5))
