"""Strict reading of JSON: one error for whatever is wrong, and it says where."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwrap.errors import TableError

Array = NDArray[Any]
BOM = b"\xef\xbb\xbf"


@contextmanager
def at(where: str) -> Iterator[None]:
    """Put ``where`` before the message of a ``TableError`` that the ``with`` block raises."""
    try:
        yield
    except TableError as error:
        raise TableError(f"{where}: {error}") from error


def at_tensor(name: str) -> AbstractContextManager[None]:
    """Put the name of a tensor before the message of a ``TableError``."""
    return at(f"tensor {shorten(name, 200)}")


def decode(data: bytes) -> str:
    """Return the text of a file; a byte order mark is part of it.

    Raises:
        TableError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TableError(f"is not UTF-8 text ({error.reason} at byte {error.start})") from error


def parse(data: bytes) -> object:
    """Return what a JSON file says.

    Raises:
        TableError: it is not JSON, is nested too deeply, or an object says a name twice.
    """
    text = decode(data.removeprefix(BOM))
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise TableError("is nested too deeply to be a table") from error
    except ValueError as error:
        raise TableError(f"is not JSON ({error})") from error


def render(content: object, indent: int | None = 2) -> bytes:
    """Return ``content`` as a JSON file."""
    return (json.dumps(content, indent=indent) + "\n").encode()


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise TableError(f"{shorten(name, 200)} is there twice in one object")
        found[name] = value
    return found


class Fields:
    """A JSON object whose fields are read by name and type."""

    def __init__(self, value: object) -> None:
        if not isinstance(value, dict):
            raise TableError(f"expected an object; got {shorten(value)}")
        self.values: dict[str, object] = value

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str) -> object:
        """Return a field as it is.

        Raises:
            TableError: there is none.
        """
        if name not in self.values:
            raise TableError(f"has no {name!r}; it has {listed(self.values)}")
        return self.values[name]

    def inner(self, name: str) -> Fields:
        """Return a field that is an object."""
        with at(repr(name)):
            return Fields(self.get(name))

    def sequence(self, name: str) -> list[object]:
        """Return a field that is a list."""
        value = self.get(name)
        if not isinstance(value, list):
            raise TableError(f"{name!r} is {shorten(value)}; expected a list")
        return value

    def text(self, name: str) -> str:
        """Return a field that is a string."""
        value = self.get(name)
        if not isinstance(value, str):
            raise TableError(f"{name!r} is {shorten(value)}; expected a string")
        return value

    def integer(self, name: str) -> int:
        """Return a field that is a whole number, also where it is written as 8.0."""
        value = self.get(name)
        whole = isinstance(value, float) and value.is_integer()
        if isinstance(value, bool) or not (whole or isinstance(value, int)):
            raise TableError(f"{name!r} is {shorten(value)}; expected a whole number")
        assert isinstance(value, (int, float))
        return int(value)

    def bits(self, name: str) -> int:
        """Return a field that is the width of a number type."""
        value = self.integer(name)
        if not 1 <= value <= 64:
            raise TableError(f"{name!r} is {shorten(value)}; expected a number of bits")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a field that is true or false, or says so in a string."""
        value = self.values.get(name, default)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise TableError(f"{name!r} is {shorten(value)}; expected true or false")
        return value

    def numbers(self, name: str) -> Array:
        """Return a field that is a number or a nested list of numbers, in float64."""
        with at(repr(name)):
            return numbers(self.get(name))


def numbers(value: object) -> Array:
    """Return a number, or a nested list of numbers, in float64.

    Raises:
        TableError: it is something else, or ragged.
    """
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError, RecursionError) as error:
        raise TableError(f"expected numbers; got {shorten(value)}") from error
    if array.dtype.kind not in "iuf" and array.size:
        raise TableError(f"expected numbers; got {shorten(value)}")
    return array.astype(np.float64)


def cast(array: Array, dtype: str) -> Array:
    """Return numbers in another type.

    Raises:
        TableError: one is too large for it, or has a fraction that it cannot hold.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype)
    lost = np.isfinite(array) & ~np.isfinite(result)
    if result.dtype.kind in "iu":
        lost = array != result
    if lost.any():
        raise TableError(f"{float(array[lost].flat[0]):g} is no {dtype}")
    return result


def listed(names: Iterable[str]) -> str:
    """Return names as messages show them, the first few of many."""
    first = sorted(names)
    shown = ", ".join(shorten(name) for name in first[:8])
    return shown + (f", … ({len(first)} in all)" if len(first) > 8 else "")


def shorten(value: object, limit: int = 60) -> str:
    """Return ``value`` as messages show it, in at most ``limit`` characters or so."""
    if isinstance(value, (dict, list)):
        return f"a {'list' if isinstance(value, list) else 'object'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
