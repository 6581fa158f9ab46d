"""What is said of single tensors by name: onnxruntime's ``TensorQuantOverrides``, read and checked.

What can be told without a graph is refused here; the rest is ``quant.placement.tensor_overrides``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qwrap.dtypes import QuantType, quant_type
from qwrap.errors import ConfigError

TYPE_NAMES = {
    "QInt8": "int8",
    "QUInt8": "uint8",
    "QInt16": "int16",
    "QUInt16": "uint16",
    "QInt4": "int4",
    "QUInt4": "uint4",
    "QFLOAT8E4M3FN": "float8e4m3fn",
}
"""Members of onnxruntime's ``QuantType``, and what ONNX calls these types."""
KEEPS_OUTPUT = "(graph output)"
"""In ``recv_nodes``: a graph output keeps the first type, although all nodes read the second.

It is no node's name, so that not all readers are named: that is what onnxruntime goes by too.
"""
_RANGES = ("low", "high")
_SAID = {"low": "rmin", "high": "rmax"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorOverride:
    """What is said of one tensor by name, as in onnxruntime's ``TensorQuantOverrides``.

    None leaves it to the rest of the settings. Numbers come once, or once for each channel.

    Attributes:
        dtype: type of the codes.
        symmetric: whether the zero point is fixed at the middle code.
        reduce_range: whether a constant uses half of the codes.
        axis: channel axis of a constant, which then has a scale per channel; may be negative.
            A constant of which anything is said, but no axis, has one scale.
        low: smallest values to represent, in real units.
        high: largest values to represent; only of a tensor with one scale may one end be given
            alone, the other is then what was observed.
        scale: the scales themselves.
        zero_point: the zero points that go with them.
        convert: what nodes that read the tensor get instead: the codes are converted for them.
        receivers: on ``convert``, the names of these nodes; None for all, and the graph output.
            Where all nodes are named a graph output is converted too, unless ``KEEPS_OUTPUT`` is
            among the names.
    """

    dtype: QuantType | None = None
    symmetric: bool | None = None
    reduce_range: bool | None = None
    axis: int | None = None
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None
    zero_point: tuple[int, ...] | None = None
    convert: TensorOverride | None = None
    receivers: frozenset[str] | None = None

    def __post_init__(self) -> None:
        for wrong in (*self._number_faults(), *self._range_faults(), *self._convert_faults()):
            raise ConfigError(wrong)

    def _number_faults(self) -> Iterable[str]:
        if self.dtype is not None and self.dtype.is_integer and self.dtype.bits > 16:
            yield f"quant_type {self.dtype} is for biases; choose a type of up to 16 bits"
        if (self.scale is None) != (self.zero_point is None):
            yield "'scale' and 'zero_point' must both be given if one of them is"
        if self.scale is not None:
            extra = [n for n in ("symmetric", "reduce_range", *_RANGES) if self._has(n)]
            if extra:
                said = ", ".join(repr(_SAID.get(name, name)) for name in extra)
                yield f"{said} cannot be given with 'scale' and 'zero_point'"
            if not all(0 < s < math.inf for s in self.scale):
                yield f"'scale' {list(self.scale)} has to be above 0, and finite"
        counts = {len(n) for n in (self.low, self.high, self.scale, self.zero_point) if n}
        if len(counts) > 1:
            yield f"numbers for {sorted(counts)} channels; give as many of each"
        if self.axis is None and counts - {1}:
            yield "there are numbers for each channel, but no 'axis' that the channels run along"

    def _range_faults(self) -> Iterable[str]:
        if self.axis is not None and (self.low is None) != (self.high is None):
            yield "'rmin' and 'rmax' must both be given where there is an 'axis', or neither"
        for name in _RANGES:
            ends = getattr(self, name) or ()
            if not all(map(math.isfinite, ends)):
                yield f"'{_SAID[name]}' {list(ends)} has to be finite"
        for low, high in zip(self.low or (), self.high or (), strict=False):
            if low > high:
                yield f"'rmin' {low} is above 'rmax' {high}"

    def _convert_faults(self) -> Iterable[str]:
        if self.convert is None:
            return
        if self.axis is not None:
            yield "'convert' is not for constants, and 'axis' is for nothing else"
        if self.convert.dtype is None:
            yield "'convert' must say a 'quant_type'"
        elif self.convert.dtype == self.dtype:
            yield (
                f"'convert' to {self.dtype}, which the tensor has already: its 'quant_type' must "
                "differ from the tensor's own"
            )
        for name in ("reduce_range", "axis", "convert"):
            if self.convert._has(name):
                yield f"'{name}' cannot be given in 'convert': what is converted is no constant"

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None

    @property
    def has_range(self) -> bool:
        """Whether it says anything of the range or the scale."""
        return any(map(self._has, ("low", "high", "scale")))

    @property
    def text(self) -> str:
        """What was said, in onnxruntime's words, for messages."""
        words: dict[str, object] = {"quant_type": self.dtype, "symmetric": self.symmetric}
        words["axis"] = self.axis
        words["reduce_range"] = self.reduce_range
        numbers = {"rmin": self.low, "rmax": self.high, "scale": self.scale}
        numbers["zero_point"] = self.zero_point
        words |= {name: _short(given) for name, given in numbers.items()}
        if self.convert is not None:
            words["convert"] = f"({self.convert.text})"
        return ", ".join(f"{name}={word}" for name, word in words.items() if word is not None)


def _short(numbers: Sequence[float] | None) -> str | None:
    if numbers is None:
        return None
    return f"{numbers[0]:g}" if len(numbers) == 1 else f"[{numbers[0]:g}, … ({len(numbers)})]"


# --- onnxruntime's dictionary --------------------------------------------------------------------

_KEYS = {
    "quant_type", "symmetric", "reduce_range", "axis", "rmin", "rmax", "scale", "zero_point",
    "convert",
}  # fmt: skip
_CONVERT_KEYS = (_KEYS - {"convert"}) | {"recv_nodes"}
_SHARED = {
    "quant_type": "dtype",
    "axis": "axis",
    "symmetric": "symmetric",
    "reduce_range": "reduce_range",
}
_NUMBERS = {"rmin": "low", "rmax": "high", "scale": "scale", "zero_point": "zero_point"}


def parse_overrides(overrides: Mapping[str, Any]) -> dict[str, TensorOverride]:
    """Return what onnxruntime's dictionary says, tensor by tensor.

    Args:
        overrides: tensor -> list with one dictionary, or with one for each channel. Empty lists
            and dictionaries say nothing. Keys: "quant_type", "symmetric", "reduce_range", "axis",
            "rmin", "rmax", "scale", "zero_point", "convert", and in the latter "recv_nodes", the
            names in a list or set.

    Raises:
        ConfigError: it breaks one of onnxruntime's rules, or has keys that onnxruntime would not
            look at; names the tensor.

    Source: onnxruntime/quantization/tensor_quant_overrides.py, 1.31.
    """
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"overrides are a dictionary, tensor -> list; got {overrides!r}")
    found: dict[str, TensorOverride] = {}
    for name, channels in overrides.items():
        try:
            override = _tensor(channels)
        except ConfigError as error:
            raise ConfigError(f"overrides of tensor {name!r}: {error}") from error
        if override != TensorOverride():
            found[name] = override
    return found


