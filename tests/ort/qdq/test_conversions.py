"""'convert' and 'recv_nodes' of overrides: one type as made, another one as some nodes read it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from one_operator import Case, Made, constants_of, make, run, sqnr
from onnx import ModelProto, NodeProto
from side_by_side import Ranges, by_incumbent, by_qwrap, differences, observed

pytestmark = pytest.mark.ort(*range(146, 164))
WIDE = {"quant_type": "QUInt16"}
TYPES = ["Op1", "Sigmoid", "Conv", "Add", "Mul", "Reshape", "Relu", "MaxPool", "Transpose"]
GRAPH = "o1 = Sigmoid(x) o2 = Mul(o1, o1) o3 = Add(o2, x) o4 = Mul(o2, o3) y = Add(o4, o2)"


def model_of(nodes: str = GRAPH, outputs: tuple[str, ...] = ("y",), **weights: Any) -> Made:
    case = Case(nodes, {"x": (2, 3, 4, 4)}, dict.fromkeys(outputs, 4), weights)
    return make(case, 21)


def both(made: Made, **overrides: Any) -> tuple[ModelProto, list[str], Ranges]:
    """What qwrap makes of overrides, its differences to onnxruntime's tool, and the ranges."""
    ranges = observed(made.model, made.batches, TYPES)
    settings: dict[str, Any] = {
        "op_types_to_quantize": TYPES,
        "options": {"TensorQuantOverrides": {k: [v] for k, v in overrides.items()}},
    }
    model = by_qwrap(made.model, ranges, **settings)
    return model, differences(by_incumbent(made.model, ranges, **settings), model), ranges


def maker(model: ModelProto, tensor: str) -> NodeProto:
    return next(node for node in model.graph.node if tensor in node.output)


