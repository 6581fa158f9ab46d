"""Where onnxruntime's optimiser would change what a file means, or refuse it; warnings fail."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import qwrap


def kept_in_front_of(made, op_type: str) -> bool:
    """Whether a node that changes nothing is between the pair and the operator."""
    graph = made.file().graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    readers = [node for node in graph.node if node.op_type == op_type]
    return all(makers.get(node.input[0]) == "Max" for node in readers)


LAYERS = {
    "Conv": ("b = Conv(a, w)", (3, 3, 1, 1)),
    "ConvTranspose": ("b = ConvTranspose(a, w)", (3, 3, 1, 1)),
    "Gemm": ("r = Reshape(a, rows) g = Gemm(r, w) b = Reshape(g, image)", (192, 192)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("wish", [{"weight": "float32"}, {"activation": "float32"}])
def test_a_weight_that_stays_float_is_not_quantized_by_the_runtime(
    small, quantized: Callable, kind: str, wish: dict[str, str]
) -> None:
    layer, shape = LAYERS[kind]
    weights = {"v": (3, 3, 1, 1), "w": shape, "rows": np.array([-1, 192])}
    weights["image"] = np.array([-1, 3, 8, 8])
    source = small.build(f"a = Conv(x, v) {layer} y = Conv(b, v)", weights)
    config = qwrap.QConfig(scope="all")
    config.set(["/g" if kind == "Gemm" else "/b"], **wish)
    report = quantized(source, config=config).verify()
    assert report.deployed.differing == 0
    assert report.specification.differing == 0


@pytest.mark.parametrize("activation", ["uint4", "int4"])
@pytest.mark.parametrize("weight", ["uint8", "int8", "int4"])
def test_a_convolution_of_4_bits_opens_with_all_optimisations(
    small, quantized: Callable, activation: str, weight: str
) -> None:
    config = qwrap.QConfig(activation=activation, weight=weight, scope="kernels")
    made = quantized(small.convs(), config=config)
    assert small.session(made.path)


@pytest.mark.parametrize("activation", ["uint4", "int4"])
def test_a_pool_of_4_bits_opens_with_all_optimisations(
    small, quantized: Callable, activation: str
) -> None:
    nodes = "a = Conv(x, w) b = MaxPool<kernel_shape=[2,2]>(a) y = Conv(b, v)"
    source = small.build(nodes, {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)})
    config = qwrap.QConfig(activation=activation, weight="int4", scope="kernels")
    assert small.session(quantized(source, config=config).path)


MOVES = {
    "Slice": "m = Slice(a, zero, five, last)",
    "Transpose": "m = Transpose<perm=[0,1,3,2]>(a)",
    "Reshape": "m = Reshape(a, image)",
    "Flatten": "m = Flatten(a)",
    "MaxPool": "m = MaxPool<kernel_shape=[2,2]>(a)",
}


@pytest.mark.parametrize("kind", MOVES)
def test_int8_that_is_moved_to_a_float_node_opens_at_opset_21(
    small, quantized: Callable, kind: str
) -> None:
    source = small.build(
        f"a = Conv(x, w) {MOVES[kind]} y = Tanh(m)",
        {
            "w": (3, 3, 1, 1),
            "zero": np.array([0]),
            "five": np.array([5]),
            "last": np.array([-1]),
            "image": np.array([2, 3, 8, 8]),
        },
        outputs="float[N,K] y" if kind == "Flatten" else "float[N,M,H,W] y",
        opset=21,
    )
    config = qwrap.QConfig(activation="int8", scope="kernels", excluded=[kind])
    made = quantized(source, config=config)
    assert kept_in_front_of(made, kind)
    assert made.verify().deployed.differing == 0


def test_int8_that_was_moved_from_a_float_node_opens_at_opset_21(
    small, quantized: Callable
) -> None:
    nodes = "a = Tanh(x) b = Transpose<perm=[0,1,3,2]>(a) y = Conv(b, w)"
    source = small.build(nodes, {"w": (3, 3, 1, 1)}, opset=21)
    config = qwrap.QConfig(activation="int8", scope="kernels")
    assert quantized(source, config=config).verify().deployed.differing == 0


def test_uint8_that_is_moved_to_a_float_node_is_not_held_up(small, quantized: Callable) -> None:
    source = small.build(
        "a = Conv(x, w) b = Reshape(a, image) y = Tanh(b)",
        {"w": (3, 3, 1, 1), "image": np.array([2, 3, 8, 8])},
        opset=21,
    )
    made = quantized(source, config=qwrap.QConfig(scope="kernels", excluded=["Reshape"]))
    assert not kept_in_front_of(made, "Reshape")


def test_what_a_body_reads_of_a_moved_tensor_does_not_end_the_process(
    small, quantized: Callable
) -> None:
    nodes = (
        "a = Conv(x, w) i = Identity(a) m = MaxPool<kernel_shape=[2,2]>(i) "
        "s = ReduceMax<keepdims=0>(x) "
        "c = Greater(s, zero) y = If (c) <"
        "then_branch = yes () => (float[N,M,H,W] p) { p = Tanh(m) }, "
        "else_branch = no () => (float[N,M,H,W] q) { q = Sin(m) }>"
    )
    source = small.build(nodes, {"w": (3, 3, 1, 1), "zero": np.array(0, np.float32)})
    made = quantized(
        source, config=qwrap.QConfig(scope="kernels", excluded=["MaxPool", "Identity"])
    )
    assert kept_in_front_of(made, "Identity")
    assert made.verify().deployed.differing == 0


def test_codes_of_an_identity_that_a_body_reads_do_not_end_the_process(
    small, quantized: Callable
) -> None:
    nodes = (
        "a = Conv(x, w) m = Identity(a) s = ReduceMax<keepdims=0>(x) c = Greater(s, zero) "
        "y = If (c) <then_branch = yes () => (float[N,M,H,W] p) { p = Conv(m, w) }, "
        "else_branch = no () => (float[N,M,H,W] q) { q = Conv(m, w) }>"
    )
    source = small.build(nodes, {"w": (3, 3, 1, 1), "zero": np.array(0, np.float32)})
    made = quantized(source, config=qwrap.QConfig(scope="kernels"))
    assert made.model.plan.nodes["/m"].role == "moves"
    assert made.verify().deployed.differing == 0


def test_a_graph_output_stays_float_where_what_was_moved_from_it_is_quantized(
    small, quantized: Callable
) -> None:
    nodes = "y = Tanh(x) b = Transpose<perm=[0,1,3,2]>(y) z = Conv(b, w)"
    outputs = "float[N,3,8,8] y, float[N,3,8,8] z"
    source = small.build(nodes, {"w": (3, 3, 1, 1)}, outputs=outputs)
    report = quantized(source, config=qwrap.QConfig(scope="kernels")).verify()
    # Tanh of torch and of onnxruntime differ in the last bits.
    assert report.deployed.outputs[0].max_abs_difference < 1e-6


@pytest.mark.parametrize("activation", [None, "uint16"])
def test_a_product_in_a_body_with_a_weight_of_4_bits_opens(
    small, quantized: Callable, activation: str | None
) -> None:
    nodes = (
        "s = ReduceMax<keepdims=0>(x) c = Greater(s, zero) y = If (c) <"
        "then_branch = yes () => (float[N,3,8,8] p) { p = MatMul(x, w) }, "
        "else_branch = no () => (float[N,3,8,8] q) { q = Tanh(x) }>"
    )
    weights = {"w": (8, 8), "zero": np.array(0, np.float32)}
    source = small.build(nodes, weights, outputs="float[N,3,8,8] y")
    config = qwrap.QConfig(activation=activation, weight="int4", scope="kernels")
    made = quantized(source, config=config)
    report = made.verify()
    assert all(output.sqnr > 100 for output in report.deployed.outputs)


def test_a_large_bias_beside_16_bits_stays_what_it_is(small, quantized: Callable) -> None:
    bias = np.array([9.0, -9.0, 0.5, 0.1], np.float32)  # in steps of both scales beyond int32
    source = small.build("a = Sigmoid(x) y = Conv(a, w, b)", {"w": (4, 3, 1, 1), "b": bias})
    config = qwrap.QConfig(activation="uint16", weight="int16", scope="all")
    made = quantized(source, config=config)
    assert ("/y", 2) not in made.model.plan.biases
    assert max(tensor.worst_step for tensor in made.verify().deployed.tensors) <= 1
