import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import qwrap
from qwrap.errors import ConfigError, UnsupportedOpError


def plan_for(model, **settings):
    return qwrap.prepare(qwrap.load(model), qwrap.QConfig(scope="kernels", **settings))


def test_a_residual_add_is_quantized_on_both_inputs_and_the_output(small) -> None:
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w1) b = Conv<pads=[1,1,1,1]>(a, w2) c = Add(b, a) "
    nodes += "y = Conv(c, w3)"
    weights = {"w1": (3, 3, 3, 3), "w2": (3, 3, 3, 3), "w3": (4, 3, 1, 1)}
    plan = plan_for(small.build(nodes, weights))
    assert plan.tensors.keys() == {"x", "a", "b", "c", "y"}
    assert {plan.tensors[k].source for k in "xabcy"} == set("xabcy")
    assert plan.nodes["/c"].role == "integer"


def test_a_softmax_between_products_has_the_scale_its_kernel_is_right_for(small) -> None:
    nodes = "a = MatMul(x, w) s = Softmax<axis=-1>(a) y = MatMul(s, v)"
    source = small.build(
        nodes, {"w": (12, 20), "v": (20, 16)}, "float[N,S,12] x", "float[N,S,16] y"
    )
    plan = plan_for(source)
    if plan.nodes["/s"].role == "integer":
        assert plan.tensors["s"].fixed == (1 / 256, 0)
    nodes = "a = Conv(x, w) s = Softmax<axis=1>(a) y = Conv(s, v)"
    plan = plan_for(small.build(nodes, {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)}))
    assert plan.nodes["/s"].role == "integer"
    assert plan.tensors["s"].fixed == (1 / 256, 0)


@pytest.mark.parametrize("selector", ["/a", "/[a]", "Conv"])
def test_excluded_nodes_stay_float(small, selector: str) -> None:
    plan = plan_for(small.convs(), excluded=[selector])
    assert plan.nodes["/a"].role == "float"
    assert plan.nodes["/a"].reason == "excluded"
    assert (plan.nodes["/y"].role == "float") == (selector == "Conv")
    assert ("/a", 1) not in plan.constants


@pytest.mark.parametrize("selector", ["/nothing", "Gemm", "conv", "/a/*"])
def test_a_selector_that_fits_nothing_is_refused(small, selector: str) -> None:
    with pytest.raises(ConfigError, match=r"exclude '.*': no node has such a name"):
        plan_for(small.convs(), excluded=[selector])


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("group", [1, 2])
def test_a_transposed_convolution_whose_groups_share_scales_keeps_its_bias_in_float(
    small, tmp_path, group: int, per_channel: bool
) -> None:
    nodes = f"y = ConvTranspose<group={group}, strides=[2,2]>(x, w, b)"
    source = small.build(nodes, {"w": (4, 3, 3, 3), "b": (3 * group,)}, "float[N,4,6,6] x")
    model, batches = qwrap.load(source).eval(), small.batches(2, (2, 4, 6, 6))
    plan = qwrap.prepare(model, qwrap.QConfig(scope="all", per_channel=per_channel))
    assert bool(plan.biases) == (group == 1 or not per_channel)
    qwrap.calibrate(model, batches, progress=False)
    qwrap.export(model, tmp_path / "q.onnx")
    assert qwrap.verify(model, tmp_path / "q.onnx", batches, progress=False).differing_codes == 0


def test_an_excluded_moving_node_is_not_in_the_group_of_its_input(small) -> None:
    nodes = "a = Conv(x, w) b = MaxPool<kernel_shape=[2,2]>(a) y = Conv(b, v)"
    source = small.build(nodes, {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)})
    assert plan_for(source).tensors["b"].source == "a"
    plan = plan_for(source, excluded=["MaxPool"])
    assert plan.nodes["/b"].reason == "excluded"
    assert plan.tensors["b"].source == "b"


def test_what_would_run_slower_stays_float_unless_asked_for(small) -> None:
    source = small.convs()
    plan = qwrap.prepare(qwrap.load(source))
    assert not plan.tensors
    assert "would not pay" in plan.nodes["/a"].reason
    assert plan_for(source).nodes["/a"].role == "integer"


def test_a_large_layer_is_quantized_by_default(small) -> None:
    source = small.build(
        "y = MatMul(x, w)", {"w": (512, 512)}, "float[64,512] x", "float[64,512] y"
    )
    assert qwrap.prepare(qwrap.load(source)).nodes["/y"].role == "integer"


