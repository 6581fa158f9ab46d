"""Excluded nodes read and write floats, whatever their neighbours do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from one_operator import Case, Made, constants_of, make, run, sqnr
from onnx import ModelProto, NodeProto
from side_by_side import by_incumbent, by_qwrap, observed, quantizer_of

pytestmark = pytest.mark.ort("G25", 7, 8)
IMAGE = {"x": (2, 4, 6, 6)}
WEIGHTS = {"w": (4, 4, 1, 1), "v": (4, 4, 1, 1), "b": (4,)}


def quantized(nodes: str, *excluded: str, **settings: Any) -> tuple[Made, ModelProto, Any]:
    outputs = settings.pop("outputs", {"y": 4})
    made = make(Case(nodes, IMAGE, outputs, {k: v for k, v in WEIGHTS.items() if f" {k}" in nodes}))
    ranges = observed(made.model, made.batches)
    return made, by_qwrap(made.model, ranges, nodes_to_exclude=list(excluded), **settings), ranges


def node(model: ModelProto, name: str) -> NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def near(made: Made, model: ModelProto) -> None:
    for optimised in (False, True):
        got = run(model, made.batches[0], optimised)
        assert sqnr(run(made.model, made.batches[0]), got) > 28


def test_its_inputs_are_floats_and_its_output_has_a_pair_for_quantized_readers() -> None:
    nodes = "a = Conv(x, w) e = Conv(a, v) c = Conv(e, w) d = Add(a, e) y = Add(c, d)"
    made, model, ranges = quantized(nodes, "/e")
    assert list(node(model, "/e").input) == ["a", "v"]
    assert list(node(model, "/e").output) == ["e"]
    assert node(model, "/c").input[0] == "e_DequantizeLinear_Output"
    assert node(model, "/d").input[0] == "a_DequantizeLinear_Output"
    near(made, model)
    wrong = by_incumbent(made.model, ranges, nodes_to_exclude=["/e"])
    assert node(wrong, "/e").input[0] == "a_DequantizeLinear_Output"


def test_what_only_it_reads_has_no_pair() -> None:
    made, model, _ = quantized("a = Conv(x, w) y = Conv(a, v)", "/y")
    assert not any(n.name.startswith("a_") for n in model.graph.node)
    assert list(node(model, "/y").input) == ["a", "v"]
    assert node(model, "/y").output[0] == "y"
    near(made, model)


def test_its_output_goes_out_as_float_although_others_quantize_it() -> None:
    nodes = "e = Conv(x, w) y = Conv(e, v)"
    made, model, _ = quantized(nodes, "/e", outputs={"e": 4, "y": 4})
    np.testing.assert_array_equal(
        run(model, made.batches[0])[0], run(made.model, made.batches[0])[0]
    )
    assert node(model, "/y").input[0] == "e_DequantizeLinear_Output"
    near(made, model)


def test_it_reads_the_float_behind_a_quantized_graph_output() -> None:
    nodes = "a = Conv(x, w) y = Conv(a, v)"
    made, model, _ = quantized(nodes, "/y", outputs={"a": 4, "y": 4})
    assert node(model, "/y").input[0] == node(model, "/a").output[0] == "a_QuantizeLinear_Input"
    near(made, model)


def test_it_has_its_own_float_weight_and_bias() -> None:
    made, model, _ = quantized("a = Conv(x, w, b) e = Conv(a, w, b) y = Add(a, e)", "/e")
    found = constants_of(model)
    assert list(node(model, "/e").input) == ["a", "w", "b"]
    assert found["w"].dtype == found["b"].dtype == np.float32
    assert found["w_quantized"].dtype == np.int8
    assert found["b0_quantized"].dtype == np.int32
    assert node(model, "/a").input[2] == "b0"
    near(made, model)


def test_readers_of_types_that_are_not_listed_read_floats_behind_it() -> None:
    nodes = "e = Conv(x, w) c = Conv(e, v) s = Sin(e) y = Add(s, c)"
    made, model, _ = quantized(nodes, "/e")
    assert node(model, "/s").input[0] == "e"
    near(made, model)


def test_converted_tensors_reach_it_as_floats() -> None:
    options = {"TensorQuantOverrides": {"a": [{"convert": {"quant_type": "QUInt16"}}]}}
    nodes = "a = Conv(x, w) e = Conv(a, v) c = Conv(a, v) y = Add(c, e)"
    made, model, _ = quantized(nodes, "/e", options=options)
    assert node(model, "/e").input[0] == "a"
    assert node(model, "/c").input[0] == "a_convert_DequantizeLinear_Output"
    near(made, model)


def test_the_report_says_why_nodes_stay_float() -> None:
    case = Case("a = Conv(x, w) e = Conv(a, v) y = Sin(e)", IMAGE, {"y": 4}, WEIGHTS)
    made = make(case)
    quantizer = quantizer_of(
        made.model, observed(made.model, made.batches), nodes_to_exclude=["/e"]
    )
    quantizer.quantize_model()
    found = {entry.name: (entry.quantized, entry.reason) for entry in quantizer.report.nodes}
    assert found["/a"] == (True, "")
    assert found["/e"] == (False, "in nodes_to_exclude")
    assert found["/y"] == (False, "operator type not in op_types_to_quantize")
