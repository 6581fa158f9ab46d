"""What a search found: the chosen assignment, the front, and how to use, show and keep them."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwrap.config import QConfig
from qwrap.errors import ConfigError, QwrapError, StatisticsError
from qwrap.graph.save import check_target, replace_file
from qwrap.mixed.choices import Choice, Group, config_with
from qwrap.mixed.document import check_kind, read_document, write_document
from qwrap.mixed.loss.ranking import Sensitivity
from qwrap.mixed.search.linear import LinearCost
from qwrap.mixed.search.pareto import EVERYWHERE, Measured, Point
from qwrap.mixed.search.state import (
    measured_from_json,
    measured_to_json,
    point_from_json,
    point_to_json,
)
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.calibrate import calibrate
from qwrap.quant.plan import QuantPlan
from qwrap.quant.prepare import prepare

FORMAT, VERSION = "qwrap search", 1
TITLES = {"bytes": "bytes", "bit_ops": "bit operations", "latency": "latency, ms"}


@dataclass(slots=True, kw_only=True)
class SearchResult:
    """The outcome of ``qwrap.search``.

    Attributes:
        chosen: the point that the budget, or the allowed drop, asks for.
        front: the points that no other one dominates, the cheapest first.
        points: all that were evaluated, in order.
        groups: what choices are for.
        along: name of the cost that the front runs along.
        of_float: what the float model is measured at.
        asked: the budget or the allowed drop, in words.
        config: what else the model was quantized with; None if the result was read from a file.
        model: simulates the chosen point, trained if that was asked for; None if the result was
            read from a file.
        tuned: what ``model`` is measured at after training; None without.
        sensitivity: what groups lose alone; None if the result was read from a file.
        costs: what choices cost, by name of the cost; empty if the result was read from a file.
    """

    chosen: Point
    front: list[Point]
    points: list[Point]
    groups: list[Group]
    along: str
    of_float: Measured
    asked: str
    config: QConfig | None = None
    model: WrappedModel | None = None
    tuned: Measured | None = None
    sensitivity: Sensitivity | None = None
    costs: Mapping[str, LinearCost] = field(default_factory=dict)

    @property
    def plan(self) -> QuantPlan | None:
        """The plan of ``model``."""
        return self.model.plan if self.model and isinstance(self.model.plan, QuantPlan) else None

    def config_of(self, point: Point | None = None, base: QConfig | None = None) -> QConfig:
        """Return the settings that ``qwrap.prepare`` makes a point of.

        Args:
            point: one of ``points``; by default the chosen one.
            base: what else the model is quantized with; by default what was searched with.
        """
        base = base or self.config or QConfig()
        return config_with(base, self.groups, (point or self.chosen).assignment)

    def apply(
        self,
        model: WrappedModel,
        batches: Iterable[Any],
        *,
        point: Point | None = None,
        config: QConfig | None = None,
        progress: bool = True,
    ) -> QuantPlan:
        """Prepare and calibrate ``model`` as the chosen point says, in place; return the plan.

        Then ``qwrap.export`` writes the file, and ``qwrap.finetune`` or any loop trains it.

        Args:
            model: the float model that was searched, or one with the same nodes.
            batches: to calibrate with.
            point: another one of ``points``.
            config: what else the model is quantized with; by default what was searched with.
            progress: show a bar on a terminal.
        """
        plan = prepare(model, self.config_of(point, config))
        calibrate(model, batches, progress=progress)
        return plan

    # --- showing ---------------------------------------------------------------------------------

    def summary(self) -> str:
        """Return a table of the front, the chosen point marked, and its choices."""
        from rich.console import Console  # slow to import
        from rich.table import Table

        console = Console(file=io.StringIO(), width=110, color_system=None, highlight=False)
        table = Table(box=None, pad_edge=False)
        for name in ("", "choices", *self._costs()):
            table.add_column(
                TITLES.get(name, name), justify="left" if name == "choices" else "right"
            )
        measured = {"timed, ms": self._is_timed, "loss": True, "metric": self._has_metric}
        for name in (name for name, is_shown in measured.items() if is_shown):
            table.add_column(name, justify="right")
        for point in self._shown():
            table.add_row(*self._row(point))
        console.print(self._title(), markup=False, soft_wrap=True)
        console.print(table)
        if self.of_float.metric is not None:
            console.print(f"float model: metric {self.of_float.metric:.6g}", markup=False)
        if self.tuned is not None:
            after = f"loss {self.tuned.loss:.4g}"
            metric = "" if self.tuned.metric is None else f", metric {self.tuned.metric:.6g}"
            console.print(f"chosen and trained: {after}{metric}", markup=False)
        for line in self._choices():
            console.print(line, markup=False, soft_wrap=True)
        file = console.file
        assert isinstance(file, io.StringIO)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def __str__(self) -> str:
        return self.summary()

    def _title(self) -> str:
        return f"{self.asked}: {len(self.points)} assignments evaluated; * is chosen, - dominated"

    def _shown(self) -> list[Point]:
        """Return the front, the chosen point, and every choice everywhere, by cost."""
        shown = [p for p in self.points if p in self.front or p.origin == EVERYWHERE]
        shown += [] if self.chosen in shown else [self.chosen]
        return sorted(shown, key=lambda point: point.costs[self.along])

    def _costs(self) -> list[str]:
        return list(self.chosen.costs)

    @property
    def _is_timed(self) -> bool:
        return any(point.latency is not None for point in self.points)

    @property
    def _has_metric(self) -> bool:
        return self.of_float.metric is not None

    def _row(self, point: Point) -> list[str]:
        mark = "*" if point is self.chosen else "" if point in self.front else "-"
        cells = [mark, _counts(point)]
        cells += [_cost(name, point.costs[name]) for name in self._costs()]
        if self._is_timed:
            cells.append("" if point.latency is None else _cost("latency", point.latency))
        cells.append(f"{point.measured.loss:.4g}")
        if point.measured.metric is not None:
            cells.append(f"{point.measured.metric:.6g}")
        return cells

    def _choices(self) -> list[str]:
        """Return the groups that are not as most are, by choice."""
        by_choice: dict[Choice, list[str]] = {}
        for name, choice in self.chosen.assignment.items():
            by_choice.setdefault(choice, []).append(name)
        ordered = sorted(by_choice.items(), key=lambda item: -len(item[1]))
        lines = [f"{choice}: {len(names)} groups" for choice, names in ordered[:1]]
        return lines + [f"{choice}: {', '.join(names)}" for choice, names in ordered[1:]]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw loss, or the metric, over the cost: all points, the front, the chosen one.

        Args:
            path: image file; the ending says in which form, such as .png, .svg or .pdf.

        Raises:
            ConfigError: matplotlib is not installed, or cannot write such a file.
            ExportError: the folder does not exist or cannot be written to.
        """
        check_target(path)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError(
                "plots need matplotlib; install it with: pip install qwrap[plot]"
            ) from error
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        self._draw(figure.add_subplot())
        form = Path(path).suffix.lstrip(".")
        if form not in figure.canvas.get_supported_filetypes():
            known = ", ".join(sorted(figure.canvas.get_supported_filetypes()))
            raise ConfigError(f"{os.fspath(path)}: no image form {form!r}; choose one of {known}")
        replace_file(Path(path), lambda draft: figure.savefig(draft, format=form))

    def _draw(self, axes: Any) -> None:
        for label, points, style in (
            ("evaluated", self.points, {"linestyle": "", "marker": ".", "color": "0.6"}),
            ("front", self.front, {"marker": "o", "color": "C0"}),
            ("chosen", [self.chosen], {"linestyle": "", "marker": "*", "ms": 16, "color": "C3"}),
        ):
            x = [self._shown_cost(point) for point in points]
            axes.plot(x, [self._height(point.measured) for point in points], label=label, **style)
        if self._has_metric:
            axes.axhline(self._height(self.of_float), color="0.3", linestyle=":", label="float")
        elif all(point.measured.loss > 0 for point in self.points):
            axes.set_yscale("log")
        axes.set_xlabel(TITLES.get(self.along, self.along))
        axes.set_ylabel("metric" if self._has_metric else "loss")
        axes.set_title(self.asked, fontsize=9)
        axes.legend()

    def _height(self, measured: Measured) -> float:
        return measured.loss if measured.metric is None else measured.metric

    def _shown_cost(self, point: Point) -> float:
        value = point.costs[self.along]
        return value * 1e3 if self.along == "latency" else value

    # --- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, all of it or nothing: the points, not what they were found by.

        Raises:
            ExportError: the folder does not exist or cannot be written to.
        """
        write_document(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SearchResult:
        """Read what ``save`` wrote; nothing in the file is executed.

        Raises:
            StatisticsError: the file cannot be read, is damaged, of another kind, or was written
                by a later version.
        """
        return read_document(path, cls.from_dict)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able lists and dictionaries."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "asked": self.asked,
            "along": self.along,
            "groups": [[g.name, [*g.nodes], [str(c) for c in g.choices]] for g in self.groups],
            "points": [point_to_json(point) for point in self.points],
            "front": [self.points.index(point) for point in self.front],
            "chosen": self.points.index(self.chosen),
            "float": measured_to_json(self.of_float),
            "tuned": None if self.tuned is None else measured_to_json(self.tuned),
        }

    @classmethod
    def from_dict(cls, content: Any) -> SearchResult:
        """Take over what ``to_dict`` returned.

        Raises:
            StatisticsError: it did not return that, or a later version did.
        """
        check_kind(content, FORMAT, VERSION, "result of a search")
        try:
            points = [point_from_json(point) for point in content["points"]]
            tuned = content["tuned"]
            return cls(
                chosen=points[content["chosen"]],
                front=[points[i] for i in content["front"]],
                points=points,
                groups=[
                    Group(str(name), tuple(map(str, nodes)), tuple(map(Choice.parse, choices)))
                    for name, nodes, choices in content["groups"]
                ],
                along=str(content["along"]),
                of_float=measured_from_json(content["float"]),
                asked=str(content["asked"]),
                tuned=None if tuned is None else measured_from_json(tuned),
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, QwrapError) as error:
            raise StatisticsError(f"the file is damaged ({error!r})") from error


def _counts(point: Point) -> str:
    counts = Counter(point.assignment.values()).most_common()
    return ", ".join(f"{n} {choice}" for choice, n in counts)


def _cost(name: str, value: float) -> str:
    if name == "latency":
        return f"{value * 1e3:.3f}"
    return f"{value:.4g}" if value >= 1e7 else f"{value:.0f}"
