"""A part computes, bit for bit, what the whole model computes between its ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

import qwrap
from qwrap.errors import ModelError
from qwrap.graph.index import walk_nodes
from qwrap.model import WrappedModel
from qwrap.model.batches import to_inputs
from qwrap.model.part import part_of
from qwrap.model.points import OutputPoint, Program, UsePoint, ValuePoint

RESIDUAL = """
    a = Conv<pads=[1,1,1,1]>(x, w1, b1) b = Relu(a)
    c = Conv<pads=[1,1,1,1]>(b, w2, b2) d = Add(c, a) e = Relu(d)
    s = Shape(b) n = Gather<axis=0>(s, zero) m = Unsqueeze(n, axes) o = Concat<axis=0>(m, rest)
    y = Reshape(e, o)
"""
WEIGHTS = {
    "w1": (3, 3, 3, 3),
    "b1": (3,),
    "w2": (3, 3, 3, 3),
    "b2": (3,),
    "zero": np.array(0),
    "axes": np.array([0]),
    "rest": np.array([-1]),
}


@pytest.fixture
def model(small: Any) -> WrappedModel:
    source = small.build(RESIDUAL, WEIGHTS, outputs="float[N,M] y")
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(weight="int4"))
    qwrap.calibrate(model, small.batches(), progress=False)
    return model


@torch.no_grad()
def seen(model: WrappedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Every tensor of the main graph as its readers see it, and the graph inputs."""
    graph, found = model.graph, dict(inputs)
    made = {graph.key(v) for n in model.layout.region.nodes() for v in n.outputs if v.name}
    keys = made - model.layout.values.hosts.keys()
    with model.watching({key: lambda x, key=key: found.update({key: x}) for key in keys}):
        model(**inputs)
    return found


@torch.no_grad()
def run(part: WrappedModel, values: Mapping[str, Any]) -> tuple[Any, ...]:
    # Where nothing sits on any point, chains of nodes are computed in one kernel, not bit for bit.
    taps = {**part.program.taps, OutputPoint(0): torch.nn.Identity()}
    with part.running(Program(taps, part.program.kernels)):
        result = part(*(values[name] for name in part.input_names))
    return result if isinstance(result, tuple) else (result,)


