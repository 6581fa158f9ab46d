"""Overrides that are accepted and refused, side by side with onnxruntime's helper."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime.quantization.tensor_quant_overrides as incumbent
import pytest
from base_quantizer_pairs import theirs
from onnx import numpy_helper
from onnxruntime.quantization import QuantType as IncumbentType

from qwrap.ort.enums import QuantType
from qwrap.ort.tensor_quant_overrides import (
    TensorQuantOverridesHelper,
)

WEIGHTS = {"w": numpy_helper.from_array(np.ones((4, 3), np.float32), "w")}
ACTIVATIONS = {"x", "y"}
Q8, U8, Q16, U16 = QuantType.QInt8, QuantType.QUInt8, QuantType.QInt16, QuantType.QUInt16
SCALE = {"scale": 0.5, "zero_point": 3}
FOUR = [{"axis": 0, **SCALE}] + [dict(SCALE)] * 3


def verdicts(overrides: dict, default: QuantType = U8) -> tuple[tuple, tuple]:
    ours = TensorQuantOverridesHelper(overrides)
    other = incumbent.TensorQuantOverridesHelper(theirs(overrides))
    return (
        ours.is_valid(WEIGHTS, ACTIVATIONS, default),
        other.is_valid(WEIGHTS, ACTIVATIONS, IncumbentType[default.name]),
    )


# --- what is accepted ----------------------------------------------------------------------------


@pytest.mark.ort(128)
@pytest.mark.parametrize(
    "entries",
    [
        [],
        [{}],
        [{"symmetric": True}],
        [{"axis": 0}],
        [{"axis": -1, "symmetric": True}],
        [{"axis": 0, "rmin": -1.0, "rmax": 1.0}, *({"rmin": -2.0, "rmax": 2.0},) * 3],
        FOUR,
        [{"quant_type": Q8, "axis": 1, "reduce_range": True}],
    ],
)
def test_each_form_is_accepted(entries: list) -> None:
    for verdict in verdicts({"w": entries}):
        assert verdict == (True, None)


@pytest.mark.ort(128, 129, 132, 146, 151)
@pytest.mark.parametrize(
    "entry",
    [
        {"quant_type": U16},
        {"symmetric": True},
        {"rmin": -1.0},
        SCALE,
        {"quant_type": Q8, "convert": {"quant_type": Q16}},
        {"convert": {"quant_type": Q16, "recv_nodes": {"a", "b"}}},
        {"convert": {"quant_type": Q16, **SCALE}},
    ],
)
def test_each_setting_of_an_activation_is_accepted(entry: dict) -> None:
    for verdict in verdicts({"x": [entry]}):
        assert verdict == (True, None)


# --- what is refused, in the incumbent's words ----------------------------------------------------

REFUSED = [
    pytest.param("w", [{"scale": 1.0}], "Must provide both 'scale' and 'zero_point'", id="130"),
    pytest.param("x", [{"zero_point": 1}], "Must provide both 'scale' and 'zero_point'", id="130b"),
    *(
        pytest.param(
            "w", [{**SCALE, key: value}], rf"Tensor override option\(s\) \[{key}\] are inv", id=key
        )
        for key, value in (
            ("symmetric", True),
            ("reduce_range", True),
            ("rmin", -1.0),
            ("rmax", 1.0),
        )
    ),
    pytest.param(
        "x",
        [{"reduce_range": True}],
        "Option 'reduce_range' is only supported for initializers, not for activation x",
        id="133",
    ),
    pytest.param(
        "x",
        [{"convert": {"quant_type": Q16, "reduce_range": True}}],
        "Option 'reduce_range' is only supported for initializers, not for activation x",
        id="133b",
    ),
    pytest.param(
        "w",
        [{"axis": 0, "rmin": 1.0}],
        "Must provide both 'rmin' and 'rmax' if one is provided",
        id="134",
    ),
    pytest.param(
        "x",
        [{"axis": 0}],
        "Tensor 'x' has per-channel overrides, but is not an initializer",
        id="135",
    ),
    pytest.param(
        "w",
        [{"symmetric": True}] * 4,
        "Per-channel overrides for tensor w is missing an 'axis' value in the first channel dic",
        id="136",
    ),
    pytest.param(
        "w",
        [{"axis": 7}],
        r"Axis override value is out-of-bounds for tensor w \(rank 2\)",
        id="137",
    ),
    pytest.param(
        "w",
        [{"axis": 0}] * 3,
        r"Incorrect number of channel overrides for tensor w \(axis 0\), expected 4, but found 3.",
        id="138",
    ),
    pytest.param(
        "x",
        [{"convert": {}}],
        r"'convert' options \(tensor 'x'\) must specify a 'quant_type'",
        id="147",
    ),
    pytest.param(
        "x",
        [{"quant_type": Q8, "convert": {"quant_type": Q8}}],
        r"'convert' quant_type must differ from original quant_type \(tensor 'x'\)",
        id="148",
    ),
    pytest.param(
        "x",
        [{"convert": {"quant_type": U8}}],
        r"'convert' quant_type must differ from original quant_type \(tensor 'x'\)",
        id="148b",
    ),
    pytest.param(
        "w",
        [{"convert": {"quant_type": Q16}}],
        "Cannot use 'convert' override for initializers",
        id="149",
    ),
    pytest.param(
        "w",
        [{"axis": 0, "convert": {"quant_type": Q16}}],
        "Cannot use 'convert' override for initializers",
        id="149b",
    ),
    pytest.param(
        "x",
        [{"convert": {"quant_type": Q16, "scale": 1.0}}],
        "Must provide both 'scale' and 'zero_point'",
        id="150",
    ),
    pytest.param(
        "x",
        [{"convert": {"quant_type": Q16, **SCALE, "rmin": 1.0}}],
        r"Tensor override option\(s\) \[rmin\] are invalid with 'scale' and 'zero_point'",
        id="150b",
    ),
    pytest.param(
        "z",
        [{"symmetric": True}],
        "Tensor 'z' in TensorQuantOverrides is not present in the model",
        id="140",
    ),
    pytest.param("x", {"symmetric": True}, "'x' are not in a list", id="140b"),
    pytest.param("x", ["symmetric"], "for 'x' are not in a dict", id="140c"),
]


@pytest.mark.ort(130, 131, 133, 134, 135, 136, 137, 138, 140, 147, 148, 149, 150)
@pytest.mark.parametrize(("name", "entries", "words"), REFUSED)
def test_what_makes_no_sense_is_refused_in_the_incumbents_words(name, entries, words) -> None:
    with pytest.raises(ValueError, match=words):
        refuse(TensorQuantOverridesHelper, {name: entries}, U8)
    with pytest.raises(ValueError, match=words):
        refuse(incumbent.TensorQuantOverridesHelper, theirs({name: entries}), IncumbentType.QUInt8)


def refuse(helper_class: Callable[[Any], Any], overrides: Any, default: Any) -> None:
    valid, words = helper_class(overrides).is_valid(WEIGHTS, ACTIVATIONS, default)
    if not valid:
        raise ValueError(words)


@pytest.mark.ort("G36", 140)
@pytest.mark.parametrize(("name", "entries", "words"), REFUSED)
def test_an_entry_is_checked_wherever_it_stands(name, entries, words) -> None:
    """The incumbent returns after the first tensor, and lets all others pass."""
    first = {"y": [{"symmetric": True}]}
    valid, said = verdicts({**first, name: entries})
    if "not present" in words:
        assert not valid[0]
    assert said == (True, None) or "not present" in words or "not in a" in words
    with pytest.raises(ValueError, match=words):
        refuse(TensorQuantOverridesHelper, {**first, name: entries}, U8)


@pytest.mark.ort("G36")
def test_types_of_all_entries_are_counted() -> None:
    """The incumbent's check forgets those after the first tensor, and adds none to them later."""
    overrides = {
        "y": [{"symmetric": True}],
        "x": [{"quant_type": QuantType.QInt4, "convert": {"quant_type": Q16}}],
    }
    ours = TensorQuantOverridesHelper(overrides)
    other = incumbent.TensorQuantOverridesHelper(theirs(overrides))
    assert ours.is_valid(WEIGHTS, ACTIVATIONS, U8)[0]
    assert other.is_valid(WEIGHTS, ACTIVATIONS, IncumbentType.QUInt8)[0]
    assert ours.get_quant_types() == {QuantType.QInt4, Q16}
    assert other.get_quant_types() == set()


