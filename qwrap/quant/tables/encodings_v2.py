"""AIMET encodings 2.0.0: ONNX's QuantizeLinear in JSON, one encoding for each name.

``{"version": "2.0.0", "encodings": [{"name", "output_dtype", "y_scale", "y_zero_point", "axis",
"block_size"}]}``; zero points that are all 0 are left out. Low-power blocks have
``per_block_int_scale`` and ``per_channel_float_scale`` in place of ``y_scale``.

Source: AIMET, encoding specification 2.0.0; ONNX QuantizeLinear-21.
"""

from __future__ import annotations

import numpy as np

from qwrap.config import QuantSpec
from qwrap.dtypes import QuantType, quant_type
from qwrap.errors import ConfigError, TableError
from qwrap.quant.tables.contents import Contents
from qwrap.quant.tables.document import Array, Fields, at, at_tensor, cast, listed, render, shorten
from qwrap.quant.tables.encodings_v1 import check_multiples, multiples
from qwrap.quant.tables.grid import encoded, require_scale
from qwrap.quant.tables.tensor_range import Lpbq, TensorRange

FORM = "aimet-2.0.0"
_WIDE = {"float16": 16, "bfloat16": 16, "float32": 32, "float": 32}
_KNOWN = {
    *("name", "output_dtype", "y_scale", "y_zero_point", "axis", "block_size"),
    *("per_block_int_scale", "per_channel_float_scale"),
}


def read(document: object) -> Contents:
    """Return what a parsed file holds."""
    contents = Contents()
    for index, value in enumerate(Fields(document).sequence("encodings")):
        with at(f"encodings[{index}]"):
            fields = Fields(value)
            name = fields.text("name")
        with at_tensor(name):
            if strange := fields.values.keys() - _KNOWN:
                raise TableError(f"has {listed(strange)}; known are {', '.join(sorted(_KNOWN))}")
            contents.add(name, _entry(fields))
    return contents


def _entry(fields: Fields) -> TensorRange | int:
    said = fields.text("output_dtype").lower()
    if said in _WIDE:
        return _WIDE[said]
    spec = QuantSpec(dtype=_type(said))
    axis = fields.integer("axis") if "axis" in fields else None
    block_size = fields.integer("block_size") if "block_size" in fields else None
    if block_size is not None and axis is None:
        raise TableError(f"has blocks of {block_size} and no axis that they run along")
    scale, lpbq = _scales(fields, axis)
    if axis is None:
        if scale.size != 1:
            raise TableError(f"has {scale.size} scales and no axis that they run along")
        scale = scale.reshape(())
    elif block_size is None and scale.ndim != 1:
        raise TableError(f"has scales of shape {list(scale.shape)}; expected one for each channel")
    elif not -scale.ndim <= axis < scale.ndim and block_size is not None:
        raise TableError(f"has blocks along axis {axis} of {scale.ndim}")
    zero_point = np.zeros(scale.shape)
    if "y_zero_point" in fields:
        zero_point = fields.numbers("y_zero_point")
        zero_point = zero_point.reshape(()) if axis is None and zero_point.size == 1 else zero_point
    return encoded(scale, zero_point, spec, axis=axis, block_size=block_size, lpbq=lpbq)


def _type(name: str) -> QuantType:
    try:
        return quant_type(name)
    except ConfigError as error:
        raise TableError(f"output_dtype {shorten(name)}: no type of quantized codes") from error


def _scales(fields: Fields, axis: int | None) -> tuple[Array, Lpbq | None]:
    """Return the scales, and how they are made of multiples."""
    if "per_block_int_scale" not in fields:
        return fields.numbers("y_scale"), None
    whole, channel = (fields.numbers(f"per_{n}_scale") for n in ("block_int", "channel_float"))
    check_multiples(whole)
    if channel.ndim == 1 and whole.ndim == 2 and axis is not None:
        channel = channel[:, None] if axis in (1, -1) else channel[None]
    fits = channel.ndim == whole.ndim and all(
        one in (1, many) for one, many in zip(channel.shape, whole.shape, strict=True)
    )
    if not fits:
        raise TableError(f"has block scales {whole.shape} and channel scales {channel.shape}")
    scale: Array = whole * channel
    bits = 2 * _type(fields.text("output_dtype")).bits
    return scale, Lpbq(cast(channel, "float32"), bits)


def write(contents: Contents) -> bytes:
    """Return the file."""
    said: list[dict[str, object]] = []
    for name, entry in sorted(contents.ranges.items()):
        with at_tensor(name):
            said.append({"name": name, **_plain(entry)})
    wide = {bits: dtype for dtype, bits in reversed(_WIDE.items())}
    for name, bits in sorted(contents.floating.items()):
        if bits not in wide:
            raise TableError(f"tensor {name!r}: {FORM} has no floating point of {bits} bits")
        said.append({"name": name, "output_dtype": wide[bits]})
    return render({"version": "2.0.0", "encodings": said})


def _plain(entry: TensorRange) -> dict[str, object]:
    dtype = require_scale(entry, FORM)
    said: dict[str, object] = {"output_dtype": dtype.name}
    assert entry.scale is not None
    assert entry.zero_point is not None
    _require_axis(entry, entry.scale)
    if entry.lpbq is None:
        said["y_scale"] = entry.scale.tolist()
    else:
        if entry.lpbq.bits != 2 * dtype.bits:
            raise TableError(
                f"has {dtype.bits}-bit codes that make up {entry.lpbq.bits} bits with their block "
                f"scales; {FORM} holds twice as many, aimet-1.0.0 any"
            )
        said["per_block_int_scale"] = multiples(entry, entry.lpbq).tolist()
        said["per_channel_float_scale"] = entry.lpbq.channel_scale.tolist()
    if entry.zero_point.any():
        said["y_zero_point"] = entry.zero_point.tolist()
    if entry.axis is not None:
        said["axis"] = entry.axis
    if entry.block_size is not None:
        said["block_size"] = entry.block_size
    return said


def _require_axis(entry: TensorRange, scale: Array) -> None:
    if scale.ndim == 0 or (entry.axis is not None and (entry.block_size is None or scale.ndim > 1)):
        return
    raise TableError(
        f"has {scale.size} scales and does not tell along which axis (a file of an older version "
        f"does not), which {FORM} needs; put the table on the model with qwrap.rescale, and write "
        "RangeTable.of(model)"
    )
