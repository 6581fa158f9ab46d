"""``qwrap demo``: quantize the digits network and measure both files in onnxruntime."""

from __future__ import annotations

import shlex
import shutil
import time
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

_LATENCY_BATCHES = (1, 32)
_REPEATS = 100
_BATCH = 50
_VERIFY_BATCHES = 10
_CALIBRATION = "calibration.npz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one file reaches: share of correct digits, bytes, milliseconds for each batch size."""

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
        f"Simulation against onnxruntime, {_VERIFY_BATCHES * _BATCH} digits: "
        f"{report.differing_codes} of {report.codes} codes differ, "
        f"same digit in {report.top1_agreement:.2%}, SQNR {report.sqnr:.1f} dB",
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


def _quantize(source: Path, target: Path) -> Any:
    """Write ``target`` and return the report of ``qwrap.verify`` on it."""
    model = qwrap.load(source)
    qwrap.prepare(model)
    qwrap.calibrate(model, batches("calibration", _BATCH), progress=False)
    qwrap.export(model, target)
    return qwrap.verify(model, target, batches("validation", _BATCH)[:_VERIFY_BATCHES])


def _measure(*paths: Path) -> list[Figures]:
    """Return the figures of the files; their timed runs alternate, so that both see one machine."""
    sessions = [_session(path) for path in paths]
    images, labels = digits("validation")
    times: list[dict[int, list[float]]] = [{n: [] for n in _LATENCY_BATCHES} for _ in paths]
    for size in _LATENCY_BATCHES:
        for _ in range(_REPEATS):
            for session, taken in zip(sessions, times, strict=True):
                start = time.perf_counter()
                session.run(None, {"image": images[:size]})
                taken[size].append(1e3 * (time.perf_counter() - start))
    return [
        Figures(
            accuracy=_accuracy(session, images, labels),
            size=path.stat().st_size,
            latency={size: median(values) for size, values in taken.items()},
        )
        for path, session, taken in zip(paths, sessions, times, strict=True)
    ]


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _accuracy(session: onnxruntime.InferenceSession, images: Any, labels: Any) -> float:
    logits = [
        session.run(None, {"image": part})[0]
        for part in np.array_split(images, len(images) // _BATCH)
    ]
    return float(np.mean(np.concatenate(logits).argmax(1) == labels))


def _table(before: Figures, after: Figures) -> Table:
    table = Table(title="digits, one thread")
    for column in ("", "float", "int8", "int8 / float"):
        table.add_column(column, justify="right" if column else "left")
    change = f"{100 * (after.accuracy - before.accuracy):+.2f} points"
    table.add_row("accuracy", f"{before.accuracy:.2%}", f"{after.accuracy:.2%}", change)
    sizes = [f"{figures.size / 1e3:.0f} kB" for figures in (before, after)]
    table.add_row("file size", *sizes, f"{after.size / before.size:.2f}")
    for size in _LATENCY_BATCHES:
        taken = [figures.latency[size] for figures in (before, after)]
        values = [f"{value:.3f} ms" for value in taken]
        table.add_row(f"latency, batch {size}", *values, f"{taken[1] / taken[0]:.2f}")
    return table
