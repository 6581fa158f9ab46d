"""What a search has found so far, in a file, so that it can be interrupted and goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwrap.errors import QwrapError, StatisticsError
from qwrap.graph.save import check_target, replace_text
from qwrap.mixed.choices import Assignment, Choice
from qwrap.mixed.search.linear import LinearCost
from qwrap.mixed.search.pareto import Measured, Point

FORMAT, VERSION = "qwrap unfinished search", 1


class State:
    """Steps of a search that are done, by name, in a file if there is one.

    Args:
        path: the file, None for none; one that exists is read.
        settings: what all steps depend on, JSON-able; those in the file have to be equal.

    Raises:
        StatisticsError: the file is damaged, or of another search.
        ExportError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._settings = json.loads(json.dumps(settings))
        self._steps: dict[str, Any] = {}
        if self._path is not None:
            check_target(self._path)
            if self._path.exists():
                self._read(self._path)

    def step(
        self,
        name: str,
        do: Callable[[], Any],
        *,
        read: Callable[[Any], Any] = lambda x: x,
        write: Callable[[Any], Any] = lambda x: x,
    ) -> Any:
        """Return what a step found: ``read`` from the file if it was done, else what ``do`` does.

        Args:
            name: of the step.
            do: returns what is found.
            read: makes it of what ``write`` returned.
            write: makes something JSON-able of it.
        """
        if name in self._steps:
            try:
                return read(self._steps[name])
            except (KeyError, TypeError, ValueError, QwrapError) as error:
                raise StatisticsError(f"{self._path}: step {name!r} is damaged: {error}") from error
        found = do()
        self._steps[name] = write(found)
        self._write()
        return found

    def measured(self, what: Assignment | str, do: Callable[[], Measured]) -> Measured:
        """Return what was measured of an assignment or something else, or what ``do`` measures."""
        if isinstance(what, str):
            listed = what
        else:
            listed = json.dumps(sorted((name, str(choice)) for name, choice in what.items()))

        name = f"point {listed}"
        found = self.step(name, do, read=measured_from_json, write=measured_to_json)
        assert isinstance(found, Measured)
        return found

    def _write(self) -> None:
        if self._path is None:
            return
        content = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self._settings,
            "steps": self._steps,
        }
        text = json.dumps(content, indent=1) + "\n"
        replace_text(self._path, text)

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known = content["format"], content["version"]
            settings, steps = dict(content["settings"]), dict(content["steps"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StatisticsError(
                f"{path}: cannot be taken up again: {error!r}; remove it, or name another file"
            ) from error
        if known != (FORMAT, VERSION):
            raise StatisticsError(f"{path}: no search that this qwrap began: {known}")
        names = sorted({*settings, *self._settings})
        other = [name for name in names if settings.get(name) != self._settings.get(name)]
        if other:
            raise StatisticsError(
                f"{path}: is of another search, by {', '.join(other)}; name another file, or "
                "remove this one"
            )
        self._steps = steps


# --- values as JSON ------------------------------------------------------------------------------


def costs_to_json(costs: Mapping[tuple[str, Choice], float]) -> list[list[Any]]:
    """Return losses or costs by group and choice as JSON-able lists."""
    return [[name, str(choice), value] for (name, choice), value in costs.items()]


def costs_from_json(content: Any) -> dict[tuple[str, Choice], float]:
    """Return what ``costs_to_json`` was given."""
    return {(str(name), Choice.parse(choice)): float(value) for name, choice, value in content}


def cost_to_json(cost: LinearCost) -> dict[str, Any]:
    """Return a cost without edges as a JSON-able dictionary."""
    return {"name": cost.name, "of": costs_to_json(cost.of), "fixed": cost.fixed}


def cost_from_json(content: Any) -> LinearCost:
    """Return what ``cost_to_json`` was given."""
    return LinearCost(
        name=str(content["name"]),
        of=costs_from_json(content["of"]),
        fixed=float(content["fixed"]),
    )


def measured_to_json(found: Measured) -> dict[str, Any]:
    """Return what was measured as a JSON-able dictionary."""
    return {"loss": found.loss, "metric": found.metric}


def measured_from_json(content: Any) -> Measured:
    """Return what ``measured_to_json`` was given."""
    metric = content["metric"]
    return Measured(loss=float(content["loss"]), metric=None if metric is None else float(metric))


def point_to_json(point: Point) -> dict[str, Any]:
    """Return a point as a JSON-able dictionary."""
    return {
        "assignment": {name: str(choice) for name, choice in point.assignment.items()},
        "costs": dict(point.costs),
        "predicted": point.predicted,
        "measured": measured_to_json(point.measured),
        "origin": point.origin,
        "latency": point.latency,
    }


def point_from_json(content: Any) -> Point:
    """Return what ``point_to_json`` was given."""
    latency = content["latency"]
    return Point(
        assignment={str(n): Choice.parse(c) for n, c in content["assignment"].items()},
        costs={str(name): float(value) for name, value in content["costs"].items()},
        predicted=float(content["predicted"]),
        measured=measured_from_json(content["measured"]),
        origin=str(content["origin"]),
        latency=None if latency is None else float(latency),
    )
