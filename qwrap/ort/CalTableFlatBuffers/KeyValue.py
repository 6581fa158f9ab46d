"""``table KeyValue { key: string; value: string; }``, with the names that flatc generates."""

from __future__ import annotations

from typing import Any


class KeyValue:
    """Reads one entry of a table."""

    __slots__ = ("_tab",)

    @classmethod
    def GetRootAs(cls, buf: bytes | bytearray, offset: int = 0) -> KeyValue:
        """Return the entry that ``buf`` holds from ``offset`` on."""
        from flatbuffers import encode, packer  # only readers of tables need it

        entry = cls()
        entry.Init(buf, encode.Get(packer.uoffset, buf, offset) + offset)
        return entry

    @classmethod
    def GetRootAsKeyValue(cls, buf: bytes | bytearray, offset: int = 0) -> KeyValue:
        """Return what ``GetRootAs`` does."""
        return cls.GetRootAs(buf, offset)

    def Init(self, buf: bytes | bytearray, pos: int) -> None:
        """Read the entry at ``pos`` of ``buf``, in place."""
        from flatbuffers.table import Table

        self._tab = Table(buf, pos)

    def Key(self) -> bytes | None:
        """Return the tensor's name in UTF-8, None if there is none."""
        return self._text(4)

    def Value(self) -> bytes | None:
        """Return the number as text, None if there is none."""
        return self._text(6)

    def _text(self, field: int) -> bytes | None:
        offset = self._tab.Offset(field)
        found: bytes | None = self._tab.String(offset + self._tab.Pos) if offset else None
        return found


def Start(builder: Any) -> None:
    """Begin an entry; its texts must have been made before."""
    builder.StartObject(2)


def AddKey(builder: Any, key: int) -> None:
    """Give the entry its name, an offset from ``CreateString``."""
    builder.PrependUOffsetTRelativeSlot(0, key, 0)


def AddValue(builder: Any, value: int) -> None:
    """Give the entry its number, an offset from ``CreateString``."""
    builder.PrependUOffsetTRelativeSlot(1, value, 0)


def End(builder: Any) -> int:
    """End the entry; return its offset."""
    offset: int = builder.EndObject()
    return offset


KeyValueStart, KeyValueAddKey, KeyValueAddValue, KeyValueEnd = Start, AddKey, AddValue, End
