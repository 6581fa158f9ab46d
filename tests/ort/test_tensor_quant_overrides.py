"""What overrides answer, side by side with onnxruntime's helper."""

import copy
import json
from typing import Any

import numpy as np
import onnxruntime.quantization.tensor_quant_overrides as incumbent
import pytest
from base_quantizer_pairs import theirs
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType as IncumbentType

from qwrap.ort.base_quantizer import BaseQuantizer
from qwrap.ort.enums import QuantType
from qwrap.ort.tensor_quant_overrides import (
    QuantTypeInfo,
    TensorQuantOverridesHelper,
    normalized_overrides,
)

WEIGHTS = {"w": numpy_helper.from_array(np.ones((4, 3), np.float32), "w")}
ACTIVATIONS = {"x", "y"}
Q8, U8, Q16, U16 = QuantType.QInt8, QuantType.QUInt8, QuantType.QInt16, QuantType.QUInt16
SCALE = {"scale": 0.5, "zero_point": 3}
FOUR = [{"axis": 0, **SCALE}] + [dict(SCALE)] * 3


# --- what the mapping answers ---------------------------------------------------------------------

SOME = {
    "x": [{"quant_type": Q8, "symmetric": True}],
    "y": [{"quant_type": Q8, "convert": {"quant_type": U16, "recv_nodes": {"n"}}}],
    "v": [{"quant_type": Q8, "convert": {"quant_type": U16, "symmetric": False}}],
    "w": [{"axis": 0, "quant_type": Q8, "reduce_range": True, **SCALE}],
    "e": [],
}


def both() -> tuple[TensorQuantOverridesHelper, incumbent.TensorQuantOverridesHelper]:
    return (
        TensorQuantOverridesHelper(copy.deepcopy(SOME)),
        incumbent.TensorQuantOverridesHelper(theirs(SOME)),
    )


def fields(info: Any) -> tuple[Any, ...]:
    kind = info.quant_type and info.quant_type.name
    return kind, info.symmetric, info.reduce_range, info.axis


@pytest.mark.ort(165)
def test_the_mapping_answers_as_the_incumbents() -> None:
    ours, other = both()
    for name in (*SOME, "nobody"):
        for question in (
            "has_per_tensor_overrides",
            "has_per_channel_overrides",
            "overrides_scale_zp",
        ):
            assert getattr(ours, question)(name) == bool(getattr(other, question)(name)), question
    for name in ("x", "y", "nobody"):
        found = ours.get_per_tensor_overrides(name, {"k": 1})
        assert theirs(found) == other.get_per_tensor_overrides(name, {"k": 1})
    assert theirs(ours.get_per_channel_overrides("w")) == other.get_per_channel_overrides("w")
    assert ours.get_per_channel_overrides("nobody") is None
    assert ours.get_per_channel_overrides("nobody", [{"axis": 1}]) == [{"axis": 1}]
    assert theirs(list(ours.get_quant_types())) is not None
    assert {kind.name for kind in ours.get_quant_types()} == {
        kind.name for kind in other.get_quant_types()
    }
    assert json.loads(ours.pprint_str()) == json.loads(other.pprint_str())
    assert ours.pprint_str(indent=2).count("\n") == other.pprint_str(indent=2).count("\n")
    assert not ours.empty()
    assert TensorQuantOverridesHelper({}).empty()


@pytest.mark.ort(128)
def test_an_empty_list_says_nothing() -> None:
    """The incumbent answers None where there is an empty list, whatever the default."""
    ours, other = both()
    assert ours.get_per_tensor_overrides("e", {"k": 1}) == {"k": 1}
    assert other.get_per_tensor_overrides("e", {"k": 1}) is None


@pytest.mark.ort(164, 165, 146, 151)
def test_nodes_are_told_the_types_that_they_make_and_read() -> None:
    ours, other = both()
    for name in ("x", "y", "v", "nobody"):
        info = ours.get_node_output_qtype_info(name, U8, False)
        assert fields(info) == fields(
            other.get_node_output_qtype_info(name, IncumbentType.QUInt8, False)
        )
        for node in "nm":
            info = ours.get_node_input_qtype_info(name, node, U8)
            asked = other.get_node_input_qtype_info(name, node, IncumbentType.QUInt8)
            assert fields(info) == fields(asked), (name, node)
    assert ours.get_node_input_qtype_info("y", "n", U8).quant_type == U16
    assert ours.get_node_input_qtype_info("y", "m", U8).quant_type == Q8


@pytest.mark.ort(165)
def test_a_node_that_is_not_converted_for_reads_the_symmetry_of_the_tensor() -> None:
    """The incumbent answers with that of the converted one."""
    entry = {
        "quant_type": Q8,
        "symmetric": True,
        "convert": {"quant_type": U16, "symmetric": False, "recv_nodes": ["n"]},
    }
    ours = TensorQuantOverridesHelper({"x": [entry]})
    other = incumbent.TensorQuantOverridesHelper(theirs({"x": [entry]}))
    assert fields(ours.get_node_input_qtype_info("x", "m", U8)) == ("QInt8", True, None, None)
    asked = other.get_node_input_qtype_info("x", "m", IncumbentType.QUInt8)
    assert fields(asked) == ("QInt8", False, None, None)


