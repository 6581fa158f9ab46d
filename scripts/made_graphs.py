"""Make large graphs of the shapes that exporters, and nobody, produce, to load them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Make = Callable[[int], onnx.ModelProto]


def model_of(
    nodes: list[onnx.NodeProto],
    weights: list[str] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:
    """Return a model from float32 ``x`` [16] and a boolean ``c`` to ``y``."""
    tensors = [numpy_helper.from_array(np.full(16, 0.5, np.float32), w) for w in weights or ()]
    inputs = [_info("x", TensorProto.FLOAT, 16), _info("c", TensorProto.BOOL)]
    graph = helper.make_graph(nodes, "made", inputs, [onnx.ValueInfoProto(name="y")], tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions or [])


def _info(name: str, dtype: int, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _chain(
    count: int, name: Callable[[int], str], first: str = "x", last: str = "y", op: str = "Relu"
) -> list[onnx.NodeProto]:
    ends = [first, *(f"{last}{i}" for i in range(count - 1)), last]
    domain = "own" if op == "Own" else ""
    return [
        helper.make_node(op, [a], [b], name(i), domain=domain)
        for i, (a, b) in enumerate(itertools.pairwise(ends))
    ]


def chain(count: int) -> onnx.ModelProto:
    """All nodes in one Block."""
    return model_of(_chain(count, lambda i: f"n{i}"))


def layers(count: int) -> onnx.ModelProto:
    """A Block for every five nodes."""
    return model_of(_chain(count, lambda i: f"/layers.{i // 5}/attn/n{i}"))


def scopes_32_deep(count: int) -> onnx.ModelProto:
    """Ten chains of Blocks, each inside the one before."""
    deep = ["/".join(f"s{i}_{depth}" for depth in range(32)) for i in range(10)]
    return model_of(_chain(count, lambda i: f"/{deep[10 * i // count]}/n{i}"))


def one_name(count: int) -> onnx.ModelProto:
    """All nodes of one name."""
    return model_of(_chain(count, lambda _: "Relu"))


def tail_without_scope(count: int) -> onnx.ModelProto:
    """As many modules as nodes behind all of them whose names tell no module."""
    names = [f"layers.{i}.bias" for i in range(count // 2)]
    heads = [helper.make_node("Add", ["x", name], [f"h{i}"]) for i, name in enumerate(names)]
    total = helper.make_node("Sum", [head.output[0] for head in heads], ["sum"])
    return model_of([*heads, total, *_chain(count // 2, lambda _: "", "sum")], names)


def initialisers(count: int) -> onnx.ModelProto:
    """A weight for every node, all in one Block."""
    nodes = _chain(count, lambda i: f"/a/b/n{i}", op="Add")
    for i, node in enumerate(nodes):
        node.input.append(f"w{i}")
    return model_of(nodes, [f"w{i}" for i in range(count)])


def consumers(count: int) -> onnx.ModelProto:
    """One value that all nodes read."""
    first = helper.make_node("MatMul", ["x", "matrix"], ["h"], "/first")
    readers = [
        helper.make_node("Add", ["h", "w"], [f"t{i}"], f"/l{i // 10}/n{i}") for i in range(count)
    ]
    last = helper.make_node("Sum", [f"t{i}" for i in range(count)], ["y"], "/last")
    model = model_of([first, *readers, last], ["w"])
    matrix = numpy_helper.from_array(np.eye(16, dtype=np.float32), "matrix")
    model.graph.initializer.append(matrix)
    return model


def body_of_loop(count: int) -> onnx.ModelProto:
    """All nodes in the body of one Loop."""
    inputs = [_info("i", TensorProto.INT64), _info("on", TensorProto.BOOL)]
    inputs.append(_info("a", TensorProto.FLOAT, 16))
    same = helper.make_node("Identity", ["on"], ["go"])
    nodes = [same, *_chain(count, lambda i: f"n{i}", "a", "b")]
    outputs = [_info("go", TensorProto.BOOL), _info("b", TensorProto.FLOAT, 16)]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    return model_of([helper.make_node("Loop", ["", "c", "x"], ["y"], "loop", body=body)])


def ifs(count: int) -> onnx.ModelProto:
    """One node in four an If, whose bodies hold the other nodes."""
    nodes = _chain(count // 4, lambda _: "")
    for node in nodes:
        for name in ("then_branch", "else_branch"):
            inner = _chain(2 if name == "then_branch" else 1, lambda _: "", node.input[0], "r")
            output = _info("r", TensorProto.FLOAT, 16)
            body = helper.make_graph(inner, name, [], [output])
            node.attribute.append(helper.make_attribute(name, body))
        node.op_type, node.input[0] = "If", "c"
    return model_of(nodes)


def calls(count: int) -> onnx.ModelProto:
    """Calls of a function of two nodes."""
    steps = [helper.make_node("Relu", ["a"], ["r"]), helper.make_node("Neg", ["r"], ["b"])]
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("own", "Own", ["a"], ["b"], steps, opsets)
    return model_of(_chain(count // 2, lambda i: f"f{i}", op="Own"), functions=[function])


GRAPHS: tuple[Make, ...] = (
    *(chain, layers, scopes_32_deep, one_name, tail_without_scope, initialisers, consumers),
    *(body_of_loop, ifs, calls),
)
