"""Each operator revision: one node before and after, in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from qwrap.errors import ExportError
from qwrap.graph.opset import raise_opset

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 4, 5, 6)).astype(np.float32)
C = RNG.uniform(0.5, 1.5, 4).astype(np.float32)


@dataclass
class Case:
    """One node at an old opset; ``fixed`` inputs are initialisers."""

    op: str
    opset: int
    attributes: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Array] = field(default_factory=lambda: {"x": X})
    fixed: dict[str, Array] = field(default_factory=dict)
    outputs: int = 1
    expected: tuple[Array, ...] = ()  # where onnxruntime no longer has the old revision
    edited: bool = True

    def node(self) -> onnx.NodeProto:
        names = [*self.inputs, *self.fixed]
        outputs = [f"y{i}" for i in range(self.outputs)]
        return helper.make_node(self.op, names, outputs, name="n", **self.attributes)

    def model(self, ir_version: int = 7) -> onnx.ModelProto:
        graph = helper.make_graph(
            [self.node()],
            "g",
            [info(name, array) for name, array in self.inputs.items()],
            [info(f"y{i}", array) for i, array in enumerate(self.expected)]
            or [helper.make_empty_tensor_value_info(f"y{i}") for i in range(self.outputs)],
            [numpy_helper.from_array(array, name) for name, array in self.fixed.items()],
        )
        opset = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=ir_version)
        model = onnx.shape_inference.infer_shapes(model)
        for output in model.graph.output:  # some old schemas infer nothing
            if not output.type.HasField("tensor_type"):
                vector = helper.make_tensor_type_proto(1, [None])
                first = output.name == "y0"
                output.type.CopyFrom(model.graph.input[0].type if first else vector)
        return model


def info(name: str, array: Array) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
    )


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def floats(*values: float) -> Array:
    return np.array(values, np.float32)


REDUCTIONS = ["ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax"]
REDUCTIONS += ["ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"]
POSITIVE = np.abs(X) + 1
STATISTICS = {"s": C, "b": C, "m": C, "v": C}
INDICES = {"x": X[0, 0], "i": np.array([[0, 2, 1, 1, 0, 3]]), "u": np.ones((1, 6), np.float32)}
BOXES = floats(0, 0, 4.5, 3, 1, 1, 3, 4).reshape(2, 4)
LEFT = [(0, 0), (0, 0), (0, 0), (1, 0)]
PARTS = (X[:, :1], X[:, 1:])

CASES = [
    *(Case(op, 11, {"axes": [1, -1]}, {"x": POSITIVE}) for op in REDUCTIONS),
    *(Case(op, 11, {"keepdims": 0}, {"x": POSITIVE}, edited=False) for op in REDUCTIONS),
    Case("Squeeze", 11, {"axes": [1]}, {"x": X[:, :1]}),
    Case("Squeeze", 9, {}, {"x": X[:, :1]}, edited=False),
    Case("Unsqueeze", 11, {"axes": [0, -1]}),
    Case("Split", 11, {"axis": 1, "split": [1, 3]}, outputs=2),
    Case("Split", 11, {"axis": 1}, outputs=2),
    *(Case(op, 11, {"axis": 1}) for op in ("Softmax", "LogSoftmax", "Hardmax")),
    *(Case(op, 9, {}) for op in ("Softmax", "LogSoftmax", "Hardmax")),
    Case("Softmax", 11, {"axis": -2}),
    Case("Softmax", 11, {"axis": 0}),
    Case("Softmax", 11, {"axis": 3}, edited=False),
    Case("Softmax", 11, {"axis": -1}, edited=False),
    Case("Softmax", 11, {}, {"x": X[0, 0]}, edited=False),
    Case("Softmax", 11, {}, {"x": X[:, :, :1, :1]}),
    Case("Clip", 6, {"min": -0.5, "max": 0.25}),
    Case("Clip", 10, {"max": 0.1}),
    Case("Clip", 6, {}, edited=False),
    Case("Dropout", 7, {"ratio": 0.3}),
    Case("Dropout", 10, {}, edited=False),
    Case("Pad", 2, {"pads": [0, 0, 1, 2, 0, 0, 3, 0]}),
    Case("Pad", 10, {"pads": [0, 0, 1, 2, 0, 0, -1, 0], "value": 1.5}),
    Case("Pad", 10, {"pads": [0, 0, 1, 2, 0, 0, 3, 0], "mode": "reflect"}),
    Case("Slice", 9, {"starts": [1, -3], "ends": [9, -1], "axes": [1, 2]}),
    Case("Slice", 1, {"starts": [1, 0], "ends": [2, 2]}),
    Case("TopK", 9, {"k": 3, "axis": 2}, outputs=2),
    Case("TopK", 10, {"axis": 2}, fixed={"k": ints(3)}, outputs=2, edited=False),
    Case("Upsample", 7, {"scales": [1.0, 1.0, 2.0, 3.0]}),
    Case("Upsample", 9, {"mode": "linear"}, fixed={"s": floats(1, 1, 2, 2.5)}),
    Case("Upsample", 9, {"mode": "nearest"}, {"x": X, "s": floats(1, 1, 1.5, 2.5)}),
    Case("Resize", 10, {}, fixed={"s": floats(1, 1, 1.7, 3)}),
    Case("Resize", 10, {}, fixed={"s": floats(1, 1, 0.6, 0.7)}),
    Case("Resize", 10, {}, fixed={"s": floats(1, 1, 1.7, 0.5)}),
    Case("Resize", 10, {"mode": "linear"}, {"x": X, "s": floats(1, 1, 0.6, 1.7)}),
    Case(
        "Resize",
        11,
        {"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "floor"},
        fixed={"r": floats(), "s": floats(1, 1, 2.3, 0.6)},
    ),
    Case(
        "Resize",
        11,
        {"mode": "cubic"},
        fixed={"r": floats(), "s": floats(), "n": ints(2, 4, 7, 11)},
    ),
    Case("BatchNormalization", 7, {}, fixed=STATISTICS, edited=False),
    Case("BatchNormalization", 7, {"spatial": 1}, fixed=STATISTICS),
    Case("BatchNormalization", 9, {"epsilon": 1e-3}, fixed=STATISTICS, edited=False),
    Case("Scatter", 9, {"axis": 0}, INDICES),
    Case(
        "RoiAlign",
        10,
        {"output_height": 2, "output_width": 3, "sampling_ratio": 2},
        {"x": X, "r": BOXES, "b": ints(0, 1)},
    ),
    *(
        Case("GridSample", 16, {"mode": mode}, {"x": X, "g": RNG.random((2, 3, 3, 2), np.float32)})
        for mode in ("bilinear", "bicubic")
    ),
    Case("DFT", 17, {"axis": 2}, {"x": X[..., :1]}),
    Case("DFT", 17, {}, {"x": X[..., :1]}),
    Case("GroupNormalization", 18, {"num_groups": 2}, fixed={"s": C[:2], "b": C[2:]}),
    Case("GroupNormalization", 18, {"num_groups": 2}, {"x": X, "s": C[:2], "b": C[2:]}),
    Case("OneHot", 9, {}, {"i": ints(0, 2, 7), "d": ints(3), "v": floats(0, 1)}, edited=False),
    # Before opset 7, by hand.
    Case("Add", 6, {"broadcast": 1, "axis": 1}, {"x": X, "b": C}, expected=(X + C[:, None, None],)),
    Case("Mul", 6, {"broadcast": 1}, {"x": X, "b": X[0, 0, 0]}, expected=(X * X[0, 0, 0],)),
    Case("Add", 1, {"consumed_inputs": [0, 0]}, {"x": X, "b": X}, expected=(X + X,)),
    Case("PRelu", 6, {}, {"x": X, "s": C}, expected=(np.where(X < 0, X * C[:, None, None], X),)),
    Case("Cast", 1, {"to": "INT32"}, expected=(X.astype(np.int32),)),
    Case("Concat", 1, {}, {"x": X, "z": X}, expected=(np.concatenate([X, X], 1),)),
    Case("Pad", 1, {"paddings": [0, 0, 0, 1, 0, 0, 0, 0]}, expected=(np.pad(X, LEFT),)),
    Case("Reshape", 1, {"shape": [2, -1]}, expected=(X.reshape(2, -1),)),
    Case("Split", 1, {"axis": 1}, fixed={"s": floats(1, 3)}, outputs=2, expected=PARTS),
    Case(
        "Upsample",
        1,
        {"height_scale": 2.0, "width_scale": 3.0},
        expected=(X.repeat(2, 2).repeat(3, 3),),
    ),
    Case("Relu", 1, {"consumed_inputs": [0]}, expected=(np.maximum(X, 0),)),
    Case("Selu", 1, {}, {"x": POSITIVE}, expected=(np.float32(1.0507) * POSITIVE,)),
    Case("GlobalLpPool", 1, {"p": 1.0}, {"x": X[..., :1, :1]}, expected=(np.abs(X[..., :1, :1]),)),
    Case(
        "Gemm",
        6,
        {"broadcast": 1},
        {"a": np.eye(4, dtype=np.float32), "b": X[0, :, 0], "c": X[0, 0, 0]},
        expected=(X[0, :, 0] + X[0, 0, 0],),
    ),
]


def case_id(case: Case) -> str:
    return f"{case.op}-{case.opset}-{'-'.join(map(str, case.attributes.values()))}"


def run(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, dict(feeds))


def raised(model: onnx.ModelProto, target: int) -> tuple[onnx.ModelProto, list[str]]:
    edited = ir.from_proto(model)
    lines = raise_opset(edited, target)
    proto = ir.to_proto(edited)
    onnx.checker.check_model(proto, full_check=True)
    assert {o.domain: o.version for o in proto.opset_import}[""] == target
    return proto, lines


def assert_equal(before: list[Any], after: list[Any], tolerance: float = 0.0) -> None:
    assert len(before) == len(after)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=tolerance, strict=True)


@pytest.mark.parametrize("target", [13, 21])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_node_computes_the_same_bits_and_keeps_its_names(case: Case, target: int) -> None:
    before = case.model()
    after, lines = raised(before, 21 if case.opset > 12 else target)
    want = list(case.expected) or run(before, case.inputs)
    # Softmax and its kin over a part of the shape are summed in one go either way.
    assert_equal(want, run(after, case.inputs))
    assert [v.name for v in after.graph.output] == [v.name for v in before.graph.output]
    assert "n" in {node.name for node in after.graph.node}
    if target == 13 and not case.edited:
        assert lines == []
        assert list(after.graph.node) == list(before.graph.node)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_node_reaches_the_newest_opset(case: Case) -> None:
    raised(case.model(), onnx.defs.onnx_opset_version())  # holds against its schema


@pytest.mark.parametrize("target", [13, 21])
def test_batch_normalization_with_training_outputs_still_normalises_by_the_batch(
    target: int,
) -> None:
    case = Case("BatchNormalization", 9, {"momentum": 0.7}, fixed=STATISTICS, outputs=5)
    before = case.model()
    del before.graph.output[3:]
    after, _ = raised(before, target)
    # The variances are summed in another order.
    assert_equal(run(before, {"x": X}), run(after, {"x": X}), tolerance=2e-6)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Case("Scan", 8, {"num_scan_inputs": 1}), "sequence lengths"),
        (Case("Tile", 1, {}, {"x": X, "t": ints(2), "a": ints(0)}), "Tile-1"),
        (Case("Mish", 11), "no such operator"),
        (Case("BatchNormalization", 7, {"spatial": 0}, fixed=STATISTICS), "spatial=0"),
        (Case("BatchNormalization", 9, {}, fixed=STATISTICS, outputs=5), "saved statistics"),
        (Case("Dropout", 9, {}, outputs=2), "mask is used"),
        (Case("Resize", 10, {}, fixed={"s": floats(1, 1, 0.6, 2)}), "another smaller"),
        (Case("Resize", 10, {}, {"x": X, "s": floats(1, 1, 2, 2)}), "computed"),
        (Case("Erf", 9, {}, {"x": ints(1, 2)}), "no integers"),
    ],
    ids=lambda value: value.op if isinstance(value, Case) else "",
)
def test_what_has_no_equal_is_refused_and_the_model_is_unchanged(case: Case, why: str) -> None:
    relu = helper.make_node("Relu", ["x"], ["r"], name="relu", consumed_inputs=[0])
    proto = case.model()
    proto.graph.node.insert(0, relu)
    if case.op == "Scan":
        body = helper.make_graph([], "body", [], [])
        proto.graph.node[1].attribute.append(helper.make_attribute("body", body))
    model = ir.from_proto(proto)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(ExportError, match=rf"'n': .*{why}"):
        raise_opset(model, 14)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_one_error_lists_every_node_that_is_refused() -> None:
    model = Case("Dropout", 9, {}, outputs=2).model()
    model.graph.node.add().CopyFrom(helper.make_node("Nothing", ["x"], ["z"], name="other"))
    with pytest.raises(ExportError, match=r"Dropout 'n': .*; Nothing 'other': "):
        raise_opset(ir.from_proto(model), 13)