def node(model: ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def chain(model: ModelProto, tensor: str) -> list[str]:
    """Names of the Q and DQ nodes through which a value came, the last one first."""
    names = []
    while (made := next((n for n in model.graph.node if tensor in n.output), None)) is not None:
        if "antizeLinear" not in made.op_type:
            break
        names.append(made.name)
        tensor = made.input[0]
    return names


def near(made: Made, model: ModelProto) -> None:
    for optimised in (False, True):
        got = run(model, made.batches[0], optimised)
        assert sqnr(run(made.model, made.batches[0]), got) > 30


@pytest.mark.ort("G37")
@pytest.mark.parametrize("receivers", [{"/o4"}, ["/o4"], ("/o4",)])
def test_some_readers_get_the_other_type(receivers: Any) -> None:
    """onnxruntime's tool takes a set only."""
    made = model_of()
    model, differs, _ = both(made, o2={"convert": {**WIDE, "recv_nodes": {"/o4"}}})
    assert differs == []
    ranges = observed(made.model, made.batches, TYPES)
    override = {"TensorQuantOverrides": {"o2": [{"convert": {**WIDE, "recv_nodes": receivers}}]}}
    again = by_qwrap(made.model, ranges, op_types_to_quantize=TYPES, options=override)
    assert differences(model, again) == []
    assert chain(model, node(model, "/o4").input[0]) == [
        "o2_convert_DequantizeLinear",
        "o2_convert_QuantizeLinear",
        "o2_convert_clone_DequantizeLinear",
        "o2_QuantizeLinear",
    ]
    assert node(model, "/o3").input[0] == "o2_DequantizeLinear_Output"
    clone = node(model, "o2_convert_clone_DequantizeLinear").output[0]
    readers = [n.name for n in model.graph.node if clone in n.input]
    assert readers == ["o2_convert_QuantizeLinear"]
    found = constants_of(model)
    assert found["o2_zero_point"].dtype == np.uint8
    assert found["o2_zero_point_convert"].dtype == np.uint16
    assert found["o2_scale_convert"] < found["o2_scale"]
    near(made, model)


def test_all_readers_get_the_other_type() -> None:
    made = model_of()
    model, differs, _ = both(made, o2={"convert": WIDE})
    assert differs == []
    expected = [
        "o2_convert_DequantizeLinear",
        "o2_convert_QuantizeLinear",
        "o2_DequantizeLinear",
        "o2_QuantizeLinear",
    ]
    for reader in ("/o3", "/o4"):
        assert chain(model, node(model, reader).input[0]) == expected
    near(made, model)


@pytest.mark.parametrize(
    ("override", "length"),
    [(WIDE, 4), ({**WIDE, "recv_nodes": {"/o4"}}, 2)],
    ids=["all readers", "some"],
)
def test_a_graph_output_takes_the_other_type_only_if_all_readers_do(
    override: dict[str, Any], length: int
) -> None:
    made = model_of(outputs=("o2", "y"))
    model, differs, _ = both(made, o2={"convert": override})
    assert differs == []
    assert len(chain(model, "o2")) == length
    near(made, model)


def test_a_graph_output_without_readers_is_converted() -> None:
    made = model_of()
    model, differs, _ = both(made, y={"convert": WIDE})
    assert differs == []
    assert len(chain(model, "y")) == 4
    near(made, model)


def test_an_input_is_converted() -> None:
    made = model_of()
    model, differs, _ = both(
        made,
        x={"quant_type": "QUInt16", "convert": {"quant_type": "QUInt8", "recv_nodes": {"/o3"}}},
    )
    assert differs == []
    assert constants_of(model)["x_zero_point_convert"].dtype == np.uint8
    near(made, model)


def test_the_output_of_a_pass_through_is_shared_first_and_then_converted() -> None:
    made = model_of(
        "h = Sigmoid(x) r = Transpose<perm=[0,1,3,2]>(h) y = Add(r, x)",
    )
    model, differs, _ = both(made, r={"convert": WIDE})
    assert differs == []
    assert node(model, "r_QuantizeLinear").input[1] == "h_scale"
    assert node(model, "r_convert_QuantizeLinear").input[1] == "r_scale_convert"
    near(made, model)


def test_a_pass_through_shares_what_it_reads() -> None:
    made = model_of("h = Sigmoid(x) r = Transpose<perm=[0,1,3,2]>(h) y = Add(r, h)")
    model, differs, _ = both(made, h={"convert": {**WIDE, "recv_nodes": {"/r"}}})
    assert differs == []
    assert node(model, "r_QuantizeLinear").input[1] == "h_scale_convert"
    near(made, model)


def test_a_bias_has_the_scale_of_what_its_node_reads() -> None:
    made = model_of(
        "h = Sigmoid(x) c = Conv(h, w, b) d = Conv(h, w, b) y = Add(c, d)",
        w=(3, 3, 1, 1),
        b=(3,),
    )
    model, differs, _ = both(made, h={"convert": {**WIDE, "recv_nodes": {"/c"}}})
    assert differs == []
    found = constants_of(model)
    for bias, scale in (("b", "h_scale_convert"), ("b0", "h_scale")):
        wanted = found[scale] * found["w_scale"]
        np.testing.assert_array_equal(found[f"{bias}_quantized_scale"], [wanted])
    near(made, model)


def test_a_converted_tensor_has_no_pair_for_each_reader() -> None:
    made = model_of()
    ranges = observed(made.model, made.batches, TYPES)
    options = {"DedicatedQDQPair": True, "TensorQuantOverrides": {"o2": [{"convert": WIDE}]}}
    with pytest.raises(ValueError, match="Do not currently support converted quant_types"):
        by_qwrap(made.model, ranges, op_types_to_quantize=TYPES, options=options)


@pytest.mark.parametrize("tensor", ["c", "y"])
def test_an_activation_beside_a_converted_tensor_is_kept(tensor: str) -> None:
    made = model_of("c = Conv(x, w) y = Relu(c)", w=(3, 3, 1, 1))
    model, differs, _ = both(made, **{tensor: {"convert": WIDE}})
    assert differs == []
    assert "Relu" in {n.op_type for n in model.graph.node}
    near(made, model)


def test_readers_that_are_not_quantized_are_converted_if_they_are_named() -> None:
    made = model_of("h = Sigmoid(x) e = Erf(h) y = Add(e, h)")
    model, _, _ = both(made, h={"convert": {**WIDE, "recv_nodes": {"/e"}}})
    assert node(model, "/e").input[0] == "h_convert_DequantizeLinear_Output"
    assert node(model, "/y").input[1] == "h_DequantizeLinear_Output"
    near(made, model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"o2": {"convert": {"symmetric": True}}}, "must specify a 'quant_type'"),
        ({"o2": {"convert": {"quant_type": "QUInt8"}}}, "must differ from original quant_type"),
        ({"w": {"convert": WIDE}}, "Cannot use 'convert' override for initializers"),
        (
            {"o2": {"convert": {**WIDE, "scale": np.array(1.0, np.float32)}}},
            "Must provide both 'scale' and 'zero_point'",
        ),
    ],
)
def test_contradictions_are_refused_when_the_quantizer_is_made(
    overrides: dict[str, Any], message: str
) -> None:
    made = model_of(GRAPH.replace("o1)", "w)", 1), w=(3, 4, 4))
    with pytest.raises(ValueError, match=message):
        both(made, **overrides)
