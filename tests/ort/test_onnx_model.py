"""ONNXModel against onnxruntime's class of that name, and where that one is wrong."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import onnx_model as incumbent

from qwrap.ort.errors import InvalidModelError, QuantizationError
from qwrap.ort.onnx_model import ONNXModel


def parse(text: str, weights: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> g {text}'
    )
    for name, value in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return model


def outputs(model: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    opened = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return opened.run(None, feeds)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(0, 1, shape).astype(np.float32)


def two_gemms() -> onnx.ModelProto:
    """The weight ``w`` is square, so that a wrong transposition fails in values only."""
    model = parse(
        """(float[2,4] x) => (float[2,4] y, float[2,4] z) {
            y = Gemm<transB=1>(x, w, b)
            z = Gemm<transB=1>(y, w)
        }""",
        {"w": random(4, 4), "b": random(4)},
    )
    model.graph.node[0].name, model.graph.node[1].name = "first", "second"
    return model


def if_model() -> onnx.ModelProto:
    """Bodies read ``t`` of the graph around them; one of them has a dead initializer."""
    return parse(
        """(float[2] x, bool c) => (float[2] y) {
            t = Relu(x)
            y = If(c) <
                then_branch = th () => (float[2] p) <float[2] dead = {1, 2}> { p = Neg(t) },
                else_branch = el () => (float[2] q) { q = Exp(t) }
            >
        }"""
    )


@pytest.mark.ort(278, 362)
def test_every_method_of_onnxruntime_has_the_same_parameters() -> None:
    for name, method in inspect.getmembers(incumbent.ONNXModel, inspect.isfunction):
        if not name.startswith("_"):
            ours = inspect.signature(getattr(ONNXModel, name))
            assert list(ours.parameters) == list(inspect.signature(method).parameters), name


@pytest.mark.ort(278)
def test_look_ups_answer_as_onnxruntimes() -> None:
    model, value = two_gemms(), numpy_helper.from_array(random(2))
    model.graph.node.extend([
        helper.make_node("Constant", [], ["k"], "my_7", value=value),
        helper.make_node("Constant", [], ["l"], "my_x", value=value),
    ])
    ours, theirs = ONNXModel(model), incumbent.ONNXModel(model)
    for name in ("w", "b", "x", "y", "k", "nothing"):
        assert ours.get_initializer(name) == theirs.get_initializer(name)
        assert ours.find_graph_input(name) == theirs.find_graph_input(name)
        assert ours.find_graph_output(name) == theirs.find_graph_output(name)
        assert ours.is_graph_input(name) == theirs.is_graph_input(name)
        assert ours.is_graph_output(name) == theirs.is_graph_output(name)
        assert ours.get_tensor_type(name) == theirs.get_tensor_type(name)
        mine, other = ours.get_constant_value(name), theirs.get_constant_value(name)
        assert (mine is None) == (other is None)
        assert mine is None or (mine == other).all()
    assert ours.input_name_to_nodes() == theirs.input_name_to_nodes()
    assert ours.output_name_to_node() == theirs.output_name_to_node()
    assert ours.get_non_initializer_inputs() == theirs.get_non_initializer_inputs()
    assert ours.get_largest_node_name_suffix("my_") == 7
    assert ours.get_largest_initializer_name_suffix("w_") == -1
    first, second = model.graph.node[:2]
    assert ours.get_children(first) == theirs.get_children(first) == [second]
    assert ours.get_parents(second) == theirs.get_parents(second) == [first]
    assert ours.get_parent(second, 0) == first
    assert ours.get_parent(second, 1) is ours.get_parent(second, 9) is None
    weight = ours.get_initializer("w")
    assert ours.find_nodes_by_initializer(model.graph, weight) == [first, second]
    assert ours.find_node_by_name("second", [], model.graph) == second


@pytest.mark.ort(278, "G61")
def test_look_ups_follow_edits_of_the_message() -> None:
    model = ONNXModel(two_gemms())
    assert model.get_initializer("new") is None
    model.model.graph.initializer.append(numpy_helper.from_array(random(1), "new"))
    assert model.get_initializer("new").name == "new"
    model.initializer().remove(model.get_initializer("w"))
    assert model.get_initializer("w") is None
    assert model.get_initializer("b").name == "b"
    model.get_initializer("b").name = "c"
    assert model.get_initializer("b") is None
    assert model.get_initializer("c").name == "c"
    del model.initializer()[:]
    assert model.get_initializer("c") is None


@pytest.mark.ort(278, "G61")
def test_look_ups_take_no_longer_in_a_large_model() -> None:
    """onnxruntime's scan all initializers for each question: 10^8 comparisons here."""
    model = onnx.ModelProto()
    for i in range(10_000):
        model.graph.initializer.add(name=f"w{i}", data_type=1)
    found = ONNXModel(model)
    assert all(found.get_initializer(f"w{i}") is not None for i in range(10_000))
    assert all(found.get_initializer(f"x{i}") is None for i in range(10_000))