@pytest.mark.ort(144, 165)
def test_channels_are_not_taken_for_a_tensor_nor_the_other_way() -> None:
    for helper_ in both():
        with pytest.raises(ValueError, match="Expected tensor 'w' to use per-tensor quantization"):
            helper_.get_per_tensor_overrides("w")
        with pytest.raises(ValueError, match="Expected tensor 'x' to have per-channel quantizati"):
            helper_.get_per_channel_overrides("x")


@pytest.mark.ort(165)
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("chosen", [None, [0], [1], []])
@pytest.mark.parametrize("values", [{}, {"rmin": 1.0}, {"symmetric": False}])
@pytest.mark.parametrize("name", ["x", "w", "e", "new"])
def test_entries_are_updated_as_by_the_incumbent(name, values, chosen, overwrite) -> None:
    ours, other = both()
    ours["w"] = [{"axis": 0, "symmetric": True}, {"symmetric": True}]
    other["w"] = [{"axis": 0, "symmetric": True}, {"symmetric": True}]
    done = [h.update_tensor_overrides(name, values, chosen, overwrite) for h in (ours, other)]
    assert done[0] == done[1]
    assert theirs(ours.get_dict()) == other.get_dict()


@pytest.mark.ort(165)
def test_it_is_a_mapping() -> None:
    ours, _ = both()
    assert len(ours) == len(SOME)
    assert list(ours) == list(SOME)
    del ours["e"]
    ours["new"] = [{"symmetric": True}]
    assert "e" not in ours
    assert ours["new"] == ours.get_dict()["new"]
    assert "new" in str(ours)
    assert "new" in repr(ours)


@pytest.mark.ort(164)
def test_type_infos_are_equal_where_nothing_both_say_differs() -> None:
    for info, kind in ((QuantTypeInfo, Q8), (incumbent.QuantTypeInfo, IncumbentType.QInt8)):
        assert info(kind) == info(kind, True, True)
        assert info(kind, symmetric=True) != info(kind, symmetric=False)
        assert info(kind, reduce_range=True) != info(kind, reduce_range=False)
        assert info(kind, axis=1) != info(kind)
        assert info(kind) != 3
        loaded = info.load_from_dict({"quant_type": kind, "axis": 1}, None, True, False)
        assert (loaded.symmetric, loaded.reduce_range, loaded.axis) == (True, False, 1)
        saved: dict[str, Any] = {}
        loaded.save_to_dict(saved)
        assert saved == {"quant_type": kind, "symmetric": True, "reduce_range": False, "axis": 1}
    assert QuantTypeInfo(Q8) != QuantTypeInfo(U8)


# --- in a quantizer ------------------------------------------------------------------------------


@pytest.mark.ort("G37", 151)
@pytest.mark.parametrize("receivers", [["n"], ("n",), {"n"}, frozenset("n")])
def test_receivers_may_be_a_list(receivers: Any) -> None:
    """The incumbent subtracts them from a set: TypeError."""
    raw = {"x": [{"convert": {"quant_type": Q16, "recv_nodes": receivers}}]}
    own = normalized_overrides(raw)
    assert own["x"][0]["convert"]["recv_nodes"] == {"n"}
    assert raw["x"][0]["convert"]["recv_nodes"] is receivers


@pytest.mark.ort(129)
@pytest.mark.parametrize("kind", [Q16, IncumbentType.QInt16, "QInt16"])
def test_types_may_come_from_either_enumeration_or_by_name(kind: Any) -> None:
    own = normalized_overrides({"x": [{"quant_type": kind, "convert": {"quant_type": kind}}]})
    assert own["x"][0]["quant_type"] is Q16
    assert own["x"][0]["convert"]["quant_type"] is Q16


@pytest.mark.ort(140, 141)
def test_a_quantizer_refuses_a_second_entry_too() -> None:
    node = helper.make_node("Relu", ["x"], ["y"], "n")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    options = {"TensorQuantOverrides": {"x": [{"symmetric": True}], "z": [{"symmetric": True}]}}
    kept = copy.deepcopy(options)
    with pytest.raises(ValueError, match="Tensor 'z' in TensorQuantOverrides is not present"):
        BaseQuantizer(model, False, False, Q8, U8, None, [], [], ["Relu"], options)
    del options["TensorQuantOverrides"]["z"]
    quantizer = BaseQuantizer(model, False, False, Q8, U8, None, [], [], ["Relu"], options)
    quantizer.tensor_quant_overrides.update_tensor_overrides("x", {"symmetric": False})
    assert options["TensorQuantOverrides"]["x"] == kept["TensorQuantOverrides"]["x"]
