"""What ``qwrap quantize`` and ``qwrap inspect`` show of a plan."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwrap import QuantPlan

_MOST_LINES = 8  # with one label, as in "float" or "changed"; the JSON of inspect has all of them
_LAST_LINES = 2  # of "changed" they say what was done to weights, and what came of it


def print_plan(plan: QuantPlan, console: Console) -> None:
    """Print ``plan.summary()`` in two columns, long lists cut."""
    rows = _rows(plan.summary())
    if not console.is_terminal:  # a pipe has no width to wrap at
        for label, text in rows:
            console.print(Text(f"{label:10} {text}"), soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(Text(label), Text(text))
    console.print(grid)


def _rows(summary: str) -> list[tuple[str, str]]:
    grouped: dict[str, list[str]] = defaultdict(list)
    for line in summary.splitlines():
        label, _, text = line.partition(":")
        grouped[label].append(text.strip())
    rows: list[tuple[str, str]] = []
    for label, texts in grouped.items():
        if len(texts) > _MOST_LINES:
            first, last = texts[: _MOST_LINES - 1 - _LAST_LINES], texts[-_LAST_LINES:]
            left_out = len(texts) - len(first) - len(last)
            texts = [*first, f"… and {left_out} more; qwrap inspect --json lists all", *last]
        rows += [(label if i == 0 else "", text) for i, text in enumerate(texts)]
    return rows
