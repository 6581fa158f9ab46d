"""What the benchmark of accuracy measured, kept in a JSON file so that a run can go on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from results import FileResult


@dataclass(frozen=True, slots=True, order=True)
class Way:
    """A tool, and how hard it tries: one of ``file_order.EFFORTS``."""

    tool: str
    effort: str

    @property
    def label(self) -> str:
        """Its name in a table; onnxruntime's tool has one way alone."""
        return self.tool if self.tool == "onnxruntime" else f"{self.tool} {self.effort}"


@dataclass(slots=True, kw_only=True)
class Cell:
    """One way of quantizing one model to one setting.

    Attributes:
        model: its name.
        setting: "W8A8" and so on.
        tool: "qwrap", "onnxruntime" or a rival.
        effort: how hard it tried.
        samples: calibration samples.
        version: of the tool.
        file: what was made, with its metric, seconds and peak of memory.
        coded: share of the float file's constant values that stand as integers.
        notes: what the tool says it did.
    """

    model: str
    setting: str
    tool: str
    effort: str
    samples: int
    file: FileResult
    version: str = ""
    coded: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def way(self) -> Way:
        """Tool and effort."""
        return Way(self.tool, self.effort)


class Results:
    """Float files and cells of one benchmark, in a file if one is given.

    Args:
        path: JSON to go on from if it is there, and to write after every change.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._settings: dict[str, Any] = {}
        self.references: dict[str, FileResult] = {}
        self._cells: dict[tuple[str, str, Way], Cell] = {}
        if path is not None and path.exists():
            self._read(json.loads(path.read_text(encoding="utf-8")))

    @property
    def cells(self) -> list[Cell]:
        """All cells, in the order in which they came."""
        return list(self._cells.values())

    def find(self, model: str, setting: str, way: Way) -> Cell | None:
        """What one way made of one model, if it has been measured."""
        return self._cells.get((model, setting, way))

    def of(self, model: str, setting: str | None = None) -> list[Cell]:
        """The cells of one model, in one setting or all."""
        return [
            cell for cell in self.cells if cell.model == model and setting in (None, cell.setting)
        ]

    def put(self, cells: Iterable[Cell]) -> None:
        """Take cells in, each in the place of an earlier one of its kind, and write the file."""
        for cell in cells:
            self._cells[cell.model, cell.setting, cell.way] = cell
        self.write()

    def describe(self, **settings: Any) -> None:
        """Say what the file's figures were measured with."""
        self._settings = settings

    def write(self) -> None:
        """Write the file, whole or not at all."""
        if self._path is None:
            return
        record = {
            "settings": self._settings,
            "references": {name: asdict(file) for name, file in self.references.items()},
            "cells": [asdict(cell) for cell in self.cells],
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(".partial")
        scratch.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        scratch.replace(self._path)

    def _read(self, record: dict[str, Any]) -> None:
        self._settings = record["settings"]
        self.references = {name: FileResult(**file) for name, file in record["references"].items()}
        for entry in record["cells"]:
            cell = Cell(**{**entry, "file": FileResult(**entry["file"])})
            self._cells[cell.model, cell.setting, cell.way] = cell
