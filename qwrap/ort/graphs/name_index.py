"""Where in a repeated field of a message the element of a name is, without a scan a question."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableSequence
from typing import Any, Generic, TypeVar

Named = TypeVar("Named", bound=Any)  # a message with a ``name``


class NameIndex(Generic[Named]):
    """Finds elements of a repeated field by name; the first one where several bear a name.

    The field may be changed by others between two questions: what is found is looked at before it
    is returned, and another length or another last element has the field read again (from where
    it grew). Only a rename in place, without any other change, goes unseen until ``forget``.
    """

    def __init__(self, field: Callable[[], MutableSequence[Named]]) -> None:
        """Index what ``field`` returns, which stays the owner of its elements."""
        self._get = field
        self._positions: dict[str, int] = {}
        self._length = 0
        self._last = ""

    @property
    def _field(self) -> MutableSequence[Named]:
        return self._get()

    def position(self, name: str) -> int | None:
        """Return where the element ``name`` is."""
        self._refresh()
        found = self._positions.get(name)
        if found is not None and self._field[found].name != name:
            self.forget()
            self._refresh()
            found = self._positions.get(name)
        return found

    def get(self, name: str) -> Named | None:
        """Return the element ``name``."""
        position = self.position(name)
        return None if position is None else self._field[position]

    def __contains__(self, name: str) -> bool:
        return self.position(name) is not None

    def forget(self) -> None:
        """Have the field read anew at the next question."""
        self._positions, self._length, self._last = {}, 0, ""

    def discard(self, elements: Iterable[Named]) -> list[Named]:
        """Remove from the field, in place, each of ``elements`` that it holds; return those."""
        found = []
        for element in elements:
            position = self.position(element.name)
            if position is not None and self._field[position] == element:
                found.append((position, element))
        field = self._field
        for position in sorted({position for position, _ in found}, reverse=True):
            del field[position]
        self.forget()
        return [element for _, element in found]

    def _refresh(self) -> None:
        field = self._field
        length = len(field)
        if length < self._length or (self._length and field[self._length - 1].name != self._last):
            self.forget()
        if length == self._length:
            return
        for position in range(self._length, length):
            self._positions.setdefault(field[position].name, position)
        self._length, self._last = length, field[length - 1].name
