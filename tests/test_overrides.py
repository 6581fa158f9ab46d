"""onnxruntime's dictionary of overrides, read: what it may say, and what not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.tensor_quant_overrides import TensorQuantOverridesHelper

import qwrap
from qwrap import dtypes
from qwrap.errors import ConfigError
from qwrap.overrides import TYPE_NAMES, TensorOverride, parse_overrides


def parsed(*channels: dict[str, Any]) -> TensorOverride:
    return parse_overrides({"t": list(channels)}).get("t", TensorOverride())


@pytest.mark.parametrize("member", list(QuantType), ids=str)
def test_every_type_of_onnxruntime_is_that_of_its_codes(member: QuantType) -> None:
    expected = parsed({"quant_type": member}).dtype
    assert expected is not None
    assert expected.onnx_type == member.tensor_type
    for name in (member.name, f"QuantType.{member.name}", expected.name, expected):
        assert parsed({"quant_type": name}).dtype == expected
    assert set(TYPE_NAMES) == set(QuantType.__members__)


def test_types_that_onnxruntime_lacks_can_be_named() -> None:
    assert parsed({"quant_type": "int3"}).dtype == qwrap.integer_type(3)


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [
        ("symmetric", "symmetric", True),
        ("reduce_range", "reduce_range", False),
        ("axis", "axis", -1),
        ("rmin", "low", -1.5),
        ("rmax", "high", 2.5),
    ],
)
def test_each_key_becomes_a_field(key: str, field: str, value: float) -> None:
    given = {key: value} | ({"rmax": 2.5, "rmin": -1.5} if key == "axis" else {})
    found = getattr(parsed(given), field)
    assert found == ((value,) if field in ("low", "high") else value)


@pytest.mark.parametrize(
    "scale", [0.5, np.float32(0.5), np.array(0.5, dtype=np.float16), np.array([0.5])]
)
@pytest.mark.parametrize("zero_point", [3, np.uint8(3), np.array(3, dtype=np.int32), 3.0])
def test_numbers_may_be_arrays_of_one(scale: Any, zero_point: Any) -> None:
    found = parsed({"scale": scale, "zero_point": zero_point})
    assert (found.scale, found.zero_point) == ((0.5,), (3,))


def test_channels_come_in_the_order_of_the_list() -> None:
    found = parsed(*({"axis": 1, "scale": 0.1 * i, "zero_point": i} for i in (1, 2, 3)))
    assert found == TensorOverride(axis=1, scale=(0.1, 0.1 * 2, 0.1 * 3), zero_point=(1, 2, 3))


@pytest.mark.parametrize("names", [["a", "b"], {"a", "b"}, ("a", "b"), frozenset("ab")])
def test_receivers_may_be_a_list_or_a_set(names: Any) -> None:
    found = parsed({"convert": {"quant_type": QuantType.QInt16, "recv_nodes": names}})
    assert found.convert == TensorOverride(dtype=dtypes.INT16, receivers=frozenset("ab"))


@pytest.mark.parametrize("channels", [[], [{}], [{}, {}]])
def test_empty_lists_and_dictionaries_say_nothing(channels: list[dict[str, Any]]) -> None:
    assert parse_overrides({"t": channels}) == {}


U16 = {"quant_type": QuantType.QUInt16}
SCALE = {"scale": 0.1, "zero_point": 0}
# What onnxruntime refuses too, as far as its check gets there: it stops at the first tensor.
FAULTS: dict[str, tuple[list[Any], str]] = {
    "scale alone": ([{"scale": 0.1}], "'scale' and 'zero_point' must both"),
    "zero point alone": ([{"zero_point": 1}], "'scale' and 'zero_point' must both"),
    "symmetric scale": ([SCALE | {"symmetric": True}], "'symmetric' cannot be given with 'scale'"),
    "reduced scale": ([SCALE | {"reduce_range": True}], "'reduce_range' cannot be given with"),
    "rmin with scale": ([SCALE | {"rmin": 0.0}], "'rmin' cannot be given with 'scale'"),
    "rmax with scale": ([SCALE | {"rmax": 0.0}], "'rmax' cannot be given with 'scale'"),
    "no axis": ([{"rmin": 0.0, "rmax": 1.0}] * 2, "the first has no 'axis'"),
    "one end": ([{"axis": 0, "rmin": 0.0}], "'rmin' and 'rmax' must both"),
    "types differ": (
        [{"axis": 0, "quant_type": QuantType.QInt8}, {"quant_type": QuantType.QInt4}],
        "channel 1 has quant_type=QInt4, the first QInt8",
    ),
    "axes differ": ([{"axis": 0}, {"axis": 1}], "channel 1 has axis=1, the first 0"),
    "symmetry differs": ([{"axis": 0, "symmetric": True}, {"symmetric": False}], "channel 1 has"),
    "range differs": ([{"axis": 0}, {"reduce_range": True}], "channel 1 has reduce_range=True"),
    "scale of some": ([{"axis": 0} | SCALE, {}], "'scale' must be given for all channels"),
    "range of some": (
        [{"axis": 0, "rmin": 0.0, "rmax": 1.0}, {}],
        "'rmin' must be given for all channels",
    ),
    "converted channels": ([{"axis": 0}, {"convert": U16}], "'convert' is not for constants"),
    "convert without type": ([{"convert": {"symmetric": True}}], "'convert' must say a"),
    "convert to the same": ([U16 | {"convert": U16}], "'convert' to uint16, which the tensor has"),
    "reduced convert": (
        [{"convert": U16 | {"reduce_range": True}}],
        "'reduce_range' cannot be given in 'convert'",
    ),
    "half a scale": ([{"convert": U16 | {"scale": 0.1}}], "in 'convert': 'scale' and 'zero_point'"),
    "too much": (
        [{"convert": U16 | SCALE | {"symmetric": True}}],
        "in 'convert': 'symmetric' cannot be given with 'scale'",
    ),
    "no dictionary": (["uint16"], "item 0 of the list is not a dictionary: 'uint16'"),
    "no dictionary of a channel": ([{"axis": 0}, 3], "item 1 of the list is not a dictionary"),
}


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_what_breaks_a_rule_is_refused_with_the_tensors_name(case: tuple[list[Any], str]) -> None:
    channels, message = case
    with pytest.raises(ConfigError, match=f"overrides of tensor 't': .*{message}"):
        qwrap.QConfig.from_overrides({"t": channels})


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "scale of some"])
def test_onnxruntime_refuses_the_same(name: str) -> None:
    import onnx

    values = onnx.numpy_helper.from_array(np.zeros((2, 2), np.float32), "t")
    stored = {"t": values} if "axis" in str(FAULTS[name]) or "channel" in name else {}
    helper = TensorQuantOverridesHelper({"t": FAULTS[name][0]})
    try:
        valid = helper.is_valid(stored, {"t"}, QuantType.QUInt8)[0]
    except (AttributeError, TypeError):
        valid = False  # its own way of refusing
    assert not valid


# What onnxruntime accepts, and then overlooks or fails at.
@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"quant_type": "uint8"}, "expected a list with a dictionary"),
        ("uint8", "expected a list with a dictionary"),
        ([{"quant_typ": "uint8"}], "unknown key 'quant_typ'; the nearest is 'quant_type'"),
        ([{"recv_nodes": {"a"}}], "unknown key 'recv_nodes'"),
        ([{"convert": {"quant_type": "uint16", "convert": {}}}], "unknown key 'convert'"),
        ([{"convert": "uint16"}], "'convert' has to be a dictionary"),
        ([{"convert": U16 | {"recv_nodes": "Op4"}}], "'recv_nodes' has to be a list or set"),
        ([{"convert": U16 | {"recv_nodes": [4]}}], "'recv_nodes' has to be a list or set"),
        ([{"axis": 0, "convert": U16}], "'convert' is not for constants"),
        ([{"convert": U16 | {"axis": 0}}], "'axis' cannot be given in 'convert'"),
        ([{"quant_type": "uint9000"}], "no quantized type 'uint9000'"),
        ([{"quant_type": 4}], "'quant_type' 4 is no type"),
        ([{"quant_type": "int32"}], "quant_type int32 is for biases"),
        ([{"symmetric": "yes"}], "'symmetric' has to be True or False"),
        ([{"axis": 0.5}], "'axis' has to be an integer"),
        ([{"axis": True}], "'axis' has to be an integer"),
        ([{"rmin": 1.0, "rmax": 0.0}], "'rmin' 1.0 is above 'rmax' 0.0"),
        ([{"rmax": float("nan")}], "has to be finite"),
        ([{"scale": 0.0, "zero_point": 0}], "has to be above 0"),
        ([{"scale": -0.1, "zero_point": 0}], "has to be above 0"),
        ([{"scale": [0.1, 0.2], "zero_point": 0}], "'scale' has to be one number"),
        ([{"scale": 0.1, "zero_point": 0.5}], "'zero_point' has to be an integer"),
        ([{"rmin": "low"}], "'rmin' has to be one number"),
    ],
)
def test_what_cannot_mean_anything_is_refused(channels: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"overrides of tensor 't': .*{message}"):
        parse_overrides({"t": channels})


def test_other_settings_go_along() -> None:
    config = qwrap.QConfig.from_overrides({"t": [U16]}, activation="int8", per_channel=False)
    assert config.activation_spec is not None
    assert config.activation_spec.dtype == dtypes.INT8
    assert not config.per_channel
    assert config.tensors == {"t": TensorOverride(dtype=dtypes.UINT16)}
    with pytest.raises(ConfigError, match="tensors= are what the overrides say"):
        qwrap.QConfig.from_overrides({}, tensors={})
    with pytest.raises(ConfigError, match="overrides are a dictionary"):
        qwrap.QConfig.from_overrides([("t", [U16])])  # type: ignore[arg-type]
