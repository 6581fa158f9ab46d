"""Keys and types, above all where names repeat in subgraphs."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qwrap.errors import ModelError
from qwrap.graph import OnnxGraph, ValueType, read_model
from qwrap.graph.index import FLOATS

Build = Callable[..., onnx.ModelProto]


def branch(*nodes: onnx.NodeProto, output: str) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "branch", [], [onnx.ValueInfoProto(name=output)])


def with_if(build: Build, then: onnx.GraphProto, otherwise: onnx.GraphProto) -> onnx.ModelProto:
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["r"], "if", then_branch=then, else_branch=otherwise),
        helper.make_node("Cast", ["x"], ["t"], "later", to=TensorProto.INT32),
    ]
    return build(nodes, outputs=("r", "t"))


def test_one_name_in_two_branches_and_outside_keeps_three_types(build: Build) -> None:
    then = branch(
        helper.make_node("Cast", ["x"], ["t"], to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["t"], ["o"], to=TensorProto.FLOAT),
        output="o",
    )
    otherwise = branch(
        helper.make_node("Transpose", ["x"], ["t"]),
        helper.make_node("Transpose", ["t"], ["p"]),
        output="p",
    )
    graph = OnnxGraph(read_model(with_if(build, then, otherwise)))
    kinds = {key: graph.type_of(graph.values[key]) for key in graph.values if key.endswith("t")}
    assert kinds == {
        "t": ValueType(ir.DataType.INT32, (2, 3)),  # the main graph has the plain name
        "/if.then_branch/t": ValueType(ir.DataType.DOUBLE, (2, 3)),
        "/if.else_branch/t": ValueType(ir.DataType.FLOAT, (3, 2)),
    }


def test_a_branch_may_reuse_an_outer_name_unless_it_reads_the_outer_value(build: Build) -> None:
    own = branch(helper.make_node("Constant", [], ["x"], value_float=1.0), output="x")
    outer = branch(helper.make_node("Identity", ["x"], ["o"]), output="o")
    assert "/if.then_branch/x" in OnnxGraph(read_model(with_if(build, own, outer))).values
    both = branch(helper.make_node("Identity", ["x"], ["x"]), output="x")
    with pytest.raises(ModelError, match=r"produces \['x'\]"):
        read_model(with_if(build, both, outer))


def test_nodes_without_a_name_of_their_own_have_distinct_keys(build: Build) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"], "same"),
        helper.make_node("Relu", ["b"], ["c"], "same"),
        helper.make_node("Relu", ["c"], ["d"], "Relu:a"),
        helper.make_node("Relu", ["d"], [""]),
        helper.make_node("Relu", ["d"], [""]),
    ]
    graph = OnnxGraph(read_model(build(nodes, outputs=("d",))))
    assert list(graph.nodes) == ["Relu:a#2", "Relu:b", "Relu:c", "Relu:a", "Relu:", "Relu:#2"]
    assert all(graph.nodes[graph.node_key(n)] is n for n in graph.nodes.values())


def test_inputs_with_initialisers_are_not_asked_for(build: Build) -> None:
    w = numpy_helper.from_array(np.ones(3, np.float32), "w")
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    proto = build(nodes, {"x": [2, 3], "w": [3]}, initializers=[w])
    assert [v.name for v in OnnxGraph(read_model(proto)).inputs] == ["x"]


def test_types_know_sizes_symbols_and_rank(build: Build) -> None:
    proto = build([helper.make_node("Relu", ["x"], ["y"])], {"x": ["batch", 3]})
    graph = OnnxGraph(read_model(proto))
    kind = graph.type_of(graph.outputs[0])
    assert (kind.shape, kind.rank, kind.is_float) == (("batch", 3), 2, True)
    assert ValueType().rank is None
    assert ir.DataType.INT8 not in FLOATS


def test_a_pickled_graph_finds_its_external_data(tmp_path: Path, build: Build) -> None:
    weight = numpy_helper.from_array(np.arange(256, dtype=np.float32), "w")
    proto = build([helper.make_node("Add", ["x", "w"], ["y"])], {"x": [256]}, initializers=[weight])
    onnx.save(
        proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    graph = pickle.loads(pickle.dumps(OnnxGraph(read_model(tmp_path / "m.onnx"))))
    value = graph.values["w"].const_value
    assert isinstance(value, ir.ExternalTensor)
    np.testing.assert_array_equal(value.numpy(), np.arange(256, dtype=np.float32))
    assert copy.deepcopy(graph) is graph
