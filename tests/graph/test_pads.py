"""Folding Pad into Conv, against onnxruntime."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from qwrap.graph.pads import fold_pads

X = np.random.default_rng(0).normal(size=(1, 2, 5, 6)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(3, 2, 3, 3)).astype(np.float32)


def build(body: str, opset: int = 13, **constants: np.ndarray) -> ir.Model:
    header = f'<ir_version: 8, opset_import: ["": {opset}]>'
    graph = f"g (float[1,2,5,6] x) => (float[1,3,H,W] y) {{ {body} }}"
    proto = onnx.parser.parse_model(f"{header} {graph}")
    for name, array in {"w": W, **constants}.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def run(model: ir.Model) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # As written: else onnxruntime's own fusion would stand on both sides of the comparison.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, {"x": X})[0]


@pytest.mark.parametrize(
    "conv",
    ["Conv (p, w)", "Conv <pads: ints = [1,0,2,1]> (p, w)", 'Conv <auto_pad = "VALID"> (p, w)'],
)
def test_zero_padding_moves_into_the_conv(conv: str) -> None:
    before = build(f"p = Pad (x, k) y = {conv}", k=np.array([0, 0, 0, 1, 0, 0, 2, 1]))
    after = before.clone()
    assert len(fold_pads(after, {})) == 1
    assert [n.op_type for n in after.graph] == ["Conv"]
    # Zeros of the padding add in another order: some roundings of sums of 18 products.
    np.testing.assert_allclose(run(after), run(before), rtol=0, atol=1e-5)


def test_computed_pads_are_taken_from_what_is_known() -> None:
    model = build("k = Add (a, a) p = Pad (x, k) y = Conv (p, w)", a=np.array([0, 0, 1, 1] * 2))
    before = run(model)
    assert len(fold_pads(model, {"k": np.array([0, 0, 2, 2] * 2)})) == 1
    assert [n.op_type for n in model.graph] == ["Conv"]  # what computed the pads is gone
    np.testing.assert_allclose(run(model), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "pads"),
    [
        ("p = Pad (x, k, one) y = Conv (p, w)", [0, 0, 1, 1, 0, 0, 1, 1]),
        ('p = Pad <mode = "edge"> (x, k) y = Conv (p, w)', [0, 0, 1, 1, 0, 0, 1, 1]),
        ("p = Pad (x, k) y = Conv (p, w)", [0, 0, -1, 0, 0, 0, 0, 0]),
        ("p = Pad (x, k) s = Slice (p, i, j, i) y = Conv (s, w)", [0, 1, 0, 0, 0, 0, 0, 0]),
        ("p = Pad (x, k) q = Conv (p, w) r = ReduceSum (p) y = Add (q, r)", [0, 0, 1, 1] * 2),
        ('p = Pad (x, k) y = Conv <auto_pad = "SAME_UPPER"> (p, w)', [0, 0, 1, 1] * 2),
    ],
)
def test_other_padding_stays(body: str, pads: list[int]) -> None:
    numbers = {"one": np.float32(1), "i": np.array([1]), "j": np.array([3])}
    model = build(body, k=np.array(pads), **{n: np.asarray(v) for n, v in numbers.items()})
    assert fold_pads(model, {}) == []
    assert next(iter(model.graph)).op_type == "Pad"
