"""TensorRT's own calibration cache: a header, then ``name: scale`` with the float32's bits in hex.

The header names the release, 8.4.1 here, and the calibrator; a release that asks for its own number
calibrates anew unless it is put there. onnxruntime's TensorRT provider cuts such a line at its
first colon; a network whose names hold colons is better given to it as flatbuffers.

Source: NVIDIA TensorRT developer guide, "INT8 calibration"; ``ReadDynamicRange`` of onnxruntime's
TensorRT provider, which multiplies the scale by 127.
"""

from __future__ import annotations

import re
import struct

from qwrap.errors import TableError
from qwrap.quant.tables.absolute_maximum import from_scale, scale_of
from qwrap.quant.tables.contents import Contents, one_line, per_tensor
from qwrap.quant.tables.document import at, decode, shorten

HEADER = "TRT-8401-EntropyCalibration2"
MAGIC = b"TRT-"
_BITS = re.compile(r"[0-9a-fA-F]{1,8}")


def read(data: bytes) -> Contents:
    """Return what the file holds."""
    header, *lines = decode(data).split("\n")
    if not header.startswith("TRT-"):
        raise TableError(f"begins with {shorten(header)}; expected a header like {HEADER}")
    contents = Contents()
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        name, _, value = line.rpartition(":")
        with at(f"line {number}"):
            if not name:
                raise TableError(f"{shorten(line)}: expected a name, a colon and a scale")
            contents.add(name, from_scale(_number(value.strip())))
    return contents


def write(contents: Contents) -> bytes:
    """Return the cache; weights are left out, for TensorRT chooses their scales itself."""
    contents.refuse_floating("TensorRT's cache")
    entries = dict(contents.activations())
    one_line(entries, "TensorRT's cache")
    lines = [
        f"{name}: {_bits(scale_of(per_tensor(name, entry, 'TensorRT cache')))}\n"
        for name, entry in entries.items()
    ]
    return "".join([f"{HEADER}\n", *lines]).encode()


def _bits(scale: float) -> str:
    return f"{int.from_bytes(struct.pack('>f', scale), 'big'):x}"


def _number(bits: str) -> float:
    if not _BITS.fullmatch(bits):
        raise TableError(f"{shorten(bits)}: expected the bits of a float32 in hexadecimal")
    (scale,) = struct.unpack(">f", int(bits, 16).to_bytes(4, "big"))
    return float(scale)
