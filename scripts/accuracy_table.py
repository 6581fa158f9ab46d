"""The benchmark of accuracy as Markdown: accuracy, cost and speed, and what became of the goals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from accuracy_goals import SETTINGS, bound, reaches
from accuracy_results import Cell, Results, Way
from results import FileResult

_NONE = "\N{EN DASH}"
_FAILED = "fails"
_MIB = 2**20


def markdown(results: Results) -> str:
    """Three tables, one row per model and setting, and below them what failed and why."""
    rows = [
        (model, setting)
        for setting in SETTINGS
        for model in results.references
        if results.of(model, setting)
    ]
    ways = list(dict.fromkeys(cell.way for cell in results.cells))
    parts = [
        _versions(results),
        "Task metric, as a difference from the float file's.",
        _table(results, rows, ways, ("float", "bound", "within bound"), _bounds, _difference),
        "Seconds and peak memory in MiB of quantizing, from so many calibration samples; "
        "the ratios are of processor time.",
        _table(results, rows, ways, ("samples", "default / plain", "high / plain"), _ratios, _cost),
        "Latency over the float file's with 1 thread / 2 threads, and the share of its constants "
        "that stand as integers.",
        _table(results, rows, ways, ("qwrap's slower than float",), _slower, _speed),
        _failures(results.cells),
    ]
    return "\n\n".join(filter(None, parts))


def _table(
    results: Results,
    rows: Sequence[tuple[str, str]],
    ways: Sequence[Way],
    head: tuple[str, ...],
    lead: Callable[[FileResult, Sequence[Cell]], tuple[str, ...]],
    figure: Callable[[FileResult, Cell], str],
) -> str:
    lines = [("model (metric)", "setting", *head, *(way.label for way in ways))]
    lines.append(("---",) * len(lines[0]))
    for model, setting in rows:
        reference = results.references[model]
        found = {way: results.find(model, setting, way) for way in ways}
        there = [cell for cell in found.values() if cell]
        cells = (figure(reference, cell) if cell else _NONE for cell in found.values())
        name = f"{model} ({next(iter(reference.metric))})"
        lines.append((name, setting, *lead(reference, there), *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _metric(file: FileResult) -> tuple[str, float]:
    return next(iter(file.metric.items()))


def _bounds(reference: FileResult, cells: Sequence[Cell]) -> tuple[str, str, str]:
    """The float file's metric, the bound as a difference, and who is within it."""
    name, value = _metric(reference)
    least = bound(cells[0].model, cells[0].setting, value)
    if least is None:
        return f"{value:.3f}", _NONE, _NONE
    within: dict[str, list[str]] = {}
    for cell in cells:
        if cell.file.metric and reaches(cell.file.metric[name], least, name):
            within.setdefault(cell.tool, []).append(cell.effort)
    names = [
        tool if tool == "onnxruntime" else f"{tool} ({', '.join(efforts)})"
        for tool, efforts in within.items()
    ]
    return f"{value:.3f}", f"{least - value:+.3f}", ", ".join(names) or "none"


def _difference(reference: FileResult, cell: Cell) -> str:
    name, value = _metric(reference)
    return f"{cell.file.metric[name] - value:+.3f}" if cell.file.metric else _FAILED


def _ratios(reference: FileResult, cells: Sequence[Cell]) -> tuple[str, str, str]:  # noqa: ARG001
    """Samples, and qwrap's processor time over that of its plain calibration."""
    own = {cell.way.effort: cell for cell in cells if cell.way.tool == "qwrap"}
    counts = dict.fromkeys(cell.samples for cell in sorted(cells, key=lambda cell: cell.samples))
    plain = own.get("plain")
    ratios = [
        f"{own[effort].file.processor / plain.file.processor:.1f}"
        if plain and plain.file.metric and effort in own and own[effort].file.metric
        else _NONE
        for effort in ("default", "high")
    ]
    return " / ".join(map(str, counts)), *ratios


def _cost(reference: FileResult, cell: Cell) -> str:  # noqa: ARG001
    if not cell.file.metric:
        return _FAILED
    return f"{cell.file.seconds:.1f} s, {cell.file.peak / _MIB:.0f}"


def _slower(reference: FileResult, cells: Sequence[Cell]) -> tuple[str]:  # noqa: ARG001
    slower = [c.way.effort for c in cells if c.way.tool == "qwrap" and _is_slower(c)]
    timed = any(cell.file.latency for cell in cells if cell.way.tool == "qwrap")
    return (", ".join(slower) or ("none" if timed else _NONE),)


def _is_slower(cell: Cell) -> bool:
    """Whether a file takes longer than the float file with any number of threads.

    By both the median over the rounds and the fastest bursts, beyond the 2 % that repeat runs of
    one file differ by.
    """
    latency, fastest = cell.file.latency, cell.file.fastest_latency
    return any(min(latency[threads], fastest[threads]) > 1.02 for threads in latency)


def _speed(reference: FileResult, cell: Cell) -> str:  # noqa: ARG001
    if not cell.file.latency:
        return _NONE if cell.file.metric else _FAILED
    times = " / ".join(f"{ratio:.2f}" for ratio in cell.file.latency.values())
    return f"{times}, {cell.coded:.0%}"


def _versions(results: Results) -> str:
    found = dict.fromkeys((cell.tool, cell.version) for cell in results.cells if cell.version)
    return "Versions: " + "; ".join(f"{tool} {version}" for tool, version in found) + "."


def _failures(cells: Iterable[Cell]) -> str:
    return "\n".join(
        f"- {cell.model}, {cell.setting}, {cell.way.label}: {cell.file.error}"
        for cell in cells
        if not cell.file.metric
    )
