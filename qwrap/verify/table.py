"""Reports as text."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwrap.verify.report import (
    FilesReport,
    LevelReport,
    OutputReport,
    SkippedTensor,
    VerifyReport,
)

WIDTH = 100
MOST_ROWS = 20  # differing tensors listed; the JSON has all of them


def verify_table(report: VerifyReport) -> str:
    """Return a ``VerifyReport`` as readable text."""
    console = _console()
    _line(console, f"Simulation against onnxruntime, {_count(report.batches, 'batch', 'batches')}")
    for level in (report.specification, report.deployed):
        _level(console, level)
    _outputs(
        console,
        "quantization error: the file, optimised, against the float model",
        report.quantization,
    )
    _skipped(console, report.skipped)
    for note in report.notes:
        _line(console, f"note: {note}")
    return _text(console)


def files_table(report: FilesReport) -> str:
    """Return a ``FilesReport`` as readable text."""
    console = _console()
    _line(console, f"Two files in onnxruntime, {_count(report.batches, 'batch', 'batches')}")
    _outputs(
        console,
        "quantization error: the quantized file against the float file",
        report.quantization,
    )
    _level(console, report.optimisation)
    _skipped(console, report.skipped)
    return _text(console)


def _console() -> Console:
    return Console(file=io.StringIO(), width=WIDTH, color_system=None, highlight=False)


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())


def _line(console: Console, text: str) -> None:
    console.print(escape(text), soft_wrap=True)


def _level(console: Console, level: LevelReport) -> None:
    _line(console, f"\n{level.name}: {level.simulation} against onnxruntime, {level.runtime}")
    if level.tensors:
        differ = [tensor for tensor in level.tensors if tensor.differing]
        _line(
            console,
            f"  {level.differing} of {level.elements} codes differ ({level.fraction:.2g}), in "
            f"{len(differ)} of {_count(len(level.tensors), 'tensor', 'tensors')}; "
            f"largest difference {_steps(level.worst_step)}",
        )
        if differ:
            _tensors(console, level)
    _outputs(console, None, level.outputs)


def _tensors(console: Console, level: LevelReport) -> None:
    differ = [tensor for tensor in level.tensors if tensor.differing]
    table = _table("tensor", "type", "differing", "of", "steps", "SQNR dB")
    for tensor in differ[:MOST_ROWS]:
        table.add_row(
            escape(tensor.name),
            tensor.dtype,
            str(tensor.differing),
            str(tensor.elements),
            f"{tensor.worst_step:g}",
            f"{tensor.sqnr:.1f}",
        )
    console.print(table)
    if len(differ) > MOST_ROWS:
        _line(console, f"  … and {len(differ) - MOST_ROWS} more")


def _outputs(console: Console, title: str | None, outputs: Sequence[OutputReport]) -> None:
    if title is not None:
        _line(console, f"\n{title}")
    table = _table("output", "differing", "of", "largest", "SQNR dB", "top-1")
    for output in outputs:
        agreement = output.top1_agreement
        table.add_row(
            escape(output.name),
            str(output.differing),
            str(output.elements),
            f"{output.max_abs_difference:.3g}",
            f"{output.sqnr:.1f}",
            "" if agreement is None else f"{agreement:.2%}",
        )
    console.print(table)


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=True, header_style="")
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _skipped(console: Console, skipped: Sequence[SkippedTensor]) -> None:
    if not skipped:
        return
    reasons = Counter(tensor.reason for tensor in skipped)
    _line(console, f"\nnot compared: {_count(len(skipped), 'tensor', 'tensors')}")
    for reason, count in reasons.items():
        names = [tensor.name for tensor in skipped if tensor.reason == reason]
        shown = ", ".join(names[:3]) + (", …" if count > 3 else "")
        _line(console, f"  {count}: {reason} ({shown})")


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _steps(steps: float) -> str:
    return f"{steps:g} step{'' if steps == 1 else 's'}"
