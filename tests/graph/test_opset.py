"""Raising the opset: the same function, the same names, only what has to change."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, parser

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
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 4, 5, 6)).astype(np.float32)
RELU = "y = Relu (x)"


def one(nodes: str, opset: int) -> ir.Model:
    signature = "agraph (float[1, 3] x) => (float[n, m] y)"
    text = f'<ir_version: 7, opset_import: ["" : {opset}]> {signature} {{ {nodes} }}'
    return ir.from_proto(parser.parse_model(text))


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
    # From AveragePool-19 on onnxruntime adds in another order, so one ulp differs; the layers
    # behind carry it on to 7e-6, in values up to some tens.
    pools = target >= 19 and any(n.op_type == "AveragePool" for n in before.graph.node)
    assert_equal(run(before, feeds), run(after, feeds), tolerance=2e-5 if pools else 0.0)
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


@pytest.mark.parametrize("target", [10, 999])
def test_a_target_out_of_range_is_refused(target: int) -> None:
    with pytest.raises(ExportError, match="not between 11 and"):
        raise_opset(one(RELU, 11), target)


def test_nothing_is_lowered() -> None:
    model = one(RELU, 20)
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
    model = ir.to_proto(one("y = Squeeze <axes = [0]> (x)", 11))
    foreign = helper.make_node("Squeeze", ["x"], ["z"], name="f", domain="own", axes=[1])
    model.graph.node.append(foreign)
    model.opset_import.append(helper.make_opsetid("own", 1))
    edited = ir.from_proto(model)
    raise_opset(edited, 13)
    after = ir.to_proto(edited)
    assert after.graph.node[1] == foreign
    assert {o.domain: o.version for o in after.opset_import} == {"": 13, "own": 1}


MEANS = "m = ReduceMean <axes = [1]> (x)  y = ReduceSum <axes = [1]> (m)"


def test_a_new_initialiser_raises_ir_version_3_to_4_and_frees_the_inputs() -> None:
    before = parser.parse_model(
        """
        <ir_version: 3, opset_import: ["" : 9]>
        agraph (float[2, 3] x, float[3] w) => (float[1, 2, 3] y) <float[3] w = {1, 2, 3}> {
            z = Mul (x, w)
            y = Unsqueeze <axes = [0]> (z)
        }
        """
    )
    after, _ = raised(before, 13)
    assert after.ir_version == 4
    assert [v.name for v in after.graph.input] == ["x"]
    feeds = {"x": X[0, 0, :2, :3]}
    assert_equal(run(before, feeds), run(after, feeds))


def test_axes_of_equal_value_are_one_initialiser() -> None:
    after, lines = raised(ir.to_proto(one(MEANS, 11)), 18)
    assert [t.name for t in after.graph.initializer] == ["m_axes"]
    assert lines == [f"{op}: from opset 11 to 18" for op in ("ReduceMean 'm'", "ReduceSum 'y'")]


def test_types_are_those_before_the_first_edit() -> None:
    # Once the Unsqueeze has its new form, inference at the old opset knows nothing behind it.
    text = "u = Unsqueeze <axes = [0]> (x)  v = Clip <max = 0.5> (u)  y = Squeeze <axes = [0]> (v)"
    before = ir.to_proto(one(text, 10))
    after, lines = raised(before, 13)
    assert len(lines) == 3
    feeds = {"x": X[:1, :3, 0, 0]}
    assert_equal(run(before, feeds), run(after, feeds))
