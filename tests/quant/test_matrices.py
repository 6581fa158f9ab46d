"""Rows times the matrix of a weight must be what onnxruntime computes."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper

import qwrap
from qwrap.config import QuantSpec
from qwrap.quant.matrices import WeightMatrix, is_given, users, weight_matrices

FLOAT = onnx.TensorProto.FLOAT
# Operator, input shape, weight shape, attributes.
LAYERS = {
    "Conv": ("Conv", (2, 3, 7, 9), (4, 3, 3, 2), {"strides": [2, 1], "pads": [1, 0, 2, 1]}),
    "grouped Conv": ("Conv", (2, 6, 7, 5), (4, 3, 3, 3), {"group": 2}),
    "Gemm": ("Gemm", (5, 6), (6, 4), {}),
    "Gemm transB": ("Gemm", (5, 6), (4, 6), {"transB": 1}),
    "Gemm transA": ("Gemm", (6, 5), (6, 4), {"transA": 1}),
    "MatMul": ("MatMul", (2, 3, 6), (6, 4), {}),
    "vector": ("MatMul", (6,), (6, 4), {}),
    "batched": ("MatMul", (2, 3, 5, 6), (2, 3, 6, 4), {}),
    "batched on one side": ("MatMul", (5, 6), (3, 6, 4), {}),
    "broadcast": ("MatMul", (7, 1, 3, 5, 6), (2, 1, 6, 4), {}),
    "vector times batch": ("MatMul", (6,), (3, 6, 4), {}),
    "ConvTranspose": ("ConvTranspose", (2, 3, 5, 6), (3, 4, 3, 2), {}),
    "strided transpose": (
        "ConvTranspose",
        (2, 3, 5, 6),
        (3, 4, 3, 2),
        {"strides": [2, 3], "pads": [1, 0, 2, 1], "output_padding": [1, 2]},
    ),
    "grouped transpose": (
        "ConvTranspose",
        (2, 4, 5, 6),
        (4, 3, 2, 3),
        {"group": 2, "dilations": [2, 1], "strides": [1, 2]},
    ),
    "depthwise transpose": ("ConvTranspose", (2, 4, 7), (4, 1, 3), {"group": 4, "strides": [2]}),
    "same transpose": (
        "ConvTranspose",
        (1, 2, 5, 6),
        (2, 3, 3, 3),
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    ),
    "shaped transpose": (
        "ConvTranspose",
        (1, 2, 5, 6),
        (2, 3, 3, 3),
        {"output_shape": [10, 13], "strides": [2, 2]},
    ),
    "3-D transpose": ("ConvTranspose", (1, 2, 3, 4, 2), (2, 3, 2, 3, 2), {"strides": [1, 2, 2]}),
}


def build(op_type: str, rank: int, weight: np.ndarray, **attributes: object) -> onnx.ModelProto:
    node = helper.make_node(op_type, ["x", "w"], ["y"], "node", **attributes)
    graph = helper.make_graph(
        [node],
        "single",
        [helper.make_tensor_value_info("x", FLOAT, [None] * rank)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def matrix_of(source: onnx.ModelProto, **config: object) -> tuple[qwrap.WrappedModel, WeightMatrix]:
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(activation=None, **config))
    (matrix,), left_out = weight_matrices(model)
    assert not left_out
    return model, matrix


def drawn(name: str) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    op_type, shape, weight_shape, attributes = LAYERS[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    weight = rng.standard_normal(weight_shape).astype(np.float32)
    return build(op_type, len(shape), weight, **attributes), x, weight


def outputs_last(name: str, y: np.ndarray, groups: int) -> np.ndarray:
    """``[G, P, R]`` of an output."""
    if "Conv" in LAYERS[name][0]:
        return y.swapaxes(0, 1).reshape(groups, y.shape[1] // groups, -1).swapaxes(1, 2)
    if len(LAYERS[name][2]) == 2:
        return y.reshape(1, -1, y.shape[-1])
    if name == "broadcast":  # [7, 2, 3, 5, 4]: the weight's first axis in front
        return np.moveaxis(y, 1, 0).reshape(groups, -1, y.shape[-1])
    shape = LAYERS[name][1]
    return y.reshape(groups, shape[-2] if len(shape) > 1 else 1, y.shape[-1])


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_matrix_are_the_output(name: str) -> None:
    source, x, weight = drawn(name)
    model, matrix = matrix_of(source)
    session = ort.InferenceSession(source.SerializeToString(), providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": x})[0]
    rows = matrix.unfold.rows(torch.from_numpy(x))
    columns = matrix.columns(torch.from_numpy(weight))
    found = (rows @ columns).numpy()
    # Some 30 float32 products of size 1.
    wanted = outputs_last(name, y, matrix.unfold.groups)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert model.graph.key(matrix.node.inputs[0]) == matrix.input


@pytest.mark.parametrize("name", LAYERS)
def test_a_matrix_goes_back_into_the_weight(name: str) -> None:
    source, _, weight = drawn(name)
    _, matrix = matrix_of(source)
    values = torch.from_numpy(weight)
    assert torch.equal(matrix.stored(matrix.columns(values)), values)


@pytest.mark.parametrize("name", ["Conv", "Gemm transB", "MatMul", "ConvTranspose", "batched"])
@pytest.mark.parametrize("block_size", [None, 2])
def test_every_element_knows_its_scale(name: str, block_size: int | None) -> None:
    source, _, weight = drawn(name)
    spec = QuantSpec(dtype="int8", block_size=block_size) if block_size else "int8"
    model, matrix = matrix_of(source, weight=spec)
    qwrap.calibrate(model, [drawn(name)[1]], progress=False)
    step = matrix.stub.scale.flatten()[matrix.scale_index()]
    values = matrix.columns(torch.from_numpy(weight))
    rounded = matrix.columns(matrix.stub(torch.from_numpy(weight)))
    # With the right step all are within half of one, or clamped; with another's most are not.
    assert ((rounded / step) - (rounded / step).round()).abs().max() < 1e-4
    assert ((rounded - values).abs() <= step / 2 * (1 + 1e-4)).float().mean() > 0.8


def test_what_is_too_large_is_left_out_with_its_reason() -> None:
    model = qwrap.load(build("MatMul", 2, np.ones((9000, 2), np.float32))).eval()
    qwrap.prepare(model, qwrap.QConfig(activation=None))
    assert len(weight_matrices(model)[0]) == 1
    assert weight_matrices(model, 8192) == ([], ["'w' has 9000 inputs, more than 8192"])


def test_weights_come_with_their_biases_and_users(small) -> None:
    model = qwrap.load(small.convs()).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    found, _ = weight_matrices(model)
    assert [(m.value, m.bias) for m in found] == [("w1", "b1"), ("w2", "b2")]
    assert not any(is_given(model, m.use) for m in found)
    assert [users(model, m) for m in found] == [(1, 1), (1, 1)]
