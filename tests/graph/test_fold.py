"""Folding into layers changes the file, not what onnxruntime computes from it."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from qwrap.graph.fold import fold_batch_norm, fold_scale_and_shift

NORM = "BatchNormalization"


def parse(graph: str, opset: int = 13, ir_version: int = 8, **weights: np.ndarray) -> ir.Model:
    """A model from ONNX text; ``weights`` become float32 initialisers."""
    header = f'<ir_version: {ir_version}, opset_import: ["": {opset}]>'
    proto = onnx.parser.parse_model(f"{header} {graph}")
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.float32(array), name))
    return ir.from_proto(proto)


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {k: np.float32(v) for k, v in feeds.items()})


def assert_same_outputs(before: ir.Model, after: ir.Model, **feeds: np.ndarray) -> None:
    for expected, found in zip(run(before, **feeds), run(after, **feeds), strict=True):
        # Both round to float32 at each step, in another order; 1e-5 is about a hundred roundings.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def norm_parameters(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    return {
        "gamma": rng.normal(size=count),
        "beta": rng.normal(size=count),
        "mean": rng.normal(size=count),
        "var": rng.uniform(0.1, 3.0, count),
    }


def conv_norm(seed: int = 0, **more: object) -> ir.Model:
    rng = np.random.default_rng(seed)
    weights = {"weight": rng.normal(size=(4, 3, 3, 3)), **norm_parameters(rng, 4)}
    graph = """g (float[N,3,8,8] x) => (float[N,4,6,6] y) {
        [conv] c = Conv (x, weight)
        [norm] n = BatchNormalization <epsilon: float = 0.01> (c, gamma, beta, mean, var)
        [act] y = Relu (n)
    }"""
    return parse(graph, **weights, **more)  # type: ignore[arg-type]


LAYERS = {  # input, call, shape of the weight before the groups divide it
    "Conv": ("float[2,4,7,7] x", "Conv <group: int = G, pads: ints = [1,1,1,1]>", (6, 4, 3, 3)),
    "Conv1d": ("float[2,4,9] x", "Conv <group: int = G>", (6, 4, 3)),
    "ConvTranspose": ("float[2,4,5,5] x", "ConvTranspose <group: int = G>", (4, 6, 3, 3)),
    "Gemm": ("float[2,4] x", "Gemm", (4, 6)),
    "Gemm transB": (
        "float[4,2] x",
        "Gemm <transA: int=1, transB: int=1, alpha: float=0.5>",
        (6, 4),
    ),
}


@settings(max_examples=60, deadline=None)
@given(
    layer=st.sampled_from(sorted(LAYERS)),
    group=st.sampled_from([1, 2]),
    bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    epsilon=st.sampled_from([1e-5, 1e-3, 0.5]),
    opset=st.sampled_from([11, 13, 14, 15]),
)
def test_a_layer_with_its_batch_norm_computes_the_same_folded(
    layer: str, group: int, bias: bool, seed: int, epsilon: float, opset: int
) -> None:
    rng = np.random.default_rng(seed)
    source, call, shape = LAYERS[layer]
    if "Conv" in layer:
        shape = (shape[0], shape[1] // group, *shape[2:])
    weights = {"w": rng.normal(size=shape), **norm_parameters(rng, 6)}
    if bias:
        weights["b"] = rng.normal(size=6)
    graph = f"""g ({source}) => (y) {{
        [layer] c = {call.replace("= G", f"= {group}")} (x, w{", b" if bias else ""})
        [norm] y = BatchNormalization <epsilon: float = {epsilon}> (c, gamma, beta, mean, var)
    }}"""
    before = parse(graph, opset, **weights)
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(before))
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    before = ir.from_proto(proto)
    after = before.clone()
    fold_batch_norm(after)
    assert len(op_types(after)) == 1
    size = [d if isinstance(d, int) else 1 for d in before.graph.inputs[0].shape or ()]
    assert_same_outputs(before, after, x=rng.normal(size=size))


def test_a_folded_weight_is_the_formula() -> None:
    model = parse(
        """g (float[1,1,1,1] x) => (float[1,2,1,1] y) {
            c = Conv (x, w, b)
            y = BatchNormalization <epsilon: float = 0.0> (c, gamma, beta, mean, var)
        }""",
        w=np.reshape([1.0, 2.0], (2, 1, 1, 1)), b=[1.0, -1.0],
        gamma=[3.0, 1.0], beta=[0.5, 0.0], mean=[2.0, 1.0], var=[4.0, 0.25],
    )  # fmt: skip
    fold_batch_norm(model)
    weight, bias = (model.graph.initializers[name].const_value.numpy() for name in "wb")
    assert weight.ravel().tolist() == [1.5, 4.0]  # 1 * 3 / 2, 2 * 1 / 0.5
    assert bias.tolist() == [-1.0, -4.0]  # (1 - 2) * 1.5 + 0.5, (-1 - 1) * 2


def test_node_and_output_keep_their_names_and_only_dead_parameters_go() -> None:
    model = conv_norm()
    lines = fold_batch_norm(model)
    assert lines == ["BatchNormalization 'norm': folded into Conv 'conv'"]
    conv, relu = list(model.graph)
    assert (conv.name, conv.outputs[0].name, relu.name) == ("conv", "n", "act")
    assert set(model.graph.initializers) == {"weight", "bias"}


def test_a_folded_output_of_the_graph_keeps_its_name_and_type() -> None:
    before = conv_norm()
    before.graph.outputs[0] = before.graph[1].outputs[0]
    before.graph.remove(before.graph[2], safe=True)
    before.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    before.graph.outputs[0].shape = ir.Shape(["N", 4, 6, 6])
    after = before.clone()
    fold_batch_norm(after)
    assert ir.to_proto(after).graph.output == ir.to_proto(before).graph.output
    assert_same_outputs(before, after, x=np.random.default_rng(1).normal(size=(2, 3, 8, 8)))


def test_a_weight_of_two_layers_is_copied_before_it_is_scaled() -> None:
    rng = np.random.default_rng(2)
    graph = """g (float[1,2,5,5] x) => (float[1,2,5,5] y, float[1,2,5,5] z) {
        [first] c = Conv (x, w)
        y = BatchNormalization (c, gamma, beta, mean, var)
        [second] d = Conv (x, w)
        z = BatchNormalization (d, gamma, gamma, mean, var)
        }"""
    before = parse(graph, w=rng.normal(size=(2, 2, 1, 1)), **norm_parameters(rng, 2))
    after = before.clone()
    assert len(fold_batch_norm(after)) == 2
    assert {"w", "w_first"} <= set(after.graph.initializers)
    assert_same_outputs(before, after, x=rng.normal(size=(1, 2, 5, 5)))


@pytest.mark.parametrize(
    "body",
    [
        "c = Conv (x, w)"
        "n, m, v = BatchNormalization <training_mode: int = 1> (c, s, s, s, t) y = Relu (n)",
        "c = Conv (x, w) n = BatchNormalization <training_mode: int = 1> (c, s, s, s, t)"
        "y = Relu (n)",
        "c = Conv (x, w) n = BatchNormalization (c, s, s, s, t) y = Add (n, c)",
        "c = Conv (x, w) n = BatchNormalization (c, s, k, s, t) y = Relu (n)",
        "n = BatchNormalization (x, s, s, s, t) y = Conv (n, w)",
        "v = Mul (w, w) c = Conv (x, v) n = BatchNormalization (c, s, s, s, t) y = Relu (n)",
    ],
    ids=[
        "training",
        "training with one output",
        "output read twice",
        "parameter given by the caller",
        "before the layer",
        "computed weight",
    ],
)
def test_a_batch_norm_that_cannot_be_folded_stays(body: str) -> None:
    graph = f"g (float[1,2,5,5] x, float[2] k) => (float[1,2,5,5] y) {{ {body} }}"
    model = parse(graph, 15, w=np.ones((2, 2, 1, 1)), s=np.ones(2), t=np.ones(2))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not fold_batch_norm(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_layer_whose_output_the_caller_gets_stays() -> None:
    graph = """g (float[1,2,5,5] x) => (float[1,2,5,5] c, float[1,2,5,5] y) {
        c = Conv (x, w) y = BatchNormalization (c, s, s, s, s) }"""
    assert not fold_batch_norm(parse(graph, w=np.ones((2, 2, 1, 1)), s=np.ones(2)))


def test_a_layer_is_not_folded_across_the_border_of_a_branch() -> None:
    graph = """g (float[1,2,5,5] x, bool p) => (float[1,2,5,5] y) {
        c = Conv (x, w)
        y = If (p) <
            then_branch = a () => (float[1,2,5,5] d) { d = BatchNormalization (c, s, s, s, s) },
            else_branch = b () => (float[1,2,5,5] e) { e = Relu (x) }
        > }"""
    assert not fold_batch_norm(parse(graph, w=np.ones((2, 2, 1, 1)), s=np.ones(2)))


def test_gemm_that_scales_its_bias_stays() -> None:
    graph = """g (float[2,4] x) => (float[2,3] y) {
        c = Gemm <beta: float = 0.5> (x, w, k) y = Add (c, k) }"""
    assert not fold_scale_and_shift(parse(graph, w=np.ones((4, 3)), k=np.ones(3)))


def test_a_fold_that_would_overflow_the_weight_is_refused() -> None:
    model = conv_norm()
    model.graph.initializers["gamma"].const_value = ir.tensor(np.full(4, 3e38, np.float32))
    assert not fold_batch_norm(model)


def test_constant_nodes_without_names_are_folded_inside_branches() -> None:
    rng = np.random.default_rng(3)

    def constant(name: str, array: np.ndarray) -> onnx.NodeProto:
        tensor = numpy_helper.from_array(np.float32(array), "")
        return onnx.helper.make_node("Constant", [], [name], value=tensor)

    def branch(suffix: str) -> onnx.GraphProto:
        names = {k: k + suffix for k in ("w", "gamma", "beta", "mean", "var", "c", "y")}
        weights = {"w": rng.normal(size=(2, 2, 1, 1)), **norm_parameters(rng, 2)}
        nodes = [constant(names[k], v) for k, v in weights.items()]
        nodes.append(onnx.helper.make_node("Conv", ["x", names["w"]], [names["c"]]))
        parameters = [names[k] for k in ("c", "gamma", "beta", "mean", "var")]
        nodes.append(onnx.helper.make_node(NORM, parameters, [names["y"]]))
        info = onnx.helper.make_tensor_value_info(names["y"], 1, [1, 2, 5, 5])
        return onnx.helper.make_graph(nodes, suffix, [], [info])

    before = parse(
        """g (float[1,2,5,5] x) => (float[1,2,5,5] y) {
        s = ReduceSum <keepdims: int = 0> (x) p = Greater (s, zero)
        [choice] y = If (p) <then_branch = g () => (float z) {}, else_branch = g () => (float z) {}>
    }""",
        zero=np.zeros(()),
    )
    proto = ir.to_proto(before)
    for attribute, suffix in zip(proto.graph.node[-1].attribute, ("1", "2"), strict=True):
        attribute.g.CopyFrom(branch(suffix))
    before = ir.from_proto(proto)
    after = before.clone()
    assert len(fold_batch_norm(after)) == 2
    body = after.graph[-1].attributes["then_branch"].as_graph()
    assert [n.op_type for n in body] == ["Conv"]
    for sign in (1, -1):
        assert_same_outputs(before, after, x=sign * rng.uniform(size=(1, 2, 5, 5)))


@pytest.mark.parametrize(
    ("follower", "shape"),
    [
        ("Add (c, k)", (3, 1, 1)),
        ("Add (k, c)", (1, 3, 1, 1)),
        ("Mul (c, k)", (1, 3, 1, 1)),
        ("Mul (k, c)", ()),
        ("Sub (c, k)", (1,)),
    ],
)
def test_a_scale_or_shift_by_channel_is_folded(follower: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(4)
    graph = f"""g (float[1,2,3,3] x) => (float[1,3,3,3] y) {{
        [conv] c = Conv (x, w, b) [next] y = {follower} }}"""
    weights = {"w": rng.normal(size=(3, 2, 1, 1)), "b": rng.normal(size=3)}
    before = parse(graph, **weights, k=rng.normal(size=shape))
    after = before.clone()
    assert fold_scale_and_shift(after) == [f"{follower[:3]} 'next': folded into Conv 'conv'"]
    assert (op_types(after), set(after.graph.initializers)) == (["Conv"], {"w", "b"})
    assert_same_outputs(before, after, x=rng.normal(size=(1, 2, 3, 3)))


@pytest.mark.parametrize(
    ("follower", "shape"),
    [
        ("Add (c, k)", (3,)),  # along the width
        ("Mul (c, k)", (3, 1)),  # along the height
        ("Add (c, k)", (2, 1, 1, 1)),  # along the batch
        ("Add (c, k)", (1, 1, 3, 1, 1)),  # more dimensions than the layer has
        ("Sub (k, c)", (3, 1, 1)),
    ],
)
def test_a_constant_that_is_not_one_per_channel_stays(
    follower: str, shape: tuple[int, ...]
) -> None:
    graph = f"g (float[2,2,3,3] x) => (y) {{ c = Conv (x, w) y = {follower} }}"
    model = parse(graph, w=np.ones((3, 2, 1, 1)), k=np.ones(shape))
    assert not fold_scale_and_shift(model)


@pytest.mark.parametrize(("shape", "folded"), [((3,), 1), ((1, 3), 1), ((), 1), ((2, 1), 0)])
def test_gemm_takes_a_bias_along_its_columns_only(shape: tuple[int, ...], folded: int) -> None:
    rng = np.random.default_rng(5)
    graph = "g (float[2,4] x) => (float[2,3] y) { c = Gemm (x, w, b) y = Add (c, k) }"
    weights = {"w": rng.normal(size=(4, 3)), "b": rng.normal(size=shape), "k": rng.normal(size=3)}
    before = parse(graph, **weights)
    after = before.clone()
    assert len(fold_scale_and_shift(after)) == folded
    assert_same_outputs(before, after, x=rng.normal(size=(2, 4)))


def test_matmul_keeps_its_add() -> None:
    graph = "g (float[2,4] x) => (float[2,3] y) { c = MatMul (x, w) y = Add (c, k) }"
    assert not fold_scale_and_shift(parse(graph, w=np.ones((4, 3)), k=np.ones(3)))


@pytest.mark.parametrize(("size", "folded"), [((2, 4), 1), ((2, 3, 4), 0)])
def test_matmul_takes_the_scale_of_a_batch_norm_over_its_columns(
    size: tuple[int, ...], folded: int
) -> None:
    rng = np.random.default_rng(6)
    shape = ",".join(map(str, (*size[:-1], 3)))
    graph = f"""g (float[{",".join(map(str, size))}] x) => (float[{shape}] y) {{
        [product] c = MatMul (x, w)
        [norm] y = BatchNormalization (c, gamma, beta, mean, var) }}"""
    before = parse(graph, w=rng.normal(size=(4, 3)), **norm_parameters(rng, 3))
    after = before.clone()
    assert len(fold_batch_norm(after)) == folded
    assert op_types(after) == ["MatMul", "Add" if folded else NORM]
    assert_same_outputs(before, after, x=rng.normal(size=size))


def test_what_was_folded_is_told_with_the_bias_before_and_the_scale_behind_it() -> None:
    graph = """
        g (float[1,1,2] x) => (float[1,2,2] y) {
            c = Conv(x, w, b)
            n = BatchNormalization<epsilon=0.25, momentum=0.75>(c, gamma, beta, mean, var)
            m = Mul(n, half)
            y = Add(m, one)
        }
    """
    weights = {"w": [[[1]], [[2]]], "b": [3, 4], "gamma": [-1, 2], "beta": [5, 6]}
    weights |= {"mean": [7, 9], "var": [0.75, 3.75], "half": 0.5, "one": [[[1], [2]]]}
    model, folded = parse(graph, **{k: np.array(v) for k, v in weights.items()}), {}
    weight = model.graph.initializers["w"].const_value
    fold_batch_norm(model, folded)
    fold_scale_and_shift(model, folded)
    assert op_types(model) == ["Conv"]
    ((node, found),) = folded.items()
    assert node is model.graph[0]
    assert found.weight is weight
    assert found.norm.mean.tolist() == [7 - 3, 9 - 4]
    assert found.norm.variance.tolist() == [0.75, 3.75]
    assert found.norm.gamma.tolist() == [-0.5, 1]
    assert found.norm.beta.tolist() == [5 * 0.5 + 1, 6 * 0.5 + 2]
    assert (found.norm.epsilon, found.norm.momentum) == (0.25, 0.75)