@pytest.mark.ort(278)
def test_removal_is_as_onnxruntimes() -> None:
    ours, theirs = ONNXModel(two_gemms()), incumbent.ONNXModel(two_gemms())
    ours.model.graph.input.add(name="w")
    theirs.model.graph.input.add(name="w")
    for model in (ours, theirs):
        model.remove_nodes([model.nodes()[1], onnx.NodeProto(name="foreign")])
        model.remove_initializers([model.get_initializer("w"), onnx.TensorProto(name="foreign")])
    assert ours.model == theirs.model
    assert [v.name for v in ours.graph().input] == ["x"]
    ours.remove_node(ours.nodes()[0])
    ours.remove_initializer(ours.get_initializer("b"))
    assert not ours.nodes()
    assert not ours.initializer()


@pytest.mark.ort(278)
def test_additions_are_as_onnxruntimes() -> None:
    ours, theirs = ONNXModel(two_gemms()), incumbent.ONNXModel(two_gemms())
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "n")
    for model in (ours, theirs):
        model.add_initializer(tensor)
        model.add_initializer(numpy_helper.from_array(np.zeros(3, np.float32), "n"))
        model.initializer_extend([numpy_helper.from_array(np.ones(1, np.float32), "m")])
        model.add_nodes([helper.make_node("Relu", ["z"], ["r"])])
        model.set_opset_import("", 18)
        model.set_opset_import("custom", 2)
    assert ours.model == theirs.model
    with pytest.raises(ValueError, match="empty list"):
        ours.initializer_extend([])


@pytest.mark.ort(278)
def test_what_cannot_be_dequantized_is_refused() -> None:
    model = ONNXModel(two_gemms())
    model.add_node(helper.make_node("DequantizeLinear", ["q", "s"], ["d"]))
    with pytest.raises(RuntimeError, match="dequantization from FLOAT"):
        model.add_node(helper.make_node("DequantizeLinear", ["q", "s", "w"], ["e"]))
    nan = helper.make_tensor("f8", TensorProto.FLOAT8E4M3FN, [2], bytes([0, 255]), raw=True)
    with pytest.raises(QuantizationError, match="'f8' has nan"):
        model.add_initializer(nan)


@pytest.mark.ort(278)
def test_the_order_of_nodes_is_onnxruntimes() -> None:
    text = """(float[2] x, float[2] a) => (float[2] y) {
        y = Add(u, v) v = Mul(k, x) u = Sub(a, w) k = Constant<value = float[2] {1, 2}>() }"""
    models = [
        cls(parse(text, {"w": np.ones(2, np.float32)})) for cls in (ONNXModel, incumbent.ONNXModel)
    ]
    node = models[0].nodes()[0]
    for model in models:
        model.topological_sort()
    assert models[0].model == models[1].model
    assert models[0].nodes()[3] is node


@pytest.mark.ort(278, "G54")
def test_what_bodies_read_counts_for_the_order() -> None:
    """onnxruntime's leaves an If before the node whose output its branches read."""
    model = if_model()
    model.graph.node.sort(key=lambda node: node.op_type)
    ONNXModel(model).topological_sort()
    assert [node.op_type for node in model.graph.node] == ["Relu", "If"]


