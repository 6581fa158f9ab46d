"""What was measured so far, so that a long analysis can be interrupted and taken up again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwrap.errors import StatisticsError
from qwrap.graph.save import check_target, replace_text

FORMAT, VERSION = "qwrap unfinished sensitivity", 1
SECONDS = 30.0  # between two writings


@dataclass(slots=True)
class Tally:
    """Sums over the batches that one trial has seen.

    Attributes:
        batches: how many.
        errors: for each output, the distance added up.
        scales: for each output, what it is relative to, added up.
    """

    batches: int = 0
    errors: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)

    def add(self, pairs: list[tuple[float, float]]) -> None:
        """Add a batch, in place: distance and scale of each output."""
        if not self.batches:
            self.errors, self.scales = [0.0] * len(pairs), [0.0] * len(pairs)
        self.batches += 1
        for i, (error, scale) in enumerate(pairs):
            self.errors[i] += error
            self.scales[i] += scale

    @property
    def loss(self) -> float:
        """The mean over outputs of distance over scale; outputs that are zero do not count."""
        pairs = zip(self.errors, self.scales, strict=True)
        parts = [error / scale for error, scale in pairs if scale > 0]
        return sum(parts) / len(parts) if parts else 0.0


class Book:
    """The tallies of an analysis, in a file if there is one.

    Args:
        path: where to keep them, None for nowhere; a file there is read.
        settings: what they depend on, JSON-able; those in the file have to be equal.

    Raises:
        StatisticsError: the file is damaged, or of another analysis.
        ExportError: the folder does not exist or cannot be written to.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._settings = dict(settings)
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._written = time.monotonic()
        if self._path is not None:
            check_target(self._path)
            if self._path.exists():
                self._read(self._path)

    def tally(self, trial: str, choice: str) -> Tally:
        """Return the tally of a trial, an empty one at first; it may be added to."""
        return self._tallies.setdefault((trial, choice), Tally())

    def write(self, *, now: bool = True) -> None:
        """Write the file; unless ``now``, only if the last time is half a minute ago."""
        if self._path is None or not (now or time.monotonic() - self._written > SECONDS):
            return
        content = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self._settings,
            "tallies": [
                [*key, tally.batches, tally.errors, tally.scales]
                for key, tally in self._tallies.items()
                if tally.batches
            ],
        }
        text = json.dumps(content)
        replace_text(self._path, text)
        self._written = time.monotonic()

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known = content["format"], content["version"]
            settings = content["settings"]
            tallies = {
                (str(trial), str(choice)): Tally(int(n), [*map(float, a)], [*map(float, b)])
                for trial, choice, n, a, b in content["tallies"]
            }
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StatisticsError(f"{path}: cannot be taken up again: {error!r}") from error
        if known != (FORMAT, VERSION):
            raise StatisticsError(f"{path}: no analysis that this qwrap began: {known}")
        mine = json.loads(json.dumps(self._settings))
        other = [name for name, value in mine.items() if settings.get(name) != value]
        if other:
            raise StatisticsError(
                f"{path}: is of another analysis, by {', '.join(other)}; name another file, or "
                "remove this one"
            )
        self._tallies = tallies
