"""The fixer of overrides against onnxruntime's, and where that one stops too early."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType as IncumbentType
from onnxruntime.quantization.execution_providers.qnn import (
    mixed_precision_overrides_utils as incumbent,
)
from onnxruntime.quantization.tensor_quant_overrides import (
    TensorQuantOverridesHelper as IncumbentHelper,
)

from qwrap.ort.enums import QuantType
from qwrap.ort.execution_providers.qnn.mixed_precision_overrides_utils import (
    MixedPrecisionTensorQuantOverridesFixer,
    TensorTypeRequest,
)
from qwrap.ort.tensor_quant_overrides import QuantTypeInfo, TensorQuantOverridesHelper

U8, U16, S16 = QuantType.QUInt8, QuantType.QUInt16, QuantType.QInt16
Overrides = dict[str, list[dict[str, object]]]


def build(edges: list[tuple[str, str, list[str], list[str]]], inputs: list[str]) -> onnx.ModelProto:
    """Nodes as (name, operator, inputs, outputs); what nobody reads is a graph output."""
    nodes = [helper.make_node(op, i, o, name) for name, op, i, o in edges]
    read = {name for node in nodes for name in node.input}
    ends = [name for node in nodes for name in node.output if name not in read]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ends],
        [numpy_helper.from_array(np.array([2, 2]), "shape")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def documented() -> onnx.ModelProto:
    """The model of the docstring, and of the proposal that the fixer goes back to."""
    return build(
        [
            ("Op1", "Sigmoid", ["input_0"], ["Op1_out"]),
            ("Op2", "Sigmoid", ["input_1"], ["Op2_out"]),
            ("Op3", "Sigmoid", ["Op1_out"], ["Op3_out"]),
            ("Op4", "Sigmoid", ["Op2_out"], ["Op4_out"]),
            ("Op5", "Add", ["Op3_out", "Op4_out"], ["Op5_out"]),
            ("Op6", "Sigmoid", ["Op5_out"], ["output_0"]),
            ("Op7", "Sigmoid", ["Op2_out"], ["output_1"]),
            ("Op8", "Sigmoid", ["Op2_out"], ["output_2"]),
        ],
        ["input_0", "input_1"],
    )


def fixed(overrides: Overrides, model: onnx.ModelProto, symmetric: bool = False) -> Overrides:
    helper_ = TensorQuantOverridesHelper(copy.deepcopy(overrides))
    fixer = MixedPrecisionTensorQuantOverridesFixer.create_from_model(helper_, model, U8)
    fixer.apply(default_activation_qtype=U8, default_activation_symmetric=symmetric)
    return helper_.get_dict()


def translated(value: object, kind: type) -> object:
    if isinstance(value, (QuantType, IncumbentType)):
        return kind[value.name]
    if isinstance(value, dict):
        return {k: translated(v, kind) for k, v in value.items()}
    return [translated(v, kind) for v in value] if isinstance(value, list) else value


def incumbently_fixed(overrides: Overrides, model: onnx.ModelProto) -> Overrides:
    helper_ = IncumbentHelper(translated(overrides, IncumbentType))
    fixer = incumbent.MixedPrecisionTensorQuantOverridesFixer.create_from_model(
        helper_, model, IncumbentType.QUInt8
    )
    fixer.apply(IncumbentType.QUInt8, False)
    return translated(helper_.get_dict(), QuantType)


@pytest.mark.ort(166, 347, 333)
def test_one_override_becomes_the_documented_four() -> None:
    model = documented()
    before = model.SerializeToString()
    assert fixed({"Op4_out": [{"quant_type": U16}]}, model) == {
        "Op2_out": [{"quant_type": U8, "convert": {"quant_type": U16, "recv_nodes": {"Op4"}}}],
        "Op3_out": [{"quant_type": U8, "convert": {"quant_type": U16, "recv_nodes": {"Op5"}}}],
        "Op4_out": [{"quant_type": U16}],
        "Op5_out": [{"quant_type": U16, "convert": {"quant_type": U8, "recv_nodes": {"Op6"}}}],
    }
    assert model.SerializeToString() == before


TENSORS = ["input_0", "Op1_out", "Op2_out", "Op3_out", "Op4_out", "Op5_out", "output_0"]


@pytest.mark.ort(166)
@pytest.mark.parametrize("names", [*itertools.combinations(TENSORS, 1),
                                   *itertools.combinations(TENSORS, 2)], ids="+".join)  # fmt: skip
@pytest.mark.parametrize("second", [U16, S16])
def test_results_and_refusals_are_onnxruntimes(names: tuple[str, ...], second: QuantType) -> None:
    overrides: Overrides = {names[0]: [{"quant_type": U16}]}
    if len(names) == 2:
        overrides[names[1]] = [{"quant_type": second}]

    def outcome(fix: Callable[..., Overrides]) -> tuple[Overrides, str]:
        try:
            return fix(overrides, documented()), ""
        except ValueError as error:
            return {}, str(error)

    (got, refusal), (want, their_refusal) = outcome(fixed), outcome(incumbently_fixed)
    assert got == want
    assert refusal.startswith(their_refusal.rstrip("."))
    assert bool(refusal) == bool(their_refusal)


@pytest.mark.ort(166)
def test_user_conversions_and_symmetry_are_kept() -> None:
    overrides: Overrides = {
        "Op4_out": [{"quant_type": U16, "symmetric": True}],
        "Op2_out": [{"quant_type": U8, "convert": {"quant_type": U16, "symmetric": True}}],
    }
    overrides["Op2_out"][0]["convert"]["recv_nodes"] = {"Op7"}  # type: ignore[index]
    got = fixed(overrides, documented())
    assert got == incumbently_fixed(overrides, documented())
    assert got["Op2_out"][0]["convert"]["recv_nodes"] == {"Op4", "Op7"}


@pytest.mark.ort(166)
def test_constants_and_channels_are_no_activations() -> None:
    model = documented()
    model.graph.initializer.append(numpy_helper.from_array(np.ones((2, 2), np.float32), "w"))
    model.graph.node[4].input[1] = "w"
    overrides: Overrides = {
        "w": [{"quant_type": S16, "axis": 0}],
        "Op3_out": [{"quant_type": U16}],
    }
    assert fixed(overrides, model) == incumbently_fixed(overrides, model)


@pytest.mark.ort(167)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"Op4_out": [{"quant_type": U16}], "Op2_out": [{"quant_type": S16}]}, "multiple types"),
        (
            {"Op4_out": [{"quant_type": U16}], "output_1": [{"quant_type": S16}]},
            "Tensor Op2_out has consumers requesting different types",
        ),
        (
            {"Op5_out": [{"quant_type": U8, "convert": {"quant_type": S16}}],
             "Op4_out": [{"quant_type": U16}]},
            "Desired producer quant_type for Op5_out doesn't match existing type",
        ),
        (
            {"Op3_out": [{"quant_type": U8, "convert": {"quant_type": S16}}],
             "Op4_out": [{"quant_type": U16}]},
            "Desired consumer quant_type for Op3_out doesn't match existing type",
        ),
        ({"nowhere": [{"quant_type": U16}]}, "nowhere"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(overrides: Overrides, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fixed(overrides, documented())


@pytest.mark.ort(167)
def test_a_conversion_for_those_that_need_the_original_is_refused() -> None:
    overrides: Overrides = {
        "Op5_out": [{"quant_type": U16}],
        "Op3_out": [{"quant_type": U16, "convert": {"quant_type": U8, "recv_nodes": {"Op5"}}}],
    }
    with pytest.raises(ValueError, match="converts the type for consumers that need the original"):
        fixed(overrides, documented())
    nobody = build([("A", "Relu", ["x"], ["a"]), ("B", "Relu", ["a"], ["b"])], ["x"])
    with pytest.raises(ValueError, match=r"converts the type|multiple"):
        fixed({"x": [{"quant_type": U16}], "a": [{"quant_type": U16, "convert": {
            "quant_type": U8}}], "b": [{"quant_type": U16}]}, nobody)  # fmt: skip


@pytest.mark.ort(167)
def test_a_reader_without_a_name_is_refused() -> None:
    model = documented()
    model.graph.node[3].name = ""
    with pytest.raises(ValueError, match="with output 0 Op4_out does not have a name"):
        fixed({"Op4_out": [{"quant_type": U16}]}, model)


def moved() -> onnx.ModelProto:
    """A value of ``a`` is moved twice before it is overridden."""
    return build(
        [
            ("A", "Sigmoid", ["x"], ["a"]),
            ("B", "Reshape", ["a", "shape"], ["b"]),
            ("C", "Transpose", ["b"], ["c"]),
            ("D", "Sigmoid", ["c"], ["d"]),
            ("E", "Sigmoid", ["a"], ["e"]),
        ],
        ["x"],
    )


@pytest.mark.ort(166, "G72")
def test_a_type_goes_up_to_the_node_that_computed_the_values() -> None:
    """onnxruntime's stops after one hop: 16 bits that hold values rounded to 8."""
    overrides: Overrides = {"c": [{"quant_type": U16}]}
    theirs = incumbently_fixed(overrides, moved())
    assert theirs["b"][0]["quant_type"] == U8
    assert "a" not in theirs
    to_8 = {"quant_type": U8}
    assert fixed(overrides, moved()) == {
        "x": [{"quant_type": U8, "convert": {"quant_type": U16, "recv_nodes": {"A"}}}],
        "a": [{"quant_type": U16, "convert": {**to_8, "recv_nodes": {"E"}}}],
        "b": [{"quant_type": U16}],
        "c": [{"quant_type": U16}],
        "d": [{"quant_type": U16}],
    }