def same(some: Iterable[Any], others: Iterable[Any]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def test_a_part_computes_what_the_model_does_between_its_ends(model: Any, small: Any) -> None:
    values = seen(model, to_inputs(small.batches()[0], model))
    part = part_of(model, ["a", "b"], ["d", "e"], shared=True)
    assert part.input_names == ["a", "b"]
    assert same(run(part, values), [values["d"], values["e"]])


def test_a_part_holds_only_the_nodes_it_needs_under_the_same_keys(model: Any) -> None:
    part = part_of(model, ["b"], ["c"], shared=True)
    assert set(part.graph.nodes) == {"/c"}
    assert set(part.layout.slots) == {"w2", "b2"}


def test_shape_arithmetic_is_done_again_from_the_tensor_it_reads(model: Any, small: Any) -> None:
    values = seen(model, to_inputs(small.batches()[0], model))
    part = part_of(model, ["b", "e"], ["y"], shared=True)
    assert same(run(part, values), [values["y"]])


def test_what_no_input_gives_comes_from_the_graph_inputs(model: Any, small: Any) -> None:
    values = seen(model, to_inputs(small.batches()[0], model))
    part = part_of(model, ["c"], ["d"], shared=True)
    assert part.input_names == ["c", "x"]
    assert same(run(part, values), [values["d"]])


def test_a_shared_part_has_the_very_tensors_and_modules(model: Any) -> None:
    part = part_of(model, ["b"], ["e"], shared=True)
    assert all(part.stored(key) is model.stored(key) for key in part.layout.slots)
    assert all(part.tap(point) is model.tap(point) for point in part.attached)
    assert {UsePoint("/c", 1), ValuePoint("c")} <= part.attached.keys()


def test_nothing_sits_on_given_inputs_but_on_those_of_the_model(model: Any) -> None:
    assert ValuePoint("b") in model.attached
    assert ValuePoint("b") not in part_of(model, ["b"], ["c"], shared=True).attached
    assert ValuePoint("x") in part_of(model, ["x"], ["a"], shared=True).attached


def test_what_sits_on_a_graph_output_sits_on_it_in_its_new_place(model: Any) -> None:
    tap = torch.nn.Identity()
    model.attach({OutputPoint(0): tap})
    part = part_of(model, ["b", "a"], ["e", "y"], shared=True)
    assert part.attached.keys() == {OutputPoint(1)}
    assert part.tap(OutputPoint(1)) is tap


def test_a_float_part_is_that_of_the_graph(model: Any, small: Any) -> None:
    reference = WrappedModel(model.graph).eval()
    values = seen(reference, to_inputs(small.batches()[0], model))
    part = part_of(model, ["b", "a"], ["e"], shared=False)
    with torch.no_grad():
        model.stored("w2").zero_()
    assert not part.attached
    assert same(run(part, values), [values["e"]])


def test_gradients_reach_the_parameters_of_the_whole(model: Any, small: Any) -> None:
    values = seen(model, to_inputs(small.batches()[0], model))
    part_of(model, ["b", "a"], ["e"], shared=True)(values["b"], values["a"]).sum().backward()
    assert model.stored("b2").grad is not None
    assert model.stored("b1").grad is None


def test_training_moves_neither_the_modes_nor_the_model(model: Any) -> None:
    model.train()
    model.tap(UsePoint("/c", 1)).eval()
    part = part_of(model, ["b"], ["c"], shared=True)
    assert part.training
    assert not model.tap(UsePoint("/c", 1)).training


def test_ends_that_are_no_tensors_are_refused(model: Any) -> None:
    with pytest.raises(ModelError, match="'nothing' is no tensor of the main graph"):
        part_of(model, ["b"], ["nothing"], shared=True)


def test_one_output_of_a_needed_node_cannot_be_given(small: Any) -> None:
    nodes = "a, b = Split<axis=1>(x, sizes) c = Add(a, b) y = Relu(c)"
    model = qwrap.load(small.build(nodes, {"sizes": np.array([1, 2])}))
    with pytest.raises(ModelError, match="makes 'a', an input of the part, and another"):
        part_of(model, ["a"], ["y"], shared=True)


FLOW = """
    a = Conv<pads=[1,1,1,1]>(x, w1) s = ReduceSum<keepdims=0>(a) positive = Greater(s, zero)
    b = If (positive) <
        then_branch = yes () => (float[N,3,8,8] p) { t = Relu(a) p = Mul(t, w2) },
        else_branch = no () => (float[N,3,8,8] q) { t = Neg(a) q = Mul(t, w2) }
    >
    y = Relu(b)
"""


def test_nodes_with_bodies_stay_whole_and_keep_their_keys(small: Any) -> None:
    source = small.build(FLOW, {"w1": (3, 3, 3, 3), "w2": (3, 1, 1), "zero": np.float32([0])[0]})
    model = qwrap.load(source).eval()
    part = part_of(model, ["a", "positive"], ["b"], shared=True)
    whole = model.graph
    inner = {whole.node_key(n) for n in walk_nodes(whole.model.graph) if n.op_type != "Conv"}
    assert set(part.graph.nodes) <= inner
    assert {k for k in whole.values if "t" in k.split("/")} <= set(part.graph.values)
    values = seen(model, to_inputs(small.batches()[0], model))
    assert same(run(part, values), [values["b"]])


NAMES = ["resnet20_cifar10", "silero_vad", "minilm_l6", "stories260k", "ppocr_en_number_rec"]


# The image reader of the shared data leaves files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", NAMES)
def test_real_models_fall_into_parts(name: str, samples: Any) -> None:
    model = qwrap.load(samples.model_path(name)).eval()
    values = seen(model, to_inputs(next(iter(samples.val(name, 1)))[0], model))
    graph = model.graph
    ends = [graph.key(value) for value in graph.outputs]
    nodes = [n for n in model.layout.region.nodes() if all(v in values for v in keys(graph, n))]
    for i in (1, 2, 3):
        middle = keys(graph, nodes[len(nodes) * i // 4])
        first = part_of(model, [], middle, shared=True)
        assert same(run(first, values), [values[key] for key in middle])
        assert same(run(part_of(model, middle, ends, shared=True), values), run(model, values))


def keys(graph: Any, node: ir.Node) -> list[str]:
    return [graph.key(value) for value in node.outputs if value.name]
