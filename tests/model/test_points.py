"""What may sit on the points of a graph, and what may run in place of its operators."""

import copy
import pickle
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from qwrap.errors import ModelError
from qwrap.model import OutputPoint, Program, UsePoint, ValuePoint, WrappedModel, load

Build = Callable[..., onnx.ModelProto]


class Plus(nn.Module):
    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = nn.Parameter(torch.tensor(amount))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.amount


@pytest.fixture
def model(build: Build) -> WrappedModel:
    """y = (x @ w) * 2 + (x @ w); w is the identity."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "/fc/MatMul"),
        helper.make_node("Mul", ["a", "two"], ["b"], "/mul/Mul"),
        helper.make_node("Add", ["b", "a"], ["y"], "/Add"),
        helper.make_node("Shape", ["y"], ["s"], "/Shape"),
        helper.make_node("Reshape", ["y", "s"], ["z"], "/Reshape"),
    ]
    arrays = {"w": np.eye(2, dtype=np.float32), "two": np.array([2], np.float32)}
    return load(build(nodes, {"x": ["n", 2]}, ["z"], arrays))


ONES = torch.ones(1, 2)


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        (ValuePoint("x"), 33.0),  # (1 + 10) * 3
        (ValuePoint("a"), 33.0),
        (ValuePoint("b"), 13.0),  # 2 + 10 + 1
        (ValuePoint("y"), 13.0),
        (ValuePoint("z"), 13.0),
        (UsePoint("/Add", 1), 13.0),  # only this reader of a sees it
        (UsePoint("/mul/Mul", 0), 23.0),
        (UsePoint("/mul/Mul", 1), 13.0),  # 1 * 12 + 1
        (UsePoint("/fc/MatMul", 1), 63.0),  # w + 10 has columns of 11 and 10
    ],
)
def test_a_tap_sits_on_a_value_or_on_one_use(
    model: WrappedModel, point: ValuePoint | UsePoint, expected: float
) -> None:
    tap = Plus(10.0)
    model.attach({point: tap})
    assert model(ONES).detach().tolist() == [[expected, expected]]
    assert model.tap(point) is tap
    model(ONES).sum().backward()
    assert tap.amount.grad is not None


@pytest.mark.parametrize(
    "point",
    [
        *(ValuePoint("none"), ValuePoint("w"), UsePoint("/Add", 7), UsePoint("/none", 0)),
        *(ValuePoint("s"), UsePoint("/Reshape", 1), UsePoint("/Shape", 0)),  # these are numbers
    ],
)
def test_a_place_where_no_tensor_passes_is_refused(
    model: WrappedModel, point: ValuePoint | UsePoint
) -> None:
    model.attach({ValuePoint("a"): Plus(1.0)})
    before = model(ONES)
    with pytest.raises(ModelError, match="has no such place"):
        model.attach({ValuePoint("b"): Plus(1.0), point: Plus(1.0)})
    assert torch.equal(model(ONES), before)
    assert list(model.attached) == [ValuePoint("a")]


def test_taps_are_submodules_of_the_block_that_runs_them(model: WrappedModel) -> None:
    plain = list(model.state_dict())
    model.attach({ValuePoint("a"): Plus(1.0), UsePoint("/mul/Mul", 0): Plus(2.0)})
    added = [key for key in model.state_dict() if key not in plain]
    assert added == ["fc.taps.a.amount", "mul.taps./mul/Mul:0.amount"]
    model.attach({ValuePoint("y"): Plus(3.0)})
    assert [key for key in model.state_dict() if key not in plain] == ["taps.y.amount"]
    model.attach({})
    assert list(model.state_dict()) == plain
    assert "taps" not in str(model)
    assert model(ONES).tolist() == [[3, 3]]


def test_a_tap_on_a_graph_output_is_for_the_caller_alone(build: Build) -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["y"], "/Neg"),
        helper.make_node("Mul", ["y", "y"], ["z"], "/Mul"),
    ]
    model = load(build(nodes, {"x": ["n", 2]}, ["z", "y"], {}))
    model.attach({OutputPoint(1): Plus(10.0)})
    z, y = model(ONES)
    assert (z.tolist(), y.tolist()) == ([[1.0, 1.0]], [[9.0, 9.0]])


def test_a_tap_on_several_points_is_one_submodule_with_its_tensors_saved_once(
    model: WrappedModel,
) -> None:
    plus = Plus(10.0)
    points = [UsePoint("/Add", 0), UsePoint("/Add", 1), UsePoint("/mul/Mul", 0)]  # in two Blocks
    model.attach(dict.fromkeys(points, plus))
    for found in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert found(ONES).tolist() == [[43.0, 43.0]]  # (1 + 10) * 2 + 10, and 1 + 10
        (name,) = [key for key in found.state_dict() if key.endswith("amount")]
        taps = {found.tap(point) for point in points}
        assert len(taps) == 1
        assert taps.pop().amount is found.get_parameter(name)


def test_tap_names_that_look_alike_stay_apart(build: Build) -> None:
    names = ["a.b", "a_b", "keys", ""]
    nodes = [
        helper.make_node("Relu", ["x"], [names[0]]),
        helper.make_node("Relu", [names[0]], [names[1]]),
        helper.make_node("Relu", [names[1]], [names[2]]),
    ]
    model = load(build(nodes, {"x": [1]}, ["keys"]))
    model.attach({ValuePoint(name): Plus(10.0**i) for i, name in enumerate(names[:3])})
    assert model(torch.zeros(1)).item() == 111
    assert len([k for k in model.state_dict() if k.endswith("amount")]) == 3


def test_a_running_program_replaces_taps_and_kernels(model: WrappedModel) -> None:
    model.attach({ValuePoint("a"): Plus(10.0)})
    seen: list[tuple[object, ...]] = []

    def product(*inputs: Tensor) -> Tensor:
        seen.append(tuple(type(x) for x in inputs))
        return inputs[0] * 100

    program = Program(taps={ValuePoint("y"): lambda t: -t}, kernels={"/mul/Mul": product})
    with model.running(program):
        assert model(ONES).tolist() == [[-101, -101]]
        with model.running(Program()):
            assert model(ONES).tolist() == [[3, 3]]
        assert model(ONES).tolist() == [[-101, -101]]
    assert seen[0] == (Tensor, Tensor)
    assert model(ONES).detach().tolist() == [[33, 33]]


def test_a_program_ends_with_an_exception_too(model: WrappedModel) -> None:
    with pytest.raises(ZeroDivisionError), model.running(Program(taps={ValuePoint("y"): len})):
        raise ZeroDivisionError
    assert model(ONES).tolist() == [[3, 3]]
    with pytest.raises(ModelError, match="no program 'exact'"), model.running("exact"):
        pass


def test_watchers_see_values_after_their_tap_in_every_program(model: WrappedModel) -> None:
    model.attach({ValuePoint("a"): Plus(10.0)})
    seen: dict[str, list[float]] = {name: [] for name in ("x", "a", "z")}
    watchers = {name: (lambda t, n=name: seen[n].append(t[0, 0].item())) for name in seen}
    with model.watching(watchers):
        model(ONES)
        with model.running(Program()):
            model(ONES)  # not watched: another program
    with model.running(Program()), model.watching(watchers):
        model(ONES)
    model(ONES)
    assert seen == {"x": [1, 1], "a": [11, 1], "z": [33, 3]}
    with pytest.raises(ModelError, match=r"no tensors \['none'\]"), model.watching({"none": id}):
        pass
