"""Functions in place of their calls: what the expanded model means, and its names."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from qwrap.errors import ModelError
from qwrap.graph.expand import FUNCTION, expand_functions
from qwrap.graph.index import walk_nodes

OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
X = np.array([[-1, 2, -3]], np.float32)


def function(name: str, *nodes: onnx.NodeProto, **kwargs: object) -> onnx.FunctionProto:
    opsets = kwargs.pop("opsets", OPSETS)
    return helper.make_function("own", name, ["a"], ["b"], list(nodes), opsets, **kwargs)


def model(nodes: list[onnx.NodeProto], *functions: onnx.FunctionProto) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
    )
    return helper.make_model(graph, opset_imports=OPSETS, functions=list(functions), ir_version=10)


def expanded(proto: onnx.ModelProto, every: bool = False) -> onnx.ModelProto:
    result = expand_functions(ir.from_proto(proto), lambda _: every)
    return ir.to_proto(result)


def check(proto: onnx.ModelProto, every: bool = False) -> onnx.ModelProto:
    flat = expanded(proto, every)
    onnx.checker.check_model(flat)
    assert not flat.functions
    np.testing.assert_allclose(run(flat), run(proto), rtol=1e-6)  # another order of operations
    return flat


def run(proto: onnx.ModelProto) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    text = proto.SerializeToString()
    session = onnxruntime.InferenceSession(text, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": X})[0])


def call(op_type: str, name: str = "", domain: str = "own", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op_type, ["x"], ["y"], name, domain=domain, **attributes)


TWICE = function("Twice", helper.make_node("Add", ["a", "a"], ["b"], "add"))
LEAKY = function(
    "Leaky",
    helper.make_node("LeakyRelu", ["a"], ["b"], "leaky"),
    attribute_protos=[helper.make_attribute("slope", 0.5)],
)
LEAKY.node[0].attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)


def test_a_model_without_calls_is_left_alone() -> None:
    plain = ir.from_proto(model([call("Abs", domain="")], TWICE))
    assert expand_functions(plain, lambda _: True) is plain


def test_nodes_are_named_after_the_call_and_say_which_function_they_came_from() -> None:
    (node,) = check(model([call("Twice", "/block/twice")], TWICE)).graph.node
    assert (node.name, node.output[0]) == ("/block/twice/add", "y")
    assert {(e.key, e.value) for e in node.metadata_props} == {(FUNCTION, "own::Twice")}


def test_two_calls_of_one_function_share_no_name() -> None:
    nodes = [
        helper.make_node("Nested", ["x"], ["t"], domain="own"),
        helper.make_node("Nested", ["t"], ["y"], domain="own"),
    ]
    nested = function(
        "Nested",
        helper.make_node("Twice", ["a"], ["t"], "twice", domain="own"),
        helper.make_node("Neg", ["t"], ["b"], "neg"),
    )
    flat = check(model(nodes, nested, TWICE))
    names = [name for node in flat.graph.node for name in (node.name, *node.output)]
    assert len(set(names)) == len(names) == 8


@pytest.mark.parametrize("given", [{}, {"slope": 0.125}])
def test_attributes_of_the_call_or_their_defaults_reach_the_nodes(given: dict[str, float]) -> None:
    check(model([call("Leaky", **given)], LEAKY))


def test_a_reference_to_an_attribute_that_nobody_gives_is_the_default_of_the_node() -> None:
    leaky = onnx.FunctionProto.FromString(LEAKY.SerializeToString())
    del leaky.attribute_proto[:]
    leaky.attribute.append("slope")
    (node,) = expanded(model([call("Leaky")], leaky)).graph.node
    assert not node.attribute


def test_a_function_that_returns_its_input_becomes_an_identity() -> None:
    same = helper.make_function("own", "Same", ["a"], ["a"], [], OPSETS)
    (node,) = expanded(model([call("Same", "same")], same)).graph.node
    assert (node.op_type, list(node.input), list(node.output)) == ("Identity", ["x"], ["y"])


def test_an_input_that_is_left_out_is_left_out_inside() -> None:
    clip = helper.make_function(
        "own", "Bound", ["a", "low", "high"], ["b"],
        [helper.make_node("Clip", ["a", "low", "high"], ["b"])], OPSETS,
    )  # fmt: skip
    (node,) = expanded(model([call("Bound")], clip)).graph.node
    assert [name for name in node.input if name] == ["x"]


def test_bodies_inside_functions_are_renamed_and_bound_too() -> None:
    branches = {
        name: helper.make_graph(
            [helper.make_node(op, ["a"], ["o"])], name, [], [onnx.ValueInfoProto(name="o")]
        )
        for name, op in (("then_branch", "Neg"), ("else_branch", "Abs"))
    }
    choose = function(
        "Choose",
        helper.make_node("ReduceSum", ["a"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["b"], **branches),
    )
    check(model([call("Choose")], choose))


def test_functions_are_expanded_inside_bodies() -> None:
    body = helper.make_graph(
        [helper.make_node("Twice", ["x"], ["o"], domain="own")], "b", [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, [1, 3])],
    )  # fmt: skip
    nodes = [
        helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", 9, [], [True])),
        helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body),
    ]
    check(model(nodes, TWICE))


@pytest.mark.parametrize("op_type", ["Celu", "Elu", "HardSwish", "LogSoftmax", "Softsign", "Selu"])
def test_the_bodies_of_schemas_mean_the_operator(op_type: str) -> None:
    flat = check(model([call(op_type, domain="")]), every=True)
    assert op_type not in [node.op_type for node in flat.graph.node]


def test_functions_that_call_each_other_in_a_circle_are_refused() -> None:
    loop = function("Loop", helper.make_node("Loop", ["a"], ["b"], domain="own"))
    with pytest.raises(ModelError, match=r"call each other without end: \['Loop'\]"):
        expanded(model([call("Loop")], loop))


def test_a_function_of_another_opset_is_taken_unless_its_operators_changed_meaning() -> None:
    older = [helper.make_opsetid("", 12)]
    absolute = function("Old", helper.make_node("Abs", ["a"], ["b"]), opsets=older)
    check(model([call("Old")], absolute))
    squeeze = function("Old", helper.make_node("Softmax", ["a"], ["b"]), opsets=older)
    with pytest.raises(ModelError, match="function 'Old' uses Softmax as of opset 12"):
        expanded(model([call("Old", "n")], squeeze))


def test_the_given_model_is_not_changed() -> None:
    given = ir.from_proto(model([call("Twice", "t")], TWICE))
    expand_functions(given, lambda _: False)
    assert [n.op_type for n in walk_nodes(given.graph)] == ["Twice"]
    assert len(given.functions) == 1
