"""What a sensitivity analysis found: losses by group and choice, ranked, shown, saved."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwrap.errors import ConfigError, QwrapError, StatisticsError
from qwrap.graph.save import check_target, replace_file
from qwrap.mixed.choices import FLOAT, Choice, Group
from qwrap.mixed.document import check_kind, read_document, write_document

FORMAT, VERSION = "qwrap sensitivity", 1
MOST_ROWS = 40  # of a table or plot
BAR = 24  # characters of the longest bar

Key = tuple[str, Choice]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """How much a model loses when one of its groups has one choice of types.

    Attributes:
        losses: (name of the group, choice) -> loss: more is worse, 0 is none. In nats for "kl",
            relative squared error for "error", noise over signal in dB for "sqnr" (minus infinity
            for no noise), what the metric falls by for "metric". Several outputs are averaged.
        groups: what was quantized together; of single tensors, without nodes.
        by: what the groups are: "layer", "node", "block", "tensor", or "groups" that were given.
        method: "measured" or "fisher".
        measure: what was measured; "outputs" where each output had a measure of its own.
        rest: what the other groups were: "float", or "quantized" in the same choice; then a loss is
            what the model wins by leaving the group alone in float.
        samples: on how many samples; 0 for a metric, which knows its own.
        outputs: graph output -> how it was compared.
        everything: choice -> loss with all groups quantized; empty for "fisher".
    """

    losses: dict[Key, float]
    groups: tuple[Group, ...]
    by: str
    method: str
    measure: str
    rest: str
    samples: int
    outputs: dict[str, str] = field(default_factory=dict)
    everything: dict[Choice, float] = field(default_factory=dict)

    @property
    def choices(self) -> list[Choice]:
        """The choices with losses, float32 left out, in the order they were asked for."""
        return [c for c in dict.fromkeys(c for _, c in self.losses) if c != FLOAT]

    def ranking(self, choice: Choice | None = None) -> list[str]:
        """Return the names of the groups, the most sensitive first.

        Args:
            choice: whose losses are compared; by default each group's largest. Groups that do not
                have the choice are left out.

        Raises:
            ConfigError: no group has this choice.
        """
        worst: dict[str, float] = {}
        for (name, of), loss in self.losses.items():
            if of == choice or (choice is None and of != FLOAT):
                worst[name] = max(loss, worst.get(name, -math.inf))
        if not worst:
            known = ", ".join(map(str, self.choices))
            raise ConfigError(f"no losses for choice {choice}; there are {known}")
        return sorted(worst, key=lambda name: -worst[name])

    def spearman(
        self, other: Sensitivity | Mapping[Key, float], choice: Choice | None = None
    ) -> float:
        """Return the correlation of ranks with another analysis, or other losses: -1 to 1.

        Args:
            other: what to compare with, on the groups and choices that both have.
            choice: of which losses; by default all. Over several choices it is flattered by what
                sets them apart.

        Raises:
            ConfigError: both have fewer than two losses in common, or all are equal in one.

        Source: Spearman, 1904; ties share the mean of their ranks.
        """
        from scipy.stats import rankdata  # slow to import

        theirs = other.losses if isinstance(other, Sensitivity) else other
        keys = [
            key
            for key in self.losses
            if key in theirs and (key[1] == choice or (choice is None and key[1] != FLOAT))
        ]
        if len(keys) < 2:
            raise ConfigError(f"{len(keys)} losses in common: ranks of two or more are compared")
        a, b = (rankdata([losses[key] for key in keys]) for losses in (self.losses, theirs))
        a, b = a - a.mean(), b - b.mean()
        scale = math.sqrt(float((a @ a) * (b @ b)))
        if scale == 0:
            raise ConfigError("all losses of one analysis are equal, so that there are no ranks")
        return float(a @ b) / scale

    # --- showing ---------------------------------------------------------------------------------

    def summary(self, most: int = MOST_ROWS) -> str:
        """Return a table of the losses, the most sensitive group first.

        Args:
            most: rows.
        """
        from rich.console import Console  # slow to import
        from rich.table import Table
        from rich.text import Text

        console = Console(file=io.StringIO(), width=100, color_system=None, highlight=False)
        console.print(self._title(), markup=False, soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        table.add_column(self.by.rstrip("s"), overflow="fold")
        for choice in self.choices:
            table.add_column(str(choice), justify="right")
        table.add_column("")
        names = self.ranking()
        worst = {n: max(self.losses.get((n, c), -math.inf) for c in self.choices) for n in names}
        for name in names[:most]:
            cells = [self._cell((name, choice)) for choice in self.choices]
            bar = self._bar(worst[name], list(worst.values()))
            table.add_row(*map(Text, (name, *cells, bar)))
        console.print(table)
        if len(names) > most:
            console.print(f"… and {len(names) - most} more", markup=False)
        for choice, loss in self.everything.items():
            console.print(f"all of them in {choice}: {loss:.3g}", markup=False)
        file = console.file
        assert isinstance(file, io.StringIO)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def __str__(self) -> str:
        return self.summary()

    def _title(self) -> str:
        what = {
            "kl": "divergence in nats",
            "error": "relative squared error",
            "sqnr": "noise over signal in dB",
            "metric": "loss of the metric",
        }.get(self.measure, "by output")
        rest = "alone quantized" if self.rest == "float" else "alone left in float: what it wins"
        on = f", {self.samples} samples" if self.samples else ""
        kinds = {kind for kind in self.outputs.values() if kind != self.measure}
        mixed = f" ({', '.join(f'{n}: {k}' for n, k in self.outputs.items())})" if kinds else ""
        return f"{self.method}, each {self.by} {rest}{on}; {what}{mixed}"

    def _cell(self, key: Key) -> str:
        return f"{self.losses[key]:.3g}" if key in self.losses else ""

    def _bar(self, loss: float, losses: list[float]) -> str:
        finite = [x for x in losses if math.isfinite(x)]
        if not finite or not math.isfinite(loss):
            return ""
        low = min(0.0, *finite) if self.measure != "sqnr" else min(finite)
        width = max(finite) - low
        return "█" * round(BAR * (loss - low) / width) if width > 0 else ""

    def plot(self, path: str | os.PathLike[str], most: int = MOST_ROWS) -> None:
        """Draw the losses as bars, the most sensitive group on top, into an image file.

        Args:
            path: where to write; the ending says in which form, such as .png, .svg or .pdf.
            most: groups shown.

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
        names = self.ranking()[:most]
        figure = Figure(figsize=(9, 1.2 + 0.28 * len(names)), layout="constrained")
        self._draw(figure.add_subplot(), names)
        form = Path(path).suffix.lstrip(".")
        if form not in figure.canvas.get_supported_filetypes():
            known = ", ".join(sorted(figure.canvas.get_supported_filetypes()))
            raise ConfigError(f"{os.fspath(path)}: no image form {form!r}; choose one of {known}")
        replace_file(Path(path), lambda draft: figure.savefig(draft, format=form))

    def _draw(self, axes: Any, names: list[str]) -> None:
        choices = self.choices
        height = 0.8 / len(choices)
        shown = [v for v in self.losses.values() if math.isfinite(v)]
        start = min(shown) - 1 if self.measure == "sqnr" else 0.0
        for i, choice in enumerate(choices):
            rows = [n for n, name in enumerate(names) if (name, choice) in self.losses]
            values = [self.losses[names[n], choice] for n in rows]
            widths = [v - start if math.isfinite(v) else 0.0 for v in values]
            places = [n + i * height for n in rows]
            axes.barh(places, widths, height, left=start, label=str(choice))
        axes.set_yticks([n + 0.4 - height / 2 for n in range(len(names))], names, fontsize=7)
        axes.invert_yaxis()
        if self.measure != "sqnr" and all(v >= 0 for v in shown) and any(v > 0 for v in shown):
            axes.set_xscale("log")
        axes.set_xlabel(self._title(), fontsize=8)
        axes.legend(fontsize=8)

    # --- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, all of it or nothing.

        Raises:
            ExportError: the folder does not exist or cannot be written to.
        """
        write_document(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read what ``save`` wrote; nothing in the file is executed.

        Raises:
            StatisticsError: the file cannot be read, is damaged, of another kind, or was written
                by a later version.
        """
        return read_document(path, cls.from_dict)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able lists and dictionaries; infinite losses as text."""
        return {
            "format": FORMAT,
            "version": VERSION,
            **{name: getattr(self, name) for name in TEXTS},
            "samples": self.samples,
            "outputs": dict(self.outputs),
            "groups": [[g.name, [*g.nodes], [str(c) for c in g.choices]] for g in self.groups],
            "losses": [[n, str(c), _as_json(loss)] for (n, c), loss in self.losses.items()],
            "everything": [[str(c), _as_json(loss)] for c, loss in self.everything.items()],
        }

    @classmethod
    def from_dict(cls, content: Any) -> Sensitivity:
        """Take over what ``to_dict`` returned.

        Raises:
            StatisticsError: it did not return that, or a later version did.
        """
        check_kind(content, FORMAT, VERSION, "sensitivity analysis")
        try:
            groups = (
                Group(_text(name), tuple(map(_text, nodes)), tuple(map(Choice.parse, choices)))
                for name, nodes, choices in content["groups"]
            )
            texts = {name: _text(content[name]) for name in TEXTS}
            return cls(
                **texts,
                losses={(_text(n), Choice.parse(c)): _number(x) for n, c, x in content["losses"]},
                groups=tuple(groups),
                samples=int(content["samples"]),
                outputs={_text(k): _text(v) for k, v in content["outputs"].items()},
                everything={Choice.parse(c): _number(x) for c, x in content["everything"]},
            )
        except (KeyError, TypeError, ValueError, AttributeError, QwrapError) as error:
            raise StatisticsError(f"the file is damaged ({error})") from error


TEXTS = ("by", "method", "measure", "rest")


def _as_json(loss: float) -> float | str:
    return loss if math.isfinite(loss) else str(loss)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"{value!r} is no number")
    if isinstance(value, str) and value not in ("inf", "-inf"):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