def _tensor(channels: Any) -> TensorOverride:
    if isinstance(channels, (str, Mapping)) or not isinstance(channels, Sequence):
        raise ConfigError(
            f"expected a list with a dictionary, or one for each channel; got {channels!r}"
        )
    for index, channel in enumerate(channels):
        if not isinstance(channel, Mapping):
            raise ConfigError(f"item {index} of the list is not a dictionary: {channel!r}")
        _check_keys(channel, _KEYS)
    if not channels or not any(channels):
        return TensorOverride()
    first = channels[0]
    if len(channels) > 1 and first.get("axis") is None:
        raise ConfigError(
            f"{len(channels)} dictionaries, one for each channel, but the first has no 'axis'"
        )
    for index, channel in enumerate(channels[1:], 1):
        _check_alike(first, channel, index)
    override = _one(first)
    numbers: dict[str, Any] = {
        field: tuple(number for c in channels for number in _values(key, c[key]))
        for key, field in _NUMBERS.items()
        if first.get(key) is not None
    }
    override = replace(override, **numbers)
    return replace(override, convert=_convert(first["convert"])) if "convert" in first else override


def _check_keys(given: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), list(known), 1, cutoff=0.0)
            raise ConfigError(f"unknown key {key!r}; the nearest is {nearest[0]!r}")


