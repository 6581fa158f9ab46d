"""A table of latencies as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwrap.errors import ConfigError, TableError
from qwrap.mixed.choices import Choice, Edge
from qwrap.mixed.cost.origin import Origin
from qwrap.mixed.document import write_document

FORMAT, VERSION = "qwrap latencies", 1


@dataclass(frozen=True, slots=True)
class Content:
    """All that a file holds; see ``LatencyTable``."""

    seconds: dict[tuple[str, Choice], float]
    edges: list[Edge]
    constant: float
    origin: Origin
    timed: list[tuple[dict[str, Choice], float]]
    took: float


def write(path: Path, content: Content) -> None:
    """Write a file, all of it or nothing.

    Raises:
        ExportError: the folder does not exist or cannot be written to.
    """
    groups: dict[str, dict[str, float]] = {}
    for (name, choice), seconds in content.seconds.items():
        groups.setdefault(name, {})[str(choice)] = seconds
    document = {
        "format": FORMAT,
        "version": VERSION,
        "origin": asdict(content.origin),
        "took": content.took,
        "constant": content.constant,
        "groups": groups,
        "edges": [_plain_edge(edge) for edge in content.edges],
        "timed": [
            {"assignment": {n: str(c) for n, c in mix.items()}, "seconds": seconds}
            for mix, seconds in content.timed
        ],
    }
    write_document(path, document)


def _plain_edge(edge: Edge) -> dict[str, Any]:
    return {
        "tensor": edge.tensor,
        "producer": edge.producer,
        "consumers": list(edge.consumers),
        "costs": [[*pair, seconds] for pair, seconds in edge.costs.items()],
    }


def read(path: Path) -> Content:
    """Read a file; nothing in it is executed.

    Raises:
        TableError: it cannot be read, is damaged, of another kind or of a later version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return _content(document)
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise TableError(f"{path}: is no JSON text: {error}") from error
    except (TableError, ConfigError) as error:
        raise TableError(f"{path}: {error}") from error


def _content(document: Any) -> Content:
    top = _map(document, "the file")
    if top.get("format") != FORMAT:
        raise TableError(f"is no table of latencies: its format is {top.get('format')!r}")
    if top.get("version") != VERSION:
        raise TableError(f"is of version {top.get('version')!r}; this qwrap reads {VERSION}")
    seconds = {
        (name, Choice.parse(_text(choice))): _number(value, f"group {name!r}")
        for name, choices in _map(top.get("groups"), "groups").items()
        for choice, value in _map(choices, f"group {name!r}").items()
    }
    names = {name for name, _ in seconds}
    timed = []
    for entry in _list(top.get("timed"), "timed"):
        item = _map(entry, "timed")
        mix = _map(item.get("assignment"), "assignment")
        chosen = {name: Choice.parse(_text(choice)) for name, choice in mix.items()}
        timed.append((chosen, _number(item.get("seconds"), "timed")))
    return Content(
        seconds,
        [_edge(entry, names) for entry in _list(top.get("edges"), "edges")],
        _number(top.get("constant"), "constant"),
        Origin.from_dict(top.get("origin")),
        timed,
        _number(top.get("took"), "took"),
    )


def _edge(entry: Any, names: set[str]) -> Edge:
    item = _map(entry, "edge")
    tensor = _text(item.get("tensor"))
    ends = [item.get("producer"), *_list(item.get("consumers"), f"edge {tensor!r}")]
    for end in ends:
        if end is not None and end not in names:
            raise TableError(f"edge {tensor!r}: there is no group {end!r}")
    costs = dict(_costs(item, tensor))
    return Edge(tensor, ends[0], tuple(ends[1:]), costs)


def _costs(item: Mapping[str, Any], tensor: str) -> Iterator[tuple[tuple[str, str], float]]:
    for row in _list(item.get("costs"), f"edge {tensor!r}"):
        parts = _list(row, f"edge {tensor!r}")
        if len(parts) != 3:
            raise TableError(f"edge {tensor!r}: expected [type, type, seconds], got {parts!r}")
        yield (_text(parts[0]), _text(parts[1])), _number(parts[2], f"edge {tensor!r}")


def _map(content: Any, what: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise TableError(f"{what}: expected an object, got {type(content).__name__}")
    return content


def _list(content: Any, what: str) -> list[Any]:
    if not isinstance(content, list):
        raise TableError(f"{what}: expected a list, got {type(content).__name__}")
    return content


def _text(content: Any) -> str:
    if not isinstance(content, str):
        raise TableError(f"expected a text, got {content!r}")
    return content


def _number(content: Any, what: str) -> float:
    number = isinstance(content, int | float) and not isinstance(content, bool)
    if not number or not math.isfinite(content) or content < 0:
        raise TableError(f"{what}: expected seconds, got {content!r}")
    return float(content)