def test_a_product_with_few_columns_behind_integers_is_quantized(small) -> None:
    nodes = "a = MatMul(x, w) b = Relu(a) y = MatMul(b, v)"
    source = small.build(nodes, {"w": (64, 32), "v": (32, 4)}, "float[N,64] x", "float[N,4] y")
    plan = plan_for(source)
    assert plan.nodes["/y"].role == "integer"
    assert plan.nodes["/b"].role == "absorbed"


def test_a_float_island_is_not_entered(small) -> None:
    nodes = "a = Conv(x, w) b = Tanh(a) c = Sqrt(b) y = Conv(c, v)"
    plan = plan_for(small.build(nodes, {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)}))
    assert "b" not in plan.tensors
    assert plan.tensors.keys() == {"x", "a", "c", "y"}
    assert plan.nodes["/b"].reason


def test_elementwise_nodes_without_integer_neighbours_stay_float(small) -> None:
    plan = plan_for(small.build("a = Add(x, x) b = Sigmoid(a) y = Mul(b, a)", {}))
    assert not plan.tensors
    assert {n.role for n in plan.nodes.values()} == {"float"}
    assert "0 activations, 0 weights" in plan.summary()


def test_index_arithmetic_is_never_quantized(small) -> None:
    nodes = (
        "a = Conv(x, w) s = Shape(a) n = Gather<axis=0>(s, zero) m = Unsqueeze(n, axes) "
        "t = Concat<axis=0>(m, minus) f = Reshape(a, t) y = MatMul(f, v)"
    )
    weights = {"w": (6, 3, 1, 1), "v": (384, 16), "zero": np.array(0), "axes": np.array([0])}
    weights["minus"] = np.array([-1])
    plan = plan_for(small.build(nodes, weights, outputs="float[N,16] y"))
    assert plan.tensors.keys() == {"x", "a", "f"}
    assert plan.tensors["f"].source == "a"
    assert plan.constants.keys() == {("/a", 1), ("/y", 1)}


def test_a_weight_shared_by_two_nodes_has_a_plan_for_each(small, quantized) -> None:
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w, b) c = Relu(a) y = Conv<pads=[1,1,1,1]>(c, w, b)"
    result = quantized(small.build(nodes, {"w": (3, 3, 3, 3), "b": (3,)}))
    assert result.model.plan.constants.keys() == {("/a", 1), ("/y", 1)}
    codes = [i for i in result.file().graph.initializer if i.data_type == TensorProto.INT8]
    assert len([c for c in codes if len(c.dims) == 4]) == 1  # stored once
    assert result.verify().deployed.differing == 0


def test_weights_in_constant_nodes_are_quantized(small, quantized) -> None:
    source = small.convs()
    for tensor in list(source.graph.initializer):
        node = helper.make_node("Constant", [], [tensor.name], f"/{tensor.name}", value=tensor)
        source.graph.initializer.remove(tensor)
        source.graph.node.insert(0, node)
    result = quantized(source)
    assert result.operators()["QLinearConv"] == 2
    assert not [n for n in result.file().graph.node if n.op_type == "Constant"]
    assert result.verify().deployed.differing == 0


def test_weights_that_are_graph_inputs_with_a_default_are_quantized(small, quantized) -> None:
    source = small.convs()
    source.ir_version = 3
    source.graph.input.extend(
        helper.make_tensor_value_info(i.name, TensorProto.FLOAT, i.dims)
        for i in source.graph.initializer
    )
    result = quantized(source)
    assert result.operators()["QLinearConv"] == 2
    assert [i.name for i in result.file().graph.input] == ["x"]
    onnx.checker.check_model(result.file(), full_check=True)


def test_a_weight_that_is_a_graph_input_stays_float(small) -> None:
    source = small.build("y = Conv(x, w)", {}, "float[N,3,8,8] x, float[4,3,3,3] w")
    plan = plan_for(source)
    assert plan.nodes["/y"].role == "float"
    assert plan.nodes["/y"].reason
    assert not plan.tensors


def test_a_tensor_added_to_itself_is_quantized_once(small, quantized) -> None:
    nodes = "a = Conv(x, w) b = Add(a, a) y = Conv(b, v)"
    result = quantized(small.build(nodes, {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)}))
    assert result.operators()["QLinearAdd"] == 1
    kinds = [n.op_type for n in result.file().graph.node]
    assert kinds.count("QuantizeLinear") == 4
    assert result.verify().deployed.differing == 0