def _check_alike(first: Mapping[str, Any], other: Mapping[str, Any], index: int) -> None:
    """Refuse a channel that contradicts the first one, or says more or less than it."""
    if "convert" in other:
        raise ConfigError("'convert' is not for constants, and only these have channels")
    for key in _SHARED:
        if key in other and _same(key, other[key]) != _same(key, first.get(key)):
            raise ConfigError(
                f"channel {index} has {key}={other[key]}, the first {first.get(key)}; it must be "
                "the same in all channels"
            )
    for key in _NUMBERS:
        if (key in first) != (key in other):
            raise ConfigError(f"{key!r} must be given for all channels; that of {index} differs")


def _same(key: str, value: Any) -> Any:
    return _type(value) if key == "quant_type" and value is not None else value


def _one(given: Mapping[str, Any]) -> TensorOverride:
    """Return what a dictionary says beside numbers."""
    fields: dict[str, Any] = {}
    for key, field in _SHARED.items():
        value = given.get(key)
        if value is None:
            continue
        if key == "quant_type":
            value = _type(value)
        elif key == "axis":
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise ConfigError(f"'axis' has to be an integer; got {value!r}")
            value = int(value)
        elif isinstance(value, (bool, np.bool_)):
            value = bool(value)
        else:
            raise ConfigError(f"{key!r} has to be True or False; got {value!r}")
        fields[field] = value
    return TensorOverride(**fields)


def _convert(given: Any) -> TensorOverride:
    if not isinstance(given, Mapping):
        raise ConfigError(f"'convert' has to be a dictionary; got {given!r}")
    _check_keys(given, _CONVERT_KEYS)
    numbers: dict[str, Any] = {
        field: _values(key, given[key])
        for key, field in _NUMBERS.items()
        if given.get(key) is not None
    }
    names = given.get("recv_nodes")
    receivers = None if names is None else _receivers(names)
    try:
        return replace(_one(given), **numbers, receivers=receivers)
    except ConfigError as error:
        raise ConfigError(f"in 'convert': {error}") from error


def _receivers(names: Any) -> frozenset[str]:
    listed = isinstance(names, Iterable) and not isinstance(names, (str, bytes, Mapping))
    found = frozenset(names) if listed else frozenset()
    if not listed or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"'recv_nodes' has to be a list or set of node names; got {names!r}")
    return found


def _type(value: Any) -> QuantType:
    """Return the type that onnxruntime's or qwrap's ``QuantType``, or a name of either, stands for.

    Raises:
        ConfigError: there is no such type.
    """
    if isinstance(value, QuantType):
        return value
    name = value if isinstance(value, str) else getattr(value, "name", None)
    if not isinstance(name, str):
        raise ConfigError(f"'quant_type' {value!r} is no type; give a QuantType or its name")
    return quant_type(TYPE_NAMES.get(name.removeprefix("QuantType."), name))


def _values(key: str, given: Any) -> tuple[Any]:
    """Return one number in a tuple, from a number or an array of one."""
    array = np.asarray(given)
    is_number = np.issubdtype(array.dtype, np.number) or array.dtype.kind == "V"
    if array.size != 1 or not is_number:
        raise ConfigError(f"{key!r} has to be one number; got {given!r}")
    number = float(array.reshape(()).astype(np.float64))
    if key != "zero_point":
        return (number,)
    if not number.is_integer():
        raise ConfigError(f"'zero_point' has to be an integer; got {given!r}")
    return (int(number),)
