"""``table TrtTable { dict: [KeyValue]; }``, with the names that flatc generates."""

from __future__ import annotations

from typing import Any

from qwrap.ort.CalTableFlatBuffers.KeyValue import KeyValue

_DICT = 4  # offset of the field in the table of fields
_OFFSET_SIZE = 4  # bytes


class TrtTable:
    """Reads a table."""

    __slots__ = ("_tab",)

    @classmethod
    def GetRootAs(cls, buf: bytes | bytearray, offset: int = 0) -> TrtTable:
        """Return the table that ``buf`` holds from ``offset`` on."""
        from flatbuffers import encode, packer  # only readers of tables need it

        table = cls()
        table.Init(buf, encode.Get(packer.uoffset, buf, offset) + offset)
        return table

    @classmethod
    def GetRootAsTrtTable(cls, buf: bytes | bytearray, offset: int = 0) -> TrtTable:
        """Return what ``GetRootAs`` does."""
        return cls.GetRootAs(buf, offset)

    def Init(self, buf: bytes | bytearray, pos: int) -> None:
        """Read the table at ``pos`` of ``buf``, in place."""
        from flatbuffers.table import Table

        self._tab = Table(buf, pos)

    def Dict(self, j: int) -> KeyValue | None:
        """Return entry ``j``, None if the table has no entries at all."""
        offset = self._tab.Offset(_DICT)
        if not offset:
            return None
        entry = KeyValue()
        place = self._tab.Indirect(self._tab.Vector(offset) + j * _OFFSET_SIZE)
        entry.Init(self._tab.Bytes, place)
        return entry

    def DictLength(self) -> int:
        """Return how many entries there are."""
        offset = self._tab.Offset(_DICT)
        return self._tab.VectorLen(offset) if offset else 0

    def DictIsNone(self) -> bool:
        """Whether the table has no entries at all."""
        return not self._tab.Offset(_DICT)


def Start(builder: Any) -> None:
    """Begin the table; its entries must have been made before."""
    builder.StartObject(1)


def AddDict(builder: Any, dict: int) -> None:  # noqa: A002  # the name that flatc gives it
    """Give the table its entries, an offset from ``EndVector``."""
    builder.PrependUOffsetTRelativeSlot(0, dict, 0)


def StartDictVector(builder: Any, numElems: int) -> int:
    """Begin the entries, which are to be prepended from the last to the first."""
    offset: int = builder.StartVector(_OFFSET_SIZE, numElems, _OFFSET_SIZE)
    return offset


def End(builder: Any) -> int:
    """End the table; return its offset."""
    offset: int = builder.EndObject()
    return offset


TrtTableStart, TrtTableAddDict, TrtTableEnd = Start, AddDict, End
TrtTableStartDictVector = StartDictVector