def channels(**second: Any) -> list[dict[str, Any]]:
    first = {"axis": 0, "quant_type": Q8, "symmetric": True}
    return [first, {**second}, {}, {}]


@pytest.mark.ort(139)
@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (channels(quant_type=U8), "Channel quantization types for tensor 'w' do not match at ind"),
        (channels(axis=1), "Channel axis for tensor 'w' does not match at index 1"),
        (channels(symmetric=False), "Channel symmetric value for tensor 'w' does not match"),
        (channels(reduce_range=True), "Channel reduce_range value for tensor 'w' does not match"),
        (
            [{"axis": 0, **SCALE}, {}, dict(SCALE), dict(SCALE)],
            "specify scale/zero_point must do so for all channels, but tensor 'w' is missing them",
        ),
        (
            [{"axis": 0, "rmin": -1.0, "rmax": 1.0}, {}, {}, {}],
            "specify rmin/rmax must do so for all channels, but tensor 'w' is missing them",
        ),
    ],
)
def test_channels_must_agree(entries: list, words: str) -> None:
    ours, other = verdicts({"w": entries})
    assert not ours[0]
    assert words in ours[1]
    assert not other[0]  # its words name "{tensor_name}", unformatted


@pytest.mark.ort(137, 139)
def test_an_axis_may_be_counted_from_the_back_in_each_channel() -> None:
    entries = [{"axis": -2}, {"axis": 0}, {"axis": -2}, {}]
    assert TensorQuantOverridesHelper({"w": entries}).is_valid(WEIGHTS, ACTIVATIONS, U8)[0]


@pytest.mark.ort(129, 130, 134)
@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"simmetric": True}, "unknown key 'simmetric'; the nearest is 'symmetric'"),
        ({"scale": 0.0, "zero_point": 0}, "has to be above 0"),
        ({"rmin": 2.0, "rmax": 1.0}, "'rmin' 2.0 is above 'rmax' 1.0"),
        ({"symmetric": 1}, "'symmetric' has to be True or False"),
        ({"scale": 1.0, "zero_point": 0.5}, "'zero_point' has to be an integer"),
        ({"quant_type": U8, "scale": 1.0, "zero_point": 256}, "is no code of UINT8"),
        ({"scale": 1.0, "zero_point": 256}, "is no code of UINT8"),
        ({"quant_type": "QInt9"}, "QInt9"),
    ],
)
def test_values_that_cannot_be_are_refused(entry: dict, words: str) -> None:
    """The incumbent looks at none of them before it computes with them."""
    ours, other = verdicts({"x": [entry]})
    assert not ours[0]
    assert words in ours[1]
    assert other[0]


@pytest.mark.ort(140)
def test_an_unknown_tensor_is_answered_with_the_nearest_name() -> None:
    helper_ = TensorQuantOverridesHelper({"conv_outptu": [{"symmetric": True}]})
    assert "; 'conv_output'?" in (helper_.is_valid({}, {"conv_output"}, U8)[1] or "")