@pytest.mark.ort(278)
def test_a_graph_that_has_no_order_is_refused_by_name() -> None:
    loop = parse("(float[2] x) => (float[2] y) { y = Add(x, z) z = Neg(y) }")
    with pytest.raises(InvalidModelError, match="not a DAG"):
        ONNXModel(loop).topological_sort()
    missing = parse("(float[2] x) => (float[2] y) { y = Add(x, nowhere) }")
    with pytest.raises(RuntimeError, match="nothing makes \\['nowhere'\\]"):
        ONNXModel(missing).topological_sort()


@pytest.mark.ort(273)
def test_unused_initializers_go_in_bodies_too() -> None:
    model = if_model()
    model.graph.initializer.append(numpy_helper.from_array(random(2), "gone"))
    model.graph.input.add(name="gone")
    theirs = copy.deepcopy(model)
    graph, missing = ONNXModel(model).clean_initializers()
    their_graph, their_missing = incumbent.ONNXModel(theirs).clean_initializers()
    assert missing == their_missing == set()
    assert graph is model.graph
    assert list(graph.input) == list(their_graph.input)
    assert not graph.initializer
    assert not their_graph.initializer
    assert not graph.node[1].attribute[0].g.initializer


@pytest.mark.ort(273, "G46")
def test_nodes_with_bodies_keep_their_domain() -> None:
    """onnxruntime's copies such nodes without it."""
    model = if_model()
    model.graph.node[1].domain = "com.microsoft"
    theirs = copy.deepcopy(model)
    incumbent.ONNXModel(theirs).clean_initializers()
    assert not theirs.graph.node[1].domain
    ours = ONNXModel(model)
    ours.clean_initializers()
    ours.replace_gemm_with_matmul()
    assert model.graph.node[1].domain == "com.microsoft"


@pytest.mark.ort(278, "G45")
def test_renames_reach_what_bodies_read() -> None:
    """onnxruntime's leaves bodies reading the old name: an invalid graph."""
    model = ONNXModel(if_model())
    model.replace_output_of_all_nodes("t", "renamed")
    model.replace_input_of_all_nodes("t", "renamed")
    x = np.array([1, 2], np.float32)
    assert np.array_equal(outputs(model.model, x=x, c=np.array(True))[0], -x)


@pytest.mark.ort(278)
def test_renames_leave_a_bodys_own_value_alone() -> None:
    model = if_model()
    body = model.graph.node[1].attribute[0].g
    body.initializer.append(numpy_helper.from_array(random(2), "t"))
    before = copy.deepcopy(body)
    ONNXModel(model).replace_input_of_all_nodes("t", "renamed")
    assert body == before


@pytest.mark.ort(278)
def test_renames_of_some_nodes_are_onnxruntimes() -> None:
    ours, theirs = ONNXModel(two_gemms()), incumbent.ONNXModel(two_gemms())
    for model in (ours, theirs):
        model.replace_input_of_nodes("w", "v", {"second"})
        model.replace_output_of_nodes("y", "v2", {"first"})
    assert ours.model == theirs.model


@pytest.mark.ort(278)
def test_unused_constants_go_but_not_what_bodies_read() -> None:
    model = parse(
        """(float[2] x, bool c) => (float[2] y) {
            t = Constant<value = float[2] {1, 2}>()
            u = Constant<value = float[2] {3, 4}>()
            y = If(c) <then_branch = th () => (float[2] p) { p = Neg(t) },
                       else_branch = el () => (float[2] q) { q = Exp(w) }>
        }""",
        {"w": random(2), "v": random(2)},
    )
    found = ONNXModel(model)
    found.remove_unused_constant()
    assert [node.output[0] for node in model.graph.node] == ["t", "y"]
    assert found.get_initializer_name_set() == {"w"}


