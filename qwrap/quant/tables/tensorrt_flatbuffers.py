"""The table for TensorRT that onnxruntime writes as flatbuffers, and its provider reads.

``TrtTable {dict: [KeyValue {key: string, value: string}]}``, absolute maxima as decimal numbers.

Source: ``write_calibration_table`` of onnxruntime.quantization.quant_utils and the schema
``ort_trt_int8_cal_table.fbs``. Files are read with every offset checked, which the flatbuffers
package leaves to its user.
"""

from __future__ import annotations

import flatbuffers

from qwrap.errors import TableError
from qwrap.quant.tables.absolute_maximum import from_maximum, maximum_of
from qwrap.quant.tables.contents import Contents, per_tensor
from qwrap.quant.tables.document import at, at_tensor
from qwrap.quant.tables.tensorrt_text import decimal

WORD = 4  # bytes of an offset or a length


def write(contents: Contents) -> bytes:
    """Return the table; weights are left out, for TensorRT chooses their scales itself."""
    contents.refuse_floating("TensorRT's table")
    builder = flatbuffers.Builder(1024)
    pairs = []
    for name, entry in contents.activations():
        value = str(maximum_of(per_tensor(name, entry, "TensorRT's table")))
        texts = builder.CreateString(name), builder.CreateString(value)
        builder.StartObject(len(texts))
        for slot, text in enumerate(texts):
            builder.PrependUOffsetTRelativeSlot(slot, text, 0)
        pairs.append(builder.EndObject())
    builder.StartVector(WORD, len(pairs), WORD)
    for pair in pairs:
        builder.PrependUOffsetTRelative(pair)
    vector = builder.EndVector()
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, vector, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())


def read(data: bytes) -> Contents:
    """Return what the file holds."""
    buffer = Buffer(data)
    contents = Contents()
    for index, pair in enumerate(buffer.tables(buffer.follow(0), slot=0)):
        with at(f"entry {index}"):
            name, value = (buffer.text(pair, slot) for slot in (0, 1))
        with at_tensor(name):
            contents.add(name, from_maximum(decimal(value)))
    return contents


class Buffer:
    """Flatbuffers whose every offset is checked before it is followed."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._unread = len(data)  # bytes of texts: a sound file holds each of them once

    def tables(self, table: int, slot: int) -> list[int]:
        """Return where the tables of a vector field begin."""
        field = self._field(table, slot)
        if field is None:
            raise TableError("is broken or no table: it has no entries")
        start = self.follow(field)
        count = self._word(start)
        self._require(start + WORD, count * WORD)
        return [self.follow(start + WORD * (1 + i)) for i in range(count)]

    def text(self, table: int, slot: int) -> str:
        """Return a string field."""
        field = self._field(table, slot)
        if field is None:
            raise TableError("lacks its key or value")
        start = self.follow(field)
        size = self._word(start)
        self._require(start + WORD, size)
        self._unread -= size
        if self._unread < 0:
            raise TableError("is broken: its texts lie over each other")
        try:
            return self._data[start + WORD : start + WORD + size].decode()
        except UnicodeDecodeError as error:
            raise TableError(f"is not UTF-8 text ({error.reason})") from error

    def follow(self, position: int) -> int:
        """Return where the offset at ``position`` points to."""
        offset = self._word(position)
        if offset < WORD:
            raise TableError(f"is broken: the offset at byte {position} is {offset}")
        target = position + offset
        self._require(target, WORD)
        return target

    def _field(self, table: int, slot: int) -> int | None:
        """Return where a field of a table is; None if the table lacks it."""
        self._require(table, WORD)
        back = int.from_bytes(self._data[table : table + WORD], "little", signed=True)
        layout = table - back
        size = self._short(layout)
        if size < WORD:
            raise TableError(f"is broken: the table at byte {table} has a layout of {size} bytes")
        entry = WORD + 2 * slot
        offset = self._short(layout + entry) if entry < size else 0
        return table + offset if offset else None

    def _word(self, position: int) -> int:
        self._require(position, WORD)
        return int.from_bytes(self._data[position : position + WORD], "little")

    def _short(self, position: int) -> int:
        self._require(position, 2)
        return int.from_bytes(self._data[position : position + 2], "little")

    def _require(self, position: int, size: int) -> None:
        if position < 0 or position + size > len(self._data):
            raise TableError(
                f"is broken or cut off: it points to bytes {position} … {position + size} and has "
                f"{len(self._data)}"
            )
