"""Loop and Scan: against onnxruntime, with captures, taps, gradients, and nested in each other."""

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
F, INT, B = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def value(name: str, kind: int = F, shape: list[int | str] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def node(op_type: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), outputs.split(), **attributes)


def body(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
) -> onnx.GraphProto:
    return helper.make_graph(nodes, "body", inputs, outputs)


def loop_body(*nodes: onnx.NodeProto, scans: tuple[str, ...] = ()) -> onnx.GraphProto:
    """A body that carries ``a`` into ``b``; ``again`` says whether to go on."""
    outputs = [value("again", B, []), value("b"), *(value(name) for name in scans)]
    return body(list(nodes), [value("i", INT, []), value("go", B, []), value("a")], outputs)


STAY = node("Identity", "go", "again")
SCALE = node("Mul", "a x", "t")  # x is captured


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_loop_with_a_trip_count_agrees_with_onnxruntime(
    steps: int, build: Build, run_ort: Run, run_qwrap: Run
) -> None:
    inner = loop_body(STAY, SCALE, node("Tanh", "t", "b"), node("Neg", "b", "s"), scans=("s",))
    graph = [helper.make_node("Loop", ["n", "", "x"], ["y", "ys"], "loop", body=inner)]
    proto = build(graph, {"x": [2, 3], "n": (INT, [])}, ["y", "ys"])
    feed = {"x": X, "n": np.array(steps)}
    for ours, theirs in zip(run_qwrap(load(proto), feed), run_ort(proto, feed), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # tanh differs in the last bit


@pytest.mark.parametrize("limit", [2, 100])
@pytest.mark.parametrize("start", [True, False])
def test_a_condition_ends_a_loop(
    limit: int, start: bool, build: Build, run_ort: Run, run_qwrap: Run
) -> None:
    nodes = (
        node("Add", "a a", "b"),
        node("ReduceMax", "b", "m", keepdims=0),
        node("Less", "m bound", "again"),
        node("Cast", "i", "s", to=F),
    )
    graph = [
        helper.make_node("Loop", ["n", "c", "x"], ["y", "ys"], body=loop_body(*nodes, scans=("s",)))
    ]
    inputs = {"x": [2, 3], "n": (INT, []), "c": (B, [])}
    proto = build(graph, inputs, ["y", "ys"], {"bound": np.float32(50)})
    feed = {"x": X, "n": np.array(limit), "c": np.array(start)}
    for ours, theirs in zip(run_qwrap(load(proto), feed), run_ort(proto, feed), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_without_a_condition_of_its_own_a_loop_is_a_plain_range(build: Build) -> None:
    graph = [helper.make_node("Loop", ["n", "", "x"], ["y"], body=loop_body(STAY, SCALE, ADD))]
    model = load(build(graph, {"x": [2, 3]}, initializers={"n": np.array(3)}))
    assert "in range(3):" in model.source
    assert "break" not in model.source
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.from_numpy(X)
    assert torch.equal(compiled(x), model(x))


ADD = node("Add", "t x", "b")


def test_gradients_flow_through_loops_into_captured_and_carried_values(build: Build) -> None:
    graph = [helper.make_node("Loop", ["n", "", "x"], ["y"], body=loop_body(STAY, SCALE, ADD))]
    model = load(build(graph, {"x": [2, 3]}, initializers={"n": np.array(3)}))
    x = torch.tensor(X, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None  # y = x^4 + x^3 + x^2 + x
    np.testing.assert_array_equal(x.grad, 4 * X**3 + 3 * X**2 + 2 * X + 1)


def test_taps_and_watchers_see_every_iteration(build: Build) -> None:
    class Halve(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 2

    graph = [helper.make_node("Loop", ["n", "", "x"], ["y"], body=loop_body(STAY, SCALE, ADD))]
    model = load(build(graph, {"x": [2, 3]}, initializers={"n": np.array(3)}))
    seen: list[torch.Tensor] = []
    x = torch.from_numpy(X)
    with model.watching({"t": seen.append, "a": seen.append}):
        model(x)
    expected = [x, x * x]
    for _ in range(2):
        expected += [expected[-1] + x, (expected[-1] + x) * x]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    model.attach({ValuePoint("t"): Halve(), ValuePoint("a"): Halve()})
    halved = x
    for _ in range(3):
        halved = halved / 2 * x / 2 + x
    assert torch.equal(model(x), halved)


def test_a_loop_in_an_if_in_a_loop_agrees_with_onnxruntime(
    build: Build, run_ort: Run, run_qwrap: Run
) -> None:
    inner = body(
        [node("Identity", "go2", "again2"), node("Add", "c2 a", "d2")],
        [value("j", INT, []), value("go2", B, []), value("c2")],
        [value("again2", B, []), value("d2")],
    )
    then = body([helper.make_node("Loop", ["i", "", "x"], ["o"], body=inner)], [], [value("o")])
    otherwise = body([node("Neg", "a", "o2")], [], [value("o2")])
    outer = loop_body(
        STAY,
        node("Mod", "i two", "odd"),
        node("Cast", "odd", "is_odd", to=B),
        helper.make_node("If", ["is_odd"], ["b"], then_branch=then, else_branch=otherwise),
    )
    graph = [helper.make_node("Loop", ["n", "", "x"], ["y"], body=outer)]
    proto = build(graph, {"x": [2, 3], "n": (INT, [])}, initializers={"two": np.array(2)})
    feed = {"x": X, "n": np.array(6)}
    np.testing.assert_array_equal(run_qwrap(load(proto), feed)[0], run_ort(proto, feed)[0])


def test_a_loop_may_carry_values_whose_shape_grows(
    build: Build, run_ort: Run, run_qwrap: Run
) -> None:
    inner = loop_body(STAY, node("Concat", "a x", "b", axis=0))
    graph = [helper.make_node("Loop", ["n", "", "x"], ["y"], body=inner)]
    proto = build(graph, {"x": ["r", 3], "n": (INT, [])})
    feed = {"x": X, "n": np.array(3)}
    np.testing.assert_array_equal(run_qwrap(load(proto), feed)[0], run_ort(proto, feed)[0])


def scan() -> onnx.GraphProto:
    """A running sum of products of two sequences, and the negative of each step."""
    return body(
        [node("Mul", "u v", "p"), node("Add", "s p", "s2"), node("Neg", "s2", "o")],
        [value("s", F, [3]), value("u", F, [3]), value("v", F, [3])],
        [value("s2", F, [3]), value("o", F, [3])],
    )


@pytest.mark.parametrize("backwards", [[0, 0], [1, 0]])
@pytest.mark.parametrize("axes", [[0, 0], [0, 1]])
@pytest.mark.parametrize("out", [(0, 0), (1, 0), (-1, 1)])
def test_a_scan_agrees_with_onnxruntime(
    backwards: list[int], axes: list[int], out: tuple[int, int], build: Build, run_ort: Run,
    run_qwrap: Run,
) -> None:  # fmt: skip
    shapes = [[4, 3] if axis == 0 else [3, 4] for axis in axes]
    scanning = helper.make_node(
        "Scan", ["s0", "x", "w"], ["y", "ys"], body=scan(), num_scan_inputs=2,
        scan_input_axes=axes, scan_input_directions=backwards,
        scan_output_axes=[out[0]], scan_output_directions=[out[1]],
    )  # fmt: skip
    proto = build([scanning], {"s0": [3], "x": shapes[0], "w": shapes[1]}, ["y", "ys"])
    rng = np.random.default_rng(0)
    sizes = {"s0": [3], "x": shapes[0], "w": shapes[1]}
    feed = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    for ours, theirs in zip(run_qwrap(load(proto), feed), run_ort(proto, feed), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("lengths", [None, [4, 2], [1, 3]])
def test_a_scan_of_opset_8_runs_over_a_batch(
    lengths: list[int] | None, build: Build, run_ort: Run, run_qwrap: Run
) -> None:
    given = "" if lengths is None else "lengths"
    scanning = helper.make_node(
        "Scan", [given, "s0", "x", "w"], ["y", "ys"], body=scan(), num_scan_inputs=2,
        directions=[0, 1],
    )  # fmt: skip
    inputs = {"s0": [2, 3], "x": [2, 4, 3], "w": [2, 4, 3]}
    constants = {} if lengths is None else {"lengths": np.array(lengths)}
    proto = build([scanning], inputs, ["y", "ys"], constants, opset=8)
    rng = np.random.default_rng(0)
    feed = {name: rng.normal(size=shape).astype(np.float32) for name, shape in inputs.items()}
    for ours, theirs in zip(run_qwrap(load(proto), feed), run_ort(proto, feed), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_loop_frees_what_its_body_made(build: Build) -> None:
    graph = [helper.make_node("Loop", ["n", "", "x"], ["y"], body=loop_body(STAY, SCALE, ADD))]
    model = load(build(graph, {"x": [2, 3]}, initializers={"n": np.array(3)}))
    lines = [line.strip() for line in model.source.splitlines()]
    assert sum(line.startswith("del ") for line in lines) >= 2
