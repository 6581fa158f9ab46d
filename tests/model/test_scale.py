"""Loading takes work in proportion to the nodes of a graph, whatever its shape."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from made_graphs import GRAPHS, Make, body_of_loop, consumers, ifs, layers, model_of
from onnx import TensorProto, helper, numpy_helper

import qwrap
from qwrap.errors import UnsupportedOpError
from qwrap.model.codegen import generate
from qwrap.model.points import Program, ValuePoint

node = helper.make_node


def info(name: str, dtype: int = TensorProto.FLOAT, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


@pytest.mark.parametrize("make", GRAPHS)
def test_work_of_loading_grows_as_the_graph(make: Make) -> None:
    calls_of(lambda: qwrap.load(make(8)))  # what happens on first use does not count
    few, many = (calls_of(partial(qwrap.load, make(n))) for n in (120, 480))
    assert many < 4.4 * few  # logarithms of sorting, and nothing of a power


def calls_of(run: Callable[[], object]) -> int:
    """Count the calls that ``run`` makes, those of builtins and of generators included."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_work_of_watching_does_not_grow_with_the_number_of_blocks() -> None:
    loaded = qwrap.load(layers(400))
    loaded(torch.ones(16), torch.tensor(True))
    seen: list[torch.Tensor] = []
    before = {name: block.source for name, block in loaded.named_modules()}
    with loaded.watching({"y17": seen.append}):
        changed = [n for n, block in loaded.named_modules() if block.source != before[n]]
        loaded(torch.ones(16), torch.tensor(True))
    assert changed == ["layers.3.attn"]
    assert len(seen) == 1
    assert before == {name: block.source for name, block in loaded.named_modules()}


def test_ifs_nest_50_deep() -> None:
    x = ir.val("x", ir.DataType.FLOAT, [4])
    c = ir.val("c", ir.DataType.BOOL, [])
    inner = body(ir.node("Relu", [x]), "y0")
    for i in range(1, 51):
        branches = {"then_branch": inner, "else_branch": body(ir.node("Neg", [x]), f"n{i}")}
        inner = body(ir.node("If", [c], attributes=branches), f"y{i}")
    (outermost,) = inner
    inner.remove(outermost)
    inner.outputs.clear()
    graph = ir.Graph([x, c], outermost.outputs, nodes=[outermost], opset_imports={"": 17})
    loaded = qwrap.load(ir.Model(graph, ir_version=8))
    values = torch.tensor([-2.0, -1.0, 1.0, 2.0])
    torch.testing.assert_close(loaded(values, torch.tensor(True)), values.relu(), rtol=0, atol=0)
    torch.testing.assert_close(loaded(values, torch.tensor(False)), -values, rtol=0, atol=0)


def body(made: ir.Node, name: str) -> ir.Graph:
    made.outputs[0].name = name
    return ir.Graph([], made.outputs, nodes=[made])


def nested_loops(depth: int) -> onnx.ModelProto:
    inner, result = node("Relu", ["a1"], ["r0"], "relu"), "r0"
    for i in range(1, depth + 1):
        outer = "x" if i == depth else f"a{i + 1}"
        inputs = [info(f"i{i}", TensorProto.INT64), info(f"on{i}", TensorProto.BOOL), info(f"a{i}")]
        nodes = [node("Identity", [f"on{i}"], [f"go{i}"]), inner]
        graph = helper.make_graph(
            nodes, "", inputs, [info(f"go{i}", TensorProto.BOOL), info(result)]
        )
        result = "y" if i == depth else f"r{i}"
        inner = node("Loop", ["one", "", outer], [result], f"loop{i}", body=graph)
    made = model_of([inner])
    made.graph.initializer.append(numpy_helper.from_array(np.array(1), "one"))
    return made


def test_loops_nest_as_deep_as_python_allows_and_deeper_ones_are_refused_by_name() -> None:
    loaded = qwrap.load(nested_loops(20))
    assert loaded(torch.tensor([-1.0, 2.0] * 8), torch.tensor(True)).tolist() == [0, 2] * 8
    with pytest.raises(UnsupportedOpError, match=r"node 'loop1': Loop inside of 20 loops"):
        qwrap.load(nested_loops(21))


@pytest.mark.parametrize("make", [layers, consumers, body_of_loop, ifs])
def test_code_of_the_blocks_that_changed_is_what_all_would_be_written_as(
    make: Make,
) -> None:
    loaded = qwrap.load(make(40))
    points = list(loaded.layout.points)
    taps = {point: torch.nn.Identity() for point in points[::5]}
    kernels = dict.fromkeys(list(loaded.layout.values.operators)[3:20:4], torch.relu)
    watchers = dict.fromkeys([p.value for p in points if isinstance(p, ValuePoint)][::7], id)
    for program in (Program(taps), Program({}, kernels), Program(dict(list(taps.items())[:2]))):
        with loaded.running(program):
            assert_written_for(loaded)
            with loaded.watching(watchers):
                assert_written_for(loaded)
        assert_written_for(loaded)
    for some in (taps, dict(list(taps.items())[1:]), {points[-1]: torch.nn.Identity()}, {}):
        loaded.attach(some)
        assert_written_for(loaded)


def assert_written_for(loaded: qwrap.WrappedModel) -> None:
    names = {point: name for point, (_, name) in loaded.attached.items()}
    for code in generate(loaded.layout, loaded.program, names):
        block = loaded.get_submodule(".".join(code.path))
        assert block.source == code.source
        assert block.namespace.keys() == code.namespace.keys()
        assert all(block.namespace[name] is code.namespace[name] for name in code.namespace)
