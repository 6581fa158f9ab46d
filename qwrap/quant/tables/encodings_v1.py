"""AIMET encodings 1.0.0: lists of encodings with names, scales and offsets one after the other.

No axis is told: channels are those of the output. The scales of blocks come output channel by
output channel, also where these are the second axis (MatMul, Gemm).

Source: AIMET, encoding specification 1.0.0; ``to_qnn_encoding_dict`` of aimet_onnx for the order.
"""

from __future__ import annotations

import numpy as np

from qwrap.errors import TableError
from qwrap.quant.tables.contents import Contents
from qwrap.quant.tables.document import Array, Fields, at, at_tensor, cast, render
from qwrap.quant.tables.encodings_v0 import SECTIONS, sections_of
from qwrap.quant.tables.grid import is_symmetric, offsets, on_grid, require_integers
from qwrap.quant.tables.tensor_range import Lpbq, TensorRange

FORM = "aimet-1.0.0"
_TYPES = ("PER_TENSOR", "PER_CHANNEL", "PER_BLOCK", "LPBQ")


def read(document: object) -> Contents:
    """Return what a parsed file holds."""
    fields, contents = Fields(document), Contents()
    for section, stored in sections_of(fields).items():
        for index, value in enumerate(fields.sequence(section)):
            with at(f"{section}[{index}]"):
                encoding = Fields(value)
                name = encoding.text("name")
            with at(section), at_tensor(name):
                contents.add(name, _entry(encoding, stored))
    return contents


def _entry(fields: Fields, stored: bool) -> TensorRange | int:
    bits = fields.bits("bw")
    dtype = fields.text("dtype").upper() if "dtype" in fields else "INT"
    if dtype in ("FLOAT", "FP"):
        return bits
    if dtype != "INT":
        raise TableError(f"dtype {dtype!r}: expected 'INT' or 'FLOAT'")
    if "zero_point_shift" in fields and fields.numbers("zero_point_shift").any():
        raise TableError("has zero points between two codes, which no integer type can have")
    scale, symmetric = fields.numbers("scale").reshape(-1), fields.flag("is_sym")
    kind = fields.text("enc_type") if "enc_type" in fields else _TYPES[scale.size > 1]
    offset = np.full(scale.shape, -(2.0 ** (bits - 1)))
    if "offset" in fields or not symmetric:
        offset = fields.numbers("offset").reshape(-1)
    if kind == "PER_TENSOR":
        if scale.size != 1 or offset.size != 1:
            raise TableError(f"is {kind} and has {scale.size} scales, {offset.size} offsets")
        return on_grid(scale.reshape(()), offset.reshape(()), bits, symmetric, stored=stored)
    if kind == "PER_CHANNEL":
        return on_grid(scale, offset, bits, symmetric, stored=stored)
    if kind == "PER_BLOCK":
        size = fields.integer("block_size")
        return on_grid(scale, offset, bits, symmetric, block_size=size, stored=stored)
    if kind == "LPBQ":
        return _low_power(fields, scale, bits, stored)
    raise TableError(f"enc_type {kind!r}: expected one of {', '.join(_TYPES)}")


def _low_power(fields: Fields, channel_scale: Array, bits: int, stored: bool) -> TensorRange:
    multiples = fields.numbers("per_block_int_scale").reshape(-1)
    channels, code_bits = channel_scale.size, fields.bits("compressed_bw")
    if not channels or not multiples.size or multiples.size % channels:
        raise TableError(f"has {multiples.size} block scales for {channels} channels")
    check_multiples(multiples)
    scale = (channel_scale[:, None] * multiples.reshape(channels, -1)).reshape(-1)
    return on_grid(
        scale,
        np.full(scale.shape, -(2.0 ** (code_bits - 1))),
        code_bits,
        symmetric=True,
        block_size=fields.integer("block_size"),
        stored=stored,
        lpbq=Lpbq(cast(channel_scale, "float32"), bits),
    )


def check_multiples(multiples: Array) -> None:
    """Refuse what no block's scale can be a multiple by.

    Raises:
        TableError: a multiple is no whole number from 1 to 65535.
    """
    wrong = ~((multiples >= 1) & (multiples < 2**16) & (multiples == np.trunc(multiples)))
    if wrong.any():
        raise TableError(f"block scale {multiples[wrong].flat[0]:g}: expected 1 … 65535")


def write(contents: Contents) -> bytes:
    """Return the file."""
    document: dict[str, object] = {"version": "1.0.0"}
    for section, stored in SECTIONS.items():
        said: list[dict[str, object]] = []
        for name, entry in sorted(contents.ranges.items()):
            if entry.stored == stored:
                with at_tensor(name):
                    said.append({"name": name, **_plain(entry)})
        if not stored:
            said += [
                {"name": name, "bw": bits, "dtype": "FLOAT", "enc_type": "PER_TENSOR"}
                for name, bits in sorted(contents.floating.items())
            ]
        document[section] = said
    return render(document)


def _plain(entry: TensorRange) -> dict[str, object]:
    dtype = require_integers(entry, FORM)
    assert entry.scale is not None
    kind = "PER_TENSOR" if entry.scale.ndim == 0 else "PER_CHANNEL"
    said: dict[str, object] = {"dtype": "INT", "bw": dtype.bits, "is_sym": is_symmetric(entry)}
    scale, offset = entry.scale, offsets(entry)
    if entry.block_size is not None:
        kind = "PER_BLOCK" if entry.lpbq is None else "LPBQ"
        said["block_size"] = entry.block_size
        scale, offset = (_channels_first(array, entry.axis) for array in (scale, offset))
    if entry.lpbq is not None:
        said |= {"compressed_bw": dtype.bits, "bw": entry.lpbq.bits}
        said["per_block_int_scale"] = (
            _channels_first(multiples(entry, entry.lpbq), entry.axis).reshape(-1).tolist()
        )
        scale = entry.lpbq.channel_scale.reshape(-1)
        offset = np.full(scale.shape, -(2 ** (entry.lpbq.bits - 1)))
    said |= {"scale": scale.reshape(-1).tolist(), "offset": offset.reshape(-1).tolist()}
    return {"enc_type": kind, **said}


def multiples(entry: TensorRange, lpbq: Lpbq) -> Array:
    """Return by what the channel's scale is multiplied in each block, int64."""
    assert entry.scale is not None
    if entry.scale.ndim == 1:
        channel = np.repeat(lpbq.channel_scale, entry.scale.size // lpbq.channel_scale.size)
    else:
        channel = lpbq.channel_scale
    whole: Array = np.rint(entry.scale.astype(np.float64) / channel).astype(np.int64)
    return whole


def _channels_first(array: Array, block_axis: int | None) -> Array:
    return array.T if array.ndim == 2 and block_axis in (0, -2) else array
