"""``qwrap demo``: quantize the digits network and measure both files in onnxruntime."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

import qwrap
from qwrap.demo.digits import batches, digits, model_path
from qwrap.errors import ExportError
from qwrap.verify import VerifyReport

_THREADS = (1, 0)  # 0 is onnxruntime's default: every core
_LATENCY_BATCH = 32
_REPEATS = 100
_BATCH = 50
_VERIFY_BATCHES = 4
_CALIBRATION = "calibration.npz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one file reaches: share of correct digits, bytes, milliseconds by number of threads."""

    accuracy: float
    size: int
    latency: dict[int, float]


def run_demo(output: Path, console: Console) -> None:
    """Quantize the digits network into the folder ``output`` and print float against int8.

    Raises:
        ExportError: ``output`` cannot be written.
    """
    source, target = output / "digits.onnx", output / "digits.int8.onnx"
    _write_inputs(output, source)
    console.print("Calibrating on 500 digits …")
    report = _quantize(source, target)
    console.print("Running both files in onnxruntime over 2500 other digits …")
    before, after = _measure(source, target)
    console.print(_table(before, after))
    lines = (
        f"Exact simulation against onnxruntime, {_VERIFY_BATCHES * _BATCH} digits: "
        f"{report.differing_codes} of {report.codes} codes differ, "
        f"same digit in {report.top1_agreement:.2%}",
        f"Written to {output}: {source.name}, {target.name}, {_CALIBRATION}. Try:",
        shlex.join(["qwrap", "inspect", str(source)]),
        shlex.join([
            "qwrap",
            "verify",
            str(source),
            str(target),
            "--data",
            str(output / _CALIBRATION),
        ]),
    )
    console.print(*lines, sep="\n", highlight=False, markup=False, soft_wrap=True)


def _write_inputs(output: Path, source: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model_path(), source)
        np.savez_compressed(output / _CALIBRATION, image=digits("calibration")[0])
    except OSError as error:
        raise ExportError(
            f"{output}: cannot be written ({error.strerror}); choose another folder with --output"
        ) from error


def _quantize(source: Path, target: Path) -> VerifyReport:
    """Write ``target`` and return the report of ``qwrap.verify`` on it."""
    model = qwrap.quantize(source, target, calibration=batches("calibration", _BATCH))
    return qwrap.verify(model, target, batches("validation", _BATCH)[:_VERIFY_BATCHES])


def _measure(*paths: Path) -> list[Figures]:
    images, labels = digits("validation")
    latency = {threads: _latency(paths, images[:_LATENCY_BATCH], threads) for threads in _THREADS}
    return [
        Figures(
            accuracy=_accuracy(_session(path, 1), images, labels),
            size=path.stat().st_size,
            latency={threads: values[i] for threads, values in latency.items()},
        )
        for i, path in enumerate(paths)
    ]


def _latency(paths: Sequence[Path], images: Any, threads: int) -> list[float]:
    """Return median milliseconds of the files, run in turn, so that all see the same machine."""
    sessions = [_session(path, threads) for path in paths]
    times: list[list[float]] = [[] for _ in paths]
    for _ in range(_REPEATS):
        for session, taken in zip(sessions, times, strict=True):
            session.run(None, {"image": images})  # caches still hold the other file's weights
            start = time.perf_counter()
            session.run(None, {"image": images})
            taken.append(1e3 * (time.perf_counter() - start))
    return [median(taken) for taken in times]


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin after a run would take the cores from the file that is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _accuracy(session: onnxruntime.InferenceSession, images: Any, labels: Any) -> float:
    logits = [
        session.run(None, {"image": part})[0]
        for part in np.array_split(images, len(images) // _BATCH)
    ]
    return float(np.mean(np.concatenate(logits).argmax(1) == labels))


def _table(before: Figures, after: Figures) -> Table:
    table = Table(title="digits in onnxruntime")
    for column in ("", "float", "int8", "int8 / float"):
        table.add_column(column, justify="right" if column else "left")
    change = f"{100 * (after.accuracy - before.accuracy):+.2f} points"
    table.add_row("accuracy", f"{before.accuracy:.2%}", f"{after.accuracy:.2%}", change)
    sizes = [f"{figures.size / 1e3:.0f} kB" for figures in (before, after)]
    table.add_row("file size", *sizes, f"{after.size / before.size:.2f}")
    for threads in _THREADS:
        taken = [figures.latency[threads] for figures in (before, after)]
        values = [f"{value:.2f} ms" for value in taken]
        label = f"{_LATENCY_BATCH} digits, {'1 thread' if threads == 1 else 'all cores'}"
        table.add_row(label, *values, f"{taken[1] / taken[0]:.2f}")
    return table
