"""The enumerations, with onnxruntime's names and values."""

from enum import Enum

import onnxruntime.quantization as incumbent
import onnxruntime.quantization.quant_utils as incumbent_utils
import pytest

from qwrap.ort import enums, quant_utils
from qwrap.ort.calibrate import CalibrationMethod

PAIRS = [
    pytest.param(enums.QuantType, incumbent.QuantType, marks=pytest.mark.ort(39)),
    pytest.param(enums.QuantFormat, incumbent.QuantFormat, marks=pytest.mark.ort(40)),
    pytest.param(
        enums.QuantizationMode, incumbent_utils.QuantizationMode, marks=pytest.mark.ort(41)
    ),
    pytest.param(
        enums.QuantizedValueType, incumbent_utils.QuantizedValueType, marks=pytest.mark.ort(42)
    ),
]


@pytest.mark.parametrize(("ours", "other"), PAIRS)
def test_members_have_the_incumbents_names_and_values(ours, other) -> None:
    assert {m.name: m.value for m in ours} == {m.name: m.value for m in other}
    assert [str(m) for m in ours] == [str(m) for m in other]
    assert getattr(quant_utils, ours.__name__) is ours


@pytest.mark.parametrize(("ours", "other"), PAIRS)
def test_members_are_found_by_name(ours: type[Enum], other: type[Enum]) -> None:
    for member in ours:
        assert ours.from_string(str(member)) is member
    for enumeration in (ours, other):
        with pytest.raises(ValueError):  # noqa: PT011 - the incumbent's has no message
            enumeration.from_string("QInt9")
    with pytest.raises(ValueError, match="has no 'QInt9', only"):
        ours.from_string("QInt9")


@pytest.mark.ort(39)
def test_types_name_their_tensor_type() -> None:
    for member in enums.QuantType:
        assert member.tensor_type == incumbent.QuantType[member.name].tensor_type


@pytest.mark.ort(43)
def test_calibration_methods_have_the_incumbents_values() -> None:
    theirs = {m.name: m.value for m in incumbent.CalibrationMethod}
    assert {m.name: m.value for m in CalibrationMethod} == theirs
    assert enums.CalibrationMethod is CalibrationMethod
