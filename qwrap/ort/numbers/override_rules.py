"""What is wrong with ``TensorQuantOverrides``: onnxruntime's rules and words, for every entry."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qwrap.errors import ConfigError
from qwrap.ort.numbers.code_types import ONNX_INT_TYPE_RANGE, data_type_name
from qwrap.overrides import parse_overrides

NOT_WITH_SCALE = ("symmetric", "reduce_range", "rmax", "rmin")
_BOTH = "Must provide both 'scale' and 'zero_point' if one of the overrides is provided"


def faults(
    overrides: Mapping[str, Any],
    initializers: Mapping[str, Any],
    activations: Collection[str],
    default_type: Any,
) -> Iterator[str]:
    """Say what is wrong with the settings of any tensor.

    Args:
        overrides: tensor -> list with a dictionary, or with one for each channel.
        initializers: constants by name.
        activations: names of all other tensors.
        default_type: type of activations of which nothing is said.

    Source: onnxruntime/quantization/tensor_quant_overrides.py, 1.31, which stops after one tensor.
    """
    for name, entries in overrides.items():
        if name not in initializers and name not in activations:
            near = difflib.get_close_matches(str(name), [*initializers, *activations], 1)
            hint = f"; '{near[0]}'?" if near else ""
            yield f"Tensor '{name}' in TensorQuantOverrides is not present in the model{hint}"
            continue
        yield from _form_faults(name, entries)
        if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
            continue
        if not any(entries):
            continue
        if len(entries) > 1 or entries[0].get("axis") is not None:
            yield from _channel_faults(name, entries, initializers)
        else:
            yield from _tensor_faults(name, entries[0], name in initializers, default_type)
        yield from _value_faults(name, entries, None if name in initializers else default_type)


def _form_faults(name: str, entries: Any) -> Iterator[str]:
    if not isinstance(entries, list):
        yield f"Tensor quantization overrides for '{name}' are not in a list"
        return
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            yield f"Tensor quantization overrides at index {index} for '{name}' are not in a dict"
        elif entry.get("convert") is not None and not isinstance(entry["convert"], Mapping):
            yield f"'convert' options (tensor '{name}') are not in a dict"


def _scale_faults(entry: Mapping[str, Any], where: str = "") -> Iterator[str]:
    if ("scale" in entry) != ("zero_point" in entry):
        yield _BOTH + where
    elif "scale" in entry:
        keys = ", ".join(key for key in NOT_WITH_SCALE if key in entry)
        if keys:
            yield (
                f"Tensor override option(s) [{keys}] are invalid with 'scale' and 'zero_point'"
                + where
            )


def _tensor_faults(
    name: str, entry: Mapping[str, Any], is_initializer: bool, default_type: Any
) -> Iterator[str]:
    yield from _scale_faults(entry, f" (tensor '{name}')")
    if "reduce_range" in entry and not is_initializer:
        yield (
            f"Option 'reduce_range' is only supported for initializers, not for activation {name}"
        )
    convert = entry.get("convert")
    if convert is None:
        return
    if is_initializer:
        yield f"Cannot use 'convert' override for initializers, such as {name}."
    elif isinstance(convert, Mapping):
        yield from _convert_faults(name, convert, entry.get("quant_type") or default_type)


def _convert_faults(name: str, convert: Mapping[str, Any], original: Any) -> Iterator[str]:
    if convert.get("quant_type") is None:
        yield f"'convert' options (tensor '{name}') must specify a 'quant_type'"
    elif same_type(convert["quant_type"], original):
        yield f"'convert' quant_type must differ from original quant_type (tensor '{name}')"
    if "reduce_range" in convert:
        yield (
            f"Option 'reduce_range' is only supported for initializers, not for activation {name}"
        )
    yield from _scale_faults(convert, f" (tensor '{name}')")


def same_type(first: Any, second: Any) -> bool:
    """Return whether two types are one, each a ``QuantType`` or a ``TensorProto.DataType``."""
    return bool(getattr(first, "tensor_type", first) == getattr(second, "tensor_type", second))


def _channel_faults(
    name: str, entries: Sequence[Mapping[str, Any]], initializers: Mapping[str, Any]
) -> Iterator[str]:
    first, axis = entries[0], entries[0].get("axis")
    if name not in initializers:
        yield f"Tensor '{name}' has per-channel overrides, but is not an initializer"
        return
    if axis is None:
        yield (
            f"Per-channel overrides for tensor {name} is missing an 'axis' value in the first "
            "channel dictionary."
        )
        return
    shape = list(initializers[name].dims)
    if not isinstance(axis, (int, np.integer)) or not -len(shape) <= axis < len(shape):
        yield f"Axis override value is out-of-bounds for tensor {name} (rank {len(shape)})"
        return
    if len(entries) not in (1, shape[axis]):
        yield (
            f"Incorrect number of channel overrides for tensor {name} (axis {axis}), expected "
            f"{shape[axis]}, but found {len(entries)}."
        )
    if any(entry.get("convert") is not None for entry in entries):
        yield f"Cannot use 'convert' override for initializers, such as {name}."
    yield from _scale_faults(first, f" (tensor '{name}')")
    if ("rmin" in first) != ("rmax" in first):
        yield f"Must provide both 'rmin' and 'rmax' if one is provided (tensor '{name}')"
    for index, other in enumerate(entries[1:], 1):
        yield from _mismatches(name, first, other, index, len(shape))


_MISMATCHES = {
    "quant_type": "Channel quantization types for tensor '{}' do not match at index {}.",
    "axis": "Channel axis for tensor '{}' does not match at index {}.",
    "symmetric": "Channel symmetric value for tensor '{}' does not match at index {}.",
    "reduce_range": "Channel reduce_range value for tensor '{}' does not match at index {}.",
}
_PAIRS = (("scale", "zero_point"), ("rmin", "rmax"))


def _mismatches(
    name: str, first: Mapping[str, Any], other: Mapping[str, Any], index: int, rank: int
) -> Iterator[str]:
    for key, words in _MISMATCHES.items():
        if key not in other:
            continue
        mine, its = first.get(key), other[key]
        if key == "axis" and isinstance(its, (int, np.integer)) and isinstance(mine, int):
            mine, its = mine % rank, its % rank
        if not same_type(mine, its):
            yield words.format(name, index)
    for pair in _PAIRS:
        if all(key in first for key in pair) != all(key in other for key in pair):
            yield (
                f"Per-channel overrides that specify {'/'.join(pair)} must do so for all channels, "
                f"but tensor '{name}' is missing them at index "
                f"{index if pair[0] in first else 0}."
            )
    yield from _scale_faults(other, f" (tensor '{name}')")


def _value_faults(
    name: str, entries: Sequence[Mapping[str, Any]], default_type: Any
) -> Iterator[str]:
    """Say what is wrong with types and numbers, which onnxruntime takes as they come."""
    try:
        parse_overrides({name: channel_entries(entries)})
    except ConfigError as error:
        yield str(error)
        return
    for entry in (*entries, *(e.get("convert") or {} for e in entries)):
        kind = entry.get("quant_type") or default_type
        onnx_type = int(getattr(kind, "tensor_type", kind) or 0) if not isinstance(kind, str) else 0
        ends = ONNX_INT_TYPE_RANGE.get(onnx_type)
        zero = np.asarray(entry.get("zero_point", 0)).astype(np.float64)
        if ends and ((zero < float(ends[0])) | (zero > float(ends[1]))).any():
            yield (
                f"'zero_point' {zero} of tensor '{name}' is no code of "
                f"{data_type_name(onnx_type)}: "
                f"choose one from {ends[0]} to {ends[1]}"
            )


def channel_entries(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the dictionaries of channels; a single one with arrays for all channels is split."""
    if len(entries) != 1 or entries[0].get("axis") is None:
        # an axis that is counted from the back equals one that is not: that was looked at
        return [{k: v for k, v in e.items() if not i or k != "axis"} for i, e in enumerate(entries)]
    numbers = {
        key: np.asarray(entries[0][key]).reshape(-1)
        for key in ("scale", "zero_point", "rmin", "rmax")
        if entries[0].get(key) is not None
    }
    count = max((values.size for values in numbers.values()), default=1)
    return [
        {
            **entries[0],
            **{key: values[i if values.size > 1 else 0] for key, values in numbers.items()},
        }
        for i in range(count)
    ]
