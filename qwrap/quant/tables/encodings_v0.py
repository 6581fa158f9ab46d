"""AIMET encodings up to 0.6.1, and QNN's quantization overrides, which are of the same kind.

``{"activation_encodings": {name: [encoding, ...]}, "param_encodings": {...}}``, one encoding for
each channel of ``bitwidth``, ``dtype``, ``is_symmetric``, ``min``, ``max``, ``scale``, ``offset``.
Of these QNN needs only the bit width, but of ``min`` and ``max``, ``scale`` and ``offset`` both
or neither. Old files write offsets with either sign.

Source: AIMET, encoding specification 0.4.0, 0.5.0 and 0.6.1; QNN, qnn-onnx-converter
``--quantization_overrides``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwrap.config import QuantSpec
from qwrap.errors import TableError
from qwrap.quant.tables.contents import Contents
from qwrap.quant.tables.document import Array, Fields, at, at_tensor, render, shorten
from qwrap.quant.tables.grid import codes, encoded, is_symmetric, offsets, on_grid, require_integers
from qwrap.quant.tables.tensor_range import TensorRange

SECTIONS = {"activation_encodings": False, "param_encodings": True}
"""Section -> whether it is about weights."""

AIMET, QNN = "aimet-0.6.1", "qnn"


def read(document: object) -> Contents:
    """Return what a parsed file holds."""
    fields, contents = Fields(document), Contents()
    for section, stored in sections_of(fields).items():
        for name, value in fields.inner(section).values.items():
            with at(section), at_tensor(name):
                contents.add(name, _entry(value, stored))
    return contents


def sections_of(fields: Fields) -> dict[str, bool]:
    """Return which of ``SECTIONS`` a file has.

    Raises:
        TableError: it has none.
    """
    found = {name: stored for name, stored in SECTIONS.items() if name in fields}
    if not found:
        raise TableError(f"has neither of {', '.join(SECTIONS)}")
    return found


def write(contents: Contents, form: str) -> bytes:
    """Return the file, with the version if ``form`` is AIMET's."""
    document: dict[str, object] = {"version": "0.6.1"} if form == AIMET else {}
    for section, stored in SECTIONS.items():
        said: dict[str, object] = {}
        for name, entry in sorted(contents.ranges.items()):
            if entry.stored == stored:
                with at_tensor(name):
                    said[name] = _plain(entry, form)
        if not stored:
            floating = sorted(contents.floating.items())
            said |= {name: [{"bitwidth": b, "dtype": "float"}] for name, b in floating}
        document[section] = said
    return render(document)


def _plain(entry: TensorRange, form: str) -> list[dict[str, object]]:
    if entry.block_size is not None:
        raise TableError(f"{form} has no scales for blocks; write aimet-2.0.0")
    numbers = {"min": entry.low, "max": entry.high}
    if form == QNN and entry.scale is None and entry.dtype is not None:
        dtype, symmetric = entry.dtype, entry.dtype.signed
    else:
        dtype, symmetric = require_integers(entry, form), is_symmetric(entry)
        assert entry.scale is not None
        assert entry.zero_point is not None
        codes_alone = encoded(entry.scale, entry.zero_point, QuantSpec(dtype=dtype))
        numbers = {n: np.clip(e, codes_alone.low, codes_alone.high) for n, e in numbers.items()}
        numbers |= {"scale": entry.scale, "offset": offsets(entry)}
    shared = {"bitwidth": dtype.bits, "dtype": "int", "is_symmetric": str(symmetric)}
    columns = [array.reshape(-1).tolist() for array in numbers.values()]
    return [
        {**shared, **dict(zip(numbers, row, strict=True))} for row in zip(*columns, strict=True)
    ]


def _entry(value: object, stored: bool) -> TensorRange | int:
    if not isinstance(value, list) or not value:
        raise TableError(f"is {shorten(value)}; expected a list of encodings, one for each channel")
    channels = [Fields(item) for item in value]
    bits = _bits(channels)
    dtype = channels[0].text("dtype").lower() if "dtype" in channels[0] else "int"
    if dtype == "float":
        return bits
    if dtype != "int":
        raise TableError(f"dtype {dtype!r}: expected 'int' or 'float'")
    symmetric = channels[0].flag("is_symmetric")
    if any(channel.flag("is_symmetric") != symmetric for channel in channels):
        raise TableError("is symmetric in some channels and not in others")
    ends = _columns(channels, "min", "max")
    steps = _columns(channels, "scale", "offset")
    if steps is not None:
        offset = _resolve(steps[1], steps[0], ends, bits, symmetric)
        return _with_ends(on_grid(steps[0], offset, bits, symmetric), ends, stored)
    if ends is None:
        raise TableError(
            "has neither min and max nor scale and offset: a bit width alone is no range; take "
            "it out of the file and ask for the type in QConfig"
        )
    return TensorRange(*ends, dtype=codes(bits, symmetric), stored=stored)


def _resolve(
    said: Array, scale: Array, ends: Sequence[Array] | None, bits: int, symmetric: bool
) -> Array:
    """Return offsets with the sign that they mean, and those that symmetric encodings leave out."""
    offset: Array = -np.abs(said)
    half = 2 ** (bits - 1)
    # A range from 0 on that signed codes cannot reach is AIMET's "unsigned symmetric".
    unsigned = ends is not None and bool((ends[0] >= 0).all() and (ends[1] > half * scale).all())
    if symmetric and (offset == 0).all() and not unsigned:
        offset = offset - half
    return offset


def _with_ends(entry: TensorRange, ends: Sequence[Array] | None, stored: bool) -> TensorRange:
    """Return ``entry`` with the ends that the file gives, which may lie within those of its codes.

    Raises:
        TableError: they lie beyond.
    """
    low, high = (entry.low, entry.high) if ends is None else ends
    assert entry.scale is not None
    for beyond, end, expected in (
        (entry.low - low, low, entry.low),
        (high - entry.high, high, entry.high),
    ):
        steps = beyond / entry.scale
        if not (steps <= _SLACK).all():
            index = int(np.argmax(steps))
            raise TableError(
                f"min or max {float(end.flat[index]):g}, but its scale and offset reach "
                f"{float(expected.flat[index]):g} (index {index})"
            )
    return TensorRange(
        low,
        high,
        scale=entry.scale,
        zero_point=entry.zero_point,
        dtype=entry.dtype,
        stored=stored,
    )


_SLACK = 1.01
"""Steps that a file's ends may lie beyond those of its codes: AIMET counts the unused smallest code
of symmetric types; old TensorFlow files are one off."""


def _bits(channels: Sequence[Fields]) -> int:
    first, *others = (channel.bits("bitwidth") for channel in channels)
    if any(other != first for other in others):
        raise TableError("'bitwidth' differs between channels")
    return first


def _columns(channels: Sequence[Fields], *names: str) -> list[Array] | None:
    """Return fields of all channels, without dimensions for one channel; None if none has them."""
    if not any(name in channel for channel in channels for name in names):
        return None
    said = [[channel.numbers(name) for channel in channels] for name in names]
    if any(number.ndim for column in said for number in column):
        raise TableError(f"{' or '.join(names)} is a list; expected one number for each channel")
    columns = [np.array(column) for column in said]
    return [column.reshape(()) if len(channels) == 1 else column for column in columns]
