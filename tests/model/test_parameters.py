"""What is a parameter: by rule, by name, and when several nodes share an initialiser."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper

import qwrap
from qwrap.errors import ConfigError
from qwrap.graph import OnnxGraph

Build = Callable[..., onnx.ModelProto]
ONES = np.ones(4, np.float32)


def trained(model: qwrap.WrappedModel) -> set[str]:
    return {model.tensor_names[key] for key, _ in model.named_parameters()}


@pytest.fixture
def mixed(build: Build) -> onnx.ModelProto:
    """A vector, a scalar that an operator may take as a number, and running statistics."""
    names = ["scale", "bias", "mean", "var"]
    nodes = [
        helper.make_node("BatchNormalization", ["x", *names], ["n"], "bn"),
        helper.make_node("Mul", ["n", "alpha"], ["m"], "mul"),
        helper.make_node("Add", ["m", "w[0]"], ["y"], "add"),
    ]
    arrays = {name: ONES * (i + 1) for i, name in enumerate(names)}
    arrays |= {"alpha": np.array(2, np.float32), "w[0]": np.arange(4, dtype=np.float32)}
    return build(nodes, {"x": [2, 4]}, initializers=arrays)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (None, {"scale", "bias", "w[0]"}),
        ((), set()),
        (["scale", "bias"], {"scale", "bias"}),
        (["alpha"], {"alpha"}),
        (["mean", "w[0]"], {"mean", "w[0]"}),
        (["*a*"], {"scale", "bias", "mean", "var", "alpha"}),
    ],
)
def test_parameters_are_chosen_by_name(mixed: onnx.ModelProto, patterns, expected) -> None:
    model = qwrap.load(mixed, parameters=patterns)
    assert trained(model) == expected
    x = torch.ones(2, 4)
    assert torch.equal(model.eval()(x), qwrap.load(mixed).eval()(x))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert trained(other) == expected
        assert torch.equal(other(x), model(x))


def test_a_chosen_scalar_is_trained_and_written(mixed: onnx.ModelProto, tmp_path: Path) -> None:
    model = qwrap.load(mixed, parameters=["alpha"]).eval()
    model(torch.ones(2, 4)).sum().backward()
    (alpha,) = model.parameters()
    assert alpha.grad is not None
    assert alpha.grad != 0
    alpha.data += 1
    qwrap.export(model, tmp_path / "m.onnx")
    again = qwrap.load(tmp_path / "m.onnx", parameters=["alpha"])
    assert [p.item() for p in again.parameters()] == [3]


def test_the_choice_outlives_prepare(mixed: onnx.ModelProto) -> None:
    model = qwrap.load(mixed, parameters=["w*"])
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    assert trained(model) == {"w[0]"}


def test_a_name_that_nothing_has_is_refused(mixed: onnx.ModelProto) -> None:
    with pytest.raises(ConfigError, match=r"parameters=\['none'\]: no float tensor"):
        qwrap.load(mixed, parameters=["scale", "none"])


# --- shared initialisers -------------------------------------------------------------------------


@pytest.fixture
def shared(build: Build) -> onnx.ModelProto:
    """Two normalisations that the exporter gave one weight and one bias."""
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g", "b"], ["m"], "/one/Norm"),
        helper.make_node("LayerNormalization", ["m", "g", "b"], ["y"], "/two/Norm"),
    ]
    return build(nodes, {"x": [2, 4]}, initializers={"g": ONES, "b": 0 * ONES})


def test_weights_that_an_exporter_merged_are_told(shared: onnx.ModelProto) -> None:
    with pytest.warns(qwrap.QwrapWarning, match=r"'g' \(2 nodes\), 'b' \(2 nodes\): .*untie=True"):
        model = qwrap.load(shared)
    assert trained(model) == {"g", "b"}


def test_weights_that_are_tied_on_purpose_are_not(build: Build) -> None:
    nodes = [
        helper.make_node("Gather", ["e", "i"], ["a"]),
        helper.make_node("Transpose", ["e"], ["t"]),
        helper.make_node("MatMul", ["a", "t"], ["y"]),
    ]
    arrays = {"e": np.arange(12, dtype=np.float32).reshape(3, 4), "i": np.array([0, 1])}
    model = qwrap.load(build(nodes, {}, initializers=arrays))  # a warning would be an error here
    assert trained(model) == {"e"}


@pytest.mark.parametrize("kind", ["proto", "path", "ir"])
def test_untied_nodes_have_weights_of_their_own(
    shared: onnx.ModelProto, tmp_path: Path, kind: str
) -> None:
    onnx.save(shared, tmp_path / "m.onnx")
    sources = {"proto": shared, "path": tmp_path / "m.onnx", "ir": ir.from_proto(shared)}
    model = qwrap.load(sources[kind], untie=True)
    assert trained(model) == {"g", "b", "g_/two/Norm", "b_/two/Norm"}
    x = torch.arange(8.0).reshape(2, 4) ** 2
    with pytest.warns(qwrap.QwrapWarning):
        assert torch.equal(model(x), qwrap.load(shared)(x))
    with torch.no_grad():
        model.stored("g_/two/Norm").mul_(3)
    expected = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    qwrap.export(model, tmp_path / "out.onnx")
    assert [n.input[1] for n in onnx.load(tmp_path / "out.onnx").graph.node] == ["g", "g_/two/Norm"]
    assert torch.equal(qwrap.load(tmp_path / "out.onnx", untie=True)(x), expected)
    assert [n.input[1] for n in shared.graph.node] == ["g", "g"]


def test_what_a_subgraph_reads_stays_its_own(build: Build) -> None:
    branch = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["t"])], "b", [], [onnx.ValueInfoProto(name="t")]
    )
    nodes = [
        helper.make_node("Add", ["x", "w"], ["a"], "first"),
        helper.make_node("ReduceMax", ["a"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["k"], to=onnx.TensorProto.BOOL),
        helper.make_node("If", ["k"], ["y"], then_branch=branch, else_branch=branch),
    ]
    model = qwrap.load(build(nodes, {"x": [4]}, initializers={"w": 2 * ONES}), untie=True)
    assert trained(model) == {"w", "w_first"}


# --- files ---------------------------------------------------------------------------------------


def test_training_in_place_changes_neither_the_file_nor_another_module(tmp_path: Path) -> None:
    weight = ir.tensor(np.arange(4096, dtype=np.float32).reshape(64, 64), name="w")
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 64]))
    w = ir.Value(name="w", const_value=weight, type=x.type, shape=weight.shape)
    node = ir.node("MatMul", [x, w])
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 17})
    ir.save(ir.Model(graph, ir_version=8), tmp_path / "m.onnx", external_data="m.data")
    before = (tmp_path / "m.data").read_bytes()
    one, two = qwrap.load(tmp_path / "m.onnx"), qwrap.load(tmp_path / "m.onnx")
    again = qwrap.WrappedModel(one.graph)
    optimizer = torch.optim.SGD(one.parameters(), 0.1)
    one(torch.ones(1, 64)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(one.stored("w"), two.stored("w"))
    assert torch.equal(again.stored("w"), two.stored("w"))
    assert (tmp_path / "m.data").read_bytes() == before
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one)), one.to("cpu")):
        assert torch.equal(other.stored("w"), one.stored("w"))
    two.load_state_dict(one.state_dict())
    assert torch.equal(two.stored("w"), one.stored("w"))
    one.rewrite(OnnxGraph(one.graph.model), ())
    assert torch.equal(one.stored("w"), again.stored("w"))
    assert (tmp_path / "m.data").read_bytes() == before


def test_a_scale_of_codes_is_no_parameter(build: Build) -> None:
    """Its gradient is the sum of codes: a step of plain descent would throw it anywhere."""
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["c"], "dequantize", axis=0),
        helper.make_node("Mul", ["x", "c"], ["m"], "mul"),
        helper.make_node("Add", ["m", "bias"], ["y"], "add"),
    ]
    arrays = {"codes": np.arange(4, dtype=np.int32), "scales": ONES, "bias": ONES}
    assert trained(qwrap.load(build(nodes, {"x": [2, 4]}, initializers=arrays))) == {"bias"}