@pytest.mark.parametrize("number", [np.float32(0.7), np.array([0.7], np.float32)])
def test_a_scalar_operand_is_stored_as_a_code(small, quantized, number) -> None:
    nodes = "a = Conv(x, w) b = Mul(a, c) y = Conv(b, v)"
    weights = {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1), "c": np.asarray(number)}
    result = quantized(
        small.build(nodes, weights), config=qwrap.QConfig(scope="kernels", excluded=[])
    )
    assert result.verify().deployed.differing == 0
    assert result.operators()["Mul"] == 0


def test_double_is_not_quantized(small) -> None:
    source = small.build(
        "y = Conv(x, w)",
        {"w": np.ones((4, 3, 3, 3))},
        "double[N,3,8,8] x",
        "double[N,M,H,W] y",
    )
    source.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3)), "w"))
    plan = plan_for(source)
    assert not plan.tensors
    assert "float type" in plan.nodes["/y"].reason


def test_bodies_of_if_are_quantized_inside(small, quantized) -> None:
    nodes = (
        "a = Conv(x, w) m = ReduceMean<keepdims=0>(x) g = Greater(m, z) "
        "r = If (g) <then_branch = t () => (float[N,4,8,8] p) { p = Conv(a, v) }, "
        "else_branch = e () => (float[N,4,8,8] q) { q0 = Relu(a) q = Conv(q0, u) }> "
        "y = Conv(r, o)"
    )
    weights = {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1), "u": (4, 6, 1, 1), "o": (4, 4, 1, 1)}
    source = small.build(nodes, weights | {"z": np.zeros((), np.float32)})
    both = [b + shift for b in small.batches() for shift in (-0.5, 0.5)]
    result = quantized(source, both)
    assert result.operators()["QLinearConv"] == 4, result.model.plan.summary()
    assert result.verify().deployed.differing == 0


def test_a_concat_with_a_constant_has_codes_for_it(small, quantized) -> None:
    nodes = "a = Conv(x, w) b = Concat<axis=1>(a, c) y = Conv(b, v)"
    weights = {"w": (6, 3, 1, 1), "v": (4, 8, 1, 1), "c": (2, 2, 8, 8)}
    result = quantized(small.build(nodes, weights))
    assert result.operators()["QLinearConcat"] == 1
    assert result.verify().deployed.differing == 0


def test_unsupported_operators_are_all_listed(small) -> None:
    source = small.build("a = Nope(x) y = Never(a)", {})
    with pytest.raises(UnsupportedOpError, match=r"Nope.*Never"):
        qwrap.load(source)


def test_a_dilated_average_pool_is_kept_from_being_fused(small, quantized) -> None:
    """onnxruntime 1.31 fuses it wherever pairs allow, and then refuses to load the model."""
    nodes = "a = Conv(x, w) b = AveragePool<kernel_shape=[2,2], dilations=[2,2]>(a) y = Conv(b, v)"
    weights = {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)}
    result = quantized(small.build(nodes, weights, opset=19))
    plan = result.model.plan
    assert {k: n.role for k, n in plan.nodes.items()} == {
        "/a": "integer", "/b": "float", "/y": "float",
    }  # fmt: skip
    assert "dilated" in plan.nodes["/b"].reason
    assert "dilated" in plan.nodes["/y"].reason
    assert result.verify().deployed.differing == 0


def test_an_operator_of_another_domain_is_not_taken_for_that_of_onnx(small) -> None:
    source = small.convs()
    plan = plan_for(source)
    assert plan.nodes["/a"].role == "integer"
    source.graph.node[0].domain = "com.example"
    source.opset_import.add(domain="com.example", version=1)
    with pytest.raises(UnsupportedOpError, match=r"com\.example::Conv"):
        qwrap.load(source)


@pytest.mark.parametrize(
    ("layer", "rounds"),
    [("MatMul(x, w)", True), ("Gemm(x, w)", True), ("Gemm<transB=1>(x, w)", False)],
)
def test_that_onnxruntime_rounds_beside_weights_alone_is_told(
    small, quantized, layer: str, rounds: bool
) -> None:
    source = small.build(f"y = {layer}", {"w": (64, 64)}, "float[4,64] x", "float[4,64] y", 21)
    config = qwrap.QConfig(activation=None)
    made = quantized(source, small.batches(1, (4, 64)), config)
    (output,) = made.verify().deployed.outputs
    assert (output.sqnr < 60) == rounds  # dB; float rounding alone is beyond 120
    assert any("rounds activations" in note for note in made.model.plan.notes) == rounds