@pytest.mark.ort(166, "G72")
@pytest.mark.parametrize("other", ["a", "x", "e"])
def test_the_way_up_ends_at_another_override(other: str) -> None:
    overrides: Overrides = {"c": [{"quant_type": U16}], other: [{"quant_type": S16}]}
    got = fixed(overrides, moved())
    assert got["c"][0]["quant_type"] == U16
    assert got[other][0]["quant_type"] == S16


@pytest.mark.ort(166)
def test_types_that_inference_cannot_find_are_left_out() -> None:
    model = documented()
    model.graph.node[4].op_type, model.graph.node[4].domain = "Strange", "own"
    model.opset_import.append(helper.make_opsetid("own", 1))
    overrides: Overrides = {"Op4_out": [{"quant_type": U16}]}
    assert fixed(overrides, model) == incumbently_fixed(overrides, model)


@pytest.mark.ort(166)
def test_requests_can_be_asked_for_alone() -> None:
    overrides = TensorQuantOverridesHelper({"Op4_out": [{"quant_type": U16}]})
    fixer = MixedPrecisionTensorQuantOverridesFixer.create_from_model(overrides, documented(), U8)
    wide = QuantTypeInfo(U16)
    assert fixer.get_desired_tensor_types(U8, False) == {
        "Op4_out": TensorTypeRequest(wide, (wide, {"Op5"})),
        "Op2_out": TensorTypeRequest(None, (wide, {"Op4"})),
        "Op5_out": TensorTypeRequest(wide, None),
        "Op3_out": TensorTypeRequest(None, (wide, {"Op5"})),
    }