@pytest.mark.ort(278)
@pytest.mark.parametrize("inner", [False, True])
def test_gemm_becomes_the_nodes_that_onnxruntime_makes(inner: bool) -> None:
    text = """(float[2,3] x, float[3,4] c) => (float[2,5] y) {
        a = Gemm(x, c) b = Gemm<transB=1>(a, w, k) d = Gemm<alpha=2.0>(b, v)
        y = Gemm<transB=1>(d, e) e = Relu(v) }"""
    weights = {"w": random(5, 4), "k": random(5), "v": random(5, 5)}
    model = parse(text, weights)
    for index, node in enumerate(model.graph.node):
        node.name = f"n{index}" if index else ""
    if inner:
        condition = helper.make_tensor_value_info("q", TensorProto.BOOL, [])
        body = copy.deepcopy(model.graph)
        del body.input[:]
        node = helper.make_node("If", ["q"], ["out"], then_branch=body, else_branch=body)
        inputs = [*model.graph.input, condition]
        model.graph.CopyFrom(helper.make_graph([node], "g", inputs, [model.graph.output[0]]))
    theirs = copy.deepcopy(model)
    ONNXModel(model).replace_gemm_with_matmul()
    incumbent.ONNXModel(theirs).replace_gemm_with_matmul()
    for tensor in (*model.graph.initializer, *theirs.graph.initializer):
        tensor.raw_data = numpy_helper.to_array(tensor).tobytes()
    assert sorted(t.SerializeToString() for t in model.graph.initializer) == sorted(
        t.SerializeToString() for t in theirs.graph.initializer
    )
    assert list(model.graph.node) == list(theirs.graph.node) or inner


@pytest.mark.ort(278, "G3")
def test_two_gemms_that_share_a_weight_keep_their_values() -> None:
    """onnxruntime's transposes the weight twice."""
    model, x = two_gemms(), random(2, 4)
    want = outputs(model, x=x)
    theirs = copy.deepcopy(model)
    incumbent.ONNXModel(theirs).replace_gemm_with_matmul()
    assert not np.allclose(outputs(theirs, x=x)[0], want[0])
    ONNXModel(model).replace_gemm_with_matmul()
    assert [t.name for t in model.graph.initializer] == ["w", "b"]
    for got, expected in zip(outputs(model, x=x), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)  # another order of sums


@pytest.mark.ort(278, "G3")
def test_a_weight_tied_with_an_embedding_stays_as_it_is_for_that() -> None:
    model = parse(
        """(int64[2] i) => (float[2,4] y) { h = Gather(w, i) y = Gemm<transB=1>(h, w) }""",
        {"w": random(4, 4)},
    )
    ids = np.array([1, 3])
    want = outputs(model, i=ids)
    ONNXModel(model).replace_gemm_with_matmul()
    assert [t.name for t in model.graph.initializer] == ["w", "w_Transposed"]
    np.testing.assert_allclose(outputs(model, i=ids)[0], want[0], rtol=1e-5, atol=1e-6)


@pytest.mark.ort(12, 278)
@pytest.mark.parametrize("external", [False, True])
def test_a_saved_file_holds_the_model_which_keeps_its_weights(
    tmp_path: Path, external: bool
) -> None:
    model = parse(
        "(float[1,64] x) => (float[1,64] y) { c = Constant<value_float=1.0>() y = MatMul(x, w) }",
        {"w": random(64, 64)},
    )
    model.graph.node[0].attribute[0].CopyFrom(
        helper.make_attribute("value", numpy_helper.from_array(random(400), "inner"))
    )
    before = copy.deepcopy(model)
    ONNXModel(model).save_model_to_file(tmp_path / "m.onnx", external)
    assert model == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"][: 1 + external]
    read = onnx.load(tmp_path / "m.onnx")
    assert [numpy_helper.to_array(t).tobytes() for t in read.graph.initializer] == [
        numpy_helper.to_array(t).tobytes() for t in before.graph.initializer
    ]
    raw = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    entries = {e.key: e.value for e in raw.graph.initializer[0].external_data}
    assert entries.get("location") == ("m.onnx.data" if external else None)
    x = random(1, 64)
    opened = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert np.array_equal(opened.run(None, {"x": x})[0], outputs(before, x=x)[0])
