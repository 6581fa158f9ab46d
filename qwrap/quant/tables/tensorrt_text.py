"""The table for TensorRT that onnxruntime writes as text: a line ``name maximum`` for each tensor.

Source: ``write_calibration_table`` of onnxruntime.quantization.quant_utils, which writes the larger
of both ends; here it is the larger absolute value, which is what TensorRT takes it for.
"""

from __future__ import annotations

from qwrap.errors import TableError
from qwrap.quant.tables.absolute_maximum import from_maximum, maximum_of
from qwrap.quant.tables.contents import Contents, one_line, per_tensor
from qwrap.quant.tables.document import at, decode, shorten


def read(data: bytes) -> Contents:
    """Return what the file holds."""
    contents = Contents()
    for number, line in enumerate(decode(data).split("\n"), 1):
        if not line.strip():
            continue
        name, _, value = line.rpartition(" ")
        with at(f"line {number}"):
            if not name:
                raise TableError(f"{shorten(line)}: expected a name, a space and a number")
            contents.add(name, from_maximum(decimal(value)))
    return contents


def write(contents: Contents) -> bytes:
    """Return the table; weights are left out, for TensorRT chooses their scales itself."""
    contents.refuse_floating("TensorRT's table")
    entries = dict(contents.activations())
    one_line(entries, "TensorRT's table")
    lines = [
        f"{name} {maximum_of(per_tensor(name, entry, 'TensorRT table'))}\n"
        for name, entry in entries.items()
    ]
    return "".join(lines).encode()


def decimal(text: str) -> float:
    """Return the number that a text says.

    Raises:
        TableError: it says none.
    """
    try:
        if "_" not in text:  # which Python would take
            return float(text)
    except ValueError:
        pass
    raise TableError(f"{shorten(text)}: expected a number")
