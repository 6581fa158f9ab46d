"""What ``qwrap quantize`` and ``qwrap inspect`` show of a plan."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwrap import QuantPlan

_MOST_LINES = 8  # with one label, as in "float" or "changed"; the JSON of inspect has all of them


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
        shown = texts if len(texts) <= _MOST_LINES else texts[: _MOST_LINES - 1]
        rows += [(label if i == 0 else "", text) for i, text in enumerate(shown)]
        if len(shown) < len(texts):
            more = f"… and {len(texts) - len(shown)} more; qwrap inspect --json lists all"
            rows.append(("", more))
    return rows
