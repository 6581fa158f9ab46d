"""Rows times matrix must be what onnxruntime computes."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper

from qwrap.model import load
from qwrap.quant.unfold import Unfold

FLOAT = onnx.TensorProto.FLOAT
CONVS = {
    "plain": ((2, 3, 7, 9), (4, 3, 3, 3), {}),
    "strided": ((2, 3, 7, 9), (4, 3, 3, 2), {"strides": [2, 3]}),
    "padded": ((2, 3, 7, 9), (4, 3, 3, 3), {"pads": [1, 0, 2, 1]}),
    "dilated": ((2, 3, 9, 9), (4, 3, 3, 3), {"dilations": [2, 3], "pads": [1, 1, 1, 1]}),
    "same upper": ((1, 3, 8, 7), (4, 3, 3, 2), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "same lower": ((1, 3, 8, 7), (4, 3, 3, 2), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "groups": ((2, 6, 7, 5), (4, 3, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": ((2, 5, 7, 5), (10, 1, 3, 3), {"group": 5, "strides": [2, 1]}),
    "1-D": ((2, 3, 11), (4, 3, 4), {"strides": [2], "pads": [1, 2]}),
    "3-D": ((2, 2, 5, 6, 4), (3, 2, 2, 3, 2), {"strides": [1, 2, 1], "dilations": [2, 1, 1]}),
}


def single(op_type: str, weight: np.ndarray, rank: int, **attributes: object) -> onnx.ModelProto:
    node = helper.make_node(op_type, ["x", "w"], ["y"], "node", **attributes)
    graph = helper.make_graph(
        [node],
        "single",
        [helper.make_tensor_value_info("x", FLOAT, [None] * rank)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opset = [helper.make_opsetid("", 13)]
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=opset, ir_version=8)
    )


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def rows_of(model: onnx.ModelProto, x: np.ndarray, weight: np.ndarray, **k: int) -> torch.Tensor:
    node = load(model).graph.nodes["node"]
    return Unfold.of(node, torch.from_numpy(weight)).rows(torch.from_numpy(x), **k)


@pytest.mark.parametrize("name", CONVS)
def test_rows_of_a_convolution_times_its_weight_are_its_output(name: str) -> None:
    shape, weight_shape, attributes = CONVS[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    weight = rng.standard_normal(weight_shape).astype(np.float32)
    model = single("Conv", weight, x.ndim, **attributes)
    groups = attributes.get("group", 1)
    rows = rows_of(model, x, weight)
    product = rows.numpy() @ weight.reshape(groups, weight.shape[0] // groups, -1).swapaxes(1, 2)
    wanted = run(model, x).swapaxes(0, 1)
    found = product.swapaxes(1, 2).reshape(wanted.shape)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)  # 27 float32 products of size 1


@pytest.mark.parametrize(
    ("op_type", "shape", "attributes"),
    [
        ("MatMul", (5, 6), {}),
        ("MatMul", (2, 3, 6), {}),
        ("MatMul", (6,), {}),
        ("Gemm", (5, 6), {}),
        ("Gemm", (6, 5), {"transA": 1}),
    ],
)
def test_rows_of_a_matrix_product_times_its_weight_are_its_output(
    op_type: str, shape: tuple[int, ...], attributes: dict[str, int]
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    weight = rng.standard_normal((6, 4)).astype(np.float32)
    model = single(op_type, weight, x.ndim, **attributes)
    found = rows_of(model, x, weight).numpy()[0] @ weight
    np.testing.assert_allclose(found.reshape(-1), run(model, x).reshape(-1), rtol=0, atol=1e-5)


def test_a_sample_of_positions_keeps_to_its_size_and_visits_every_column() -> None:
    x = np.broadcast_to(np.arange(64, dtype=np.float32), (1, 1, 64, 64)).copy()
    weight = np.ones((1, 1, 1, 1), np.float32)
    model = single("Conv", weight, 4)
    rows = rows_of(model, x, weight, largest=256)
    assert 128 <= rows.numel() <= 256
    assert len(rows.unique()) == 64
    assert not torch.equal(rows, rows_of(model, x, weight, largest=256, start=rows.numel()))
