"""Raising the opset: the same function, the same names, only what has to change."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper, parser

from qwrap.errors import ExportError
from qwrap.graph.opset import COMPATIBLE, REFUSED, raise_opset
from qwrap.graph.opset_adapters import ADAPTERS

SHARED = Path(os.environ.get("QWRAP_SHARED", Path(__file__).resolve().parents[2] / "../shared"))
OLD_MODELS = {
    "mnist_cntk": (1, 1, 28, 28),
    "nanodet_m_320": (1, 3, 320, 320),
    "espnetv2_s2_voc_256": (1, 3, 256, 256),
    "super_resolution": (1, 1, 224, 224),
    "ppocr_en_number_rec": (1, 3, 32, 96),
}
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
                output.type.tensor_type.elem_type = 1
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


@pytest.mark.parametrize("target", [13, 21])
@pytest.mark.parametrize("name", OLD_MODELS)
def test_a_real_model_computes_the_same_and_its_other_nodes_are_untouched(
    name: str, target: int
) -> None:
    path = SHARED / "models" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there (QWRAP_SHARED says where to look)")
    before = ir.to_proto(ir.load(path))
    feeds = {before.graph.input[0].name: RNG.random(OLD_MODELS[name], np.float32)}
    after, lines = raised(before, target)
    # From AveragePool-19 on onnxruntime adds in another order: one ulp, here of values near 30,
    # which some hundred layers then carry on.
    pools = target >= 19 and any(n.op_type == "AveragePool" for n in before.graph.node)
    assert_equal(run(before, feeds), run(after, feeds), tolerance=5e-5 if pools else 0.0)
    new = {n.output[0]: n for n in after.graph.node}
    read = {i for n in after.graph.node for i in n.input}
    for node in before.graph.node:
        output = node.output[0]
        if f"{node.op_type} {node.name!r}" in {line.partition(":")[0] for line in lines}:
            assert new[output].name == node.name
        elif output not in new:
            assert (node.op_type, output in read) == ("Constant", False)
        else:
            assert new[output].SerializeToString() == node.SerializeToString()


def test_every_revision_of_every_operator_is_decided() -> None:
    first: dict[str, int] = {}
    steps = set()
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            steps.add((schema.name, schema.since_version))
            first[schema.name] = min(schema.since_version, first.get(schema.name, 999))
    steps -= set(first.items())
    decided = [COMPATIBLE, set(ADAPTERS), set(REFUSED)]
    assert set.union(*map(set, decided)) >= steps
    assert sum(map(len, decided)) == len(set.union(*map(set, decided)))  # each once


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


@pytest.mark.parametrize("target", [12, 999])
def test_a_target_out_of_range_is_refused(target: int) -> None:
    with pytest.raises(ExportError, match="not between 13 and"):
        raise_opset(ir.from_proto(Case("Relu", 11).model()), target)


def test_nothing_is_lowered() -> None:
    model = ir.from_proto(Case("Relu", 20).model())
    assert raise_opset(model, 13) == []
    assert model.opset_imports[""] == 20


BRANCHES = """
<ir_version: 7, opset_import: ["" : 11]>
agraph (bool c, float[2, 3, 4] x) => (float[1, 2, 3, 4] y) {
    y = If (c) <
        then_branch = yes () => (float[1, 2, 3, 4] a) {
            m = ReduceSum <axes = [0], keepdims = 0> (x)
            n = Add (x, m)
            s = Softmax <axis = 1> (n)
            a = Unsqueeze <axes = [0]> (s)
        },
        else_branch = no () => (float[1, 2, 3, 4] b) { b = Unsqueeze <axes = [0]> (x) }
    >
}
"""


@pytest.mark.parametrize("target", [13, 21])
@pytest.mark.parametrize("condition", [True, False])
def test_subgraphs_are_raised_and_hold_their_own_constants(target: int, condition: bool) -> None:
    before = parser.parse_model(BRANCHES)
    after, lines = raised(before, target)
    feeds = {"c": np.array(condition), "x": X[:, :3, :4, 0]}
    assert_equal(run(before, feeds), run(after, feeds))
    assert len(lines) == 4
    assert not after.graph.initializer
    (then, otherwise) = (a.g for a in after.graph.node[0].attribute)
    # ReduceSum and Unsqueeze share one constant: both are over axis 0.
    assert [n.op_type for n in then.node].count("Constant") == 1
    assert [n.op_type for n in otherwise.node] == ["Constant", "Unsqueeze"]


FUNCTION = """
<ir_version: 8, opset_import: ["" : 11, "own" : 1]>
agraph (float[2, 3] x) => (float[1, 2, 3] y) { y = own.f (x) }
<domain: "own", opset_import: ["" : 11]>
f (a) => (b) { b = Unsqueeze <axes = [0]> (a) }
"""


def test_functions_of_the_model_are_raised_too() -> None:
    before = parser.parse_model(FUNCTION)
    after, lines = raised(before, 17)
    feeds = {"x": X[0, 0, :2, :3]}
    assert_equal(run(before, feeds), run(after, feeds))
    assert len(lines) == 1
    assert after.functions[0].opset_import[0].version == 17


def test_a_parameter_of_a_function_that_became_an_input_is_refused() -> None:
    text = FUNCTION.replace("f (a)", "f <p> (a)").replace("axes = [0]", "axes : ints = @p")
    text = text.replace("own.f (x)", "own.f <p = [0]> (x)")
    with pytest.raises(ExportError, match="parameter of a function"):
        raise_opset(ir.from_proto(parser.parse_model(text)), 13)


def test_other_domains_and_their_subgraphs_opsets_stay() -> None:
    model = Case("Squeeze", 11, {"axes": [1]}, {"x": X[:, :1]}).model()
    foreign = helper.make_node("Squeeze", ["x"], ["z"], name="f", domain="own", axes=[1])
    model.graph.node.append(foreign)
    model.opset_import.append(helper.make_opsetid("own", 1))
    edited = ir.from_proto(model)
    raise_opset(edited, 13)
    after = ir.to_proto(edited)
    assert after.graph.node[1] == foreign
    assert {o.domain: o.version for o in after.opset_import} == {"": 13, "own": 1}


def test_a_new_initialiser_raises_ir_version_3_to_4_and_frees_the_inputs() -> None:
    case = Case("Upsample", 9, {}, fixed={"s": floats(1, 1, 2, 2)})
    model = case.model(ir_version=3)
    model.graph.input.append(info("s", floats(1, 1, 2, 2)))
    squeeze = helper.make_node("Unsqueeze", ["y0"], ["u"], name="u", axes=[0])
    model.graph.node.append(squeeze)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("u", 1, (1, 2, 4, 10, 12)))
    after, _ = raised(model, 13)
    assert after.ir_version == 4
    assert [v.name for v in after.graph.input] == ["x"]
    assert_equal(run(model, {"x": X}), run(after, {"x": X}))


def test_axes_of_equal_value_are_one_initialiser() -> None:
    model = Case("ReduceMean", 11, {"axes": [1]}).model()
    model.graph.node.append(helper.make_node("ReduceSum", ["x"], ["z"], name="m", axes=[1]))
    after, lines = raised(model, 18)
    assert [t.name for t in after.graph.initializer] == ["n_axes"]
    assert lines == [
        "ReduceMean 'n': from opset 11 to 18",
        "ReduceSum 'm': from opset 11 to 18",
    ]
