"""One measured process of bench_calibration.py: prints seconds or peak memory as JSON.

Takes seconds with the batches in memory, every method in turn in each round; takes the peak with
the batches read as they are needed, one method to a process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import onnxruntime
import torch
from calibration_work import NetworkWork, SharedWork, batches
from networks import NETWORKS
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from shared_models import Inputs, SharedModels

import qwrap
from qwrap.config import Choice

Job = Callable[[Iterable[Inputs]], None]
Prepare = Callable[[Path], Job]  # what is set up here is not on the clock


def _forward(path: Path) -> Job:
    model = qwrap.load(path)

    def job(data: Iterable[Inputs]) -> None:
        with torch.no_grad():
            for batch in data:
                model(*map(torch.from_numpy, batch.values()))

    return job


def _calibrate(method: Choice) -> Prepare:
    def prepare(path: Path) -> Job:
        model = qwrap.load(path)
        qwrap.prepare(model, qwrap.QConfig(method=method))
        return lambda data: qwrap.calibrate(model, data, progress=False)

    return prepare


def _onnxruntime_session(path: str | Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _onnxruntime_forward(path: Path) -> Job:
    session = _onnxruntime_session(path)

    def job(data: Iterable[Inputs]) -> None:
        for batch in data:
            session.run(None, dict(batch))

    return job


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    def __init__(self, data: Iterable[Inputs]) -> None:
        self._batches: Iterator[Inputs] = iter(data)

    def get_next(self) -> Inputs | None:
        return next(self._batches, None)


def _op_types() -> list[str]:
    """Return the operators that onnxruntime calibrates: what it can quantize, or what is asked."""
    asked = os.environ.get("QWRAP_BENCH_OP_TYPES")
    return asked.split(",") if asked else sorted({*QLinearOpsRegistry, *QDQRegistry})


def _onnxruntime_calibrate(method: str) -> Prepare:
    def prepare(path: Path) -> Job:
        with tempfile.TemporaryDirectory() as folder:
            augmented = str(Path(folder) / "augmented.onnx")
            calibrator = create_calibrator(
                path,
                op_types_to_calibrate=_op_types(),
                augmented_model_path=augmented,
                calibrate_method=CalibrationMethod[method],
            )
            # Its own session takes all cores; the comparison is at the same number of threads.
            calibrator.infer_session = _onnxruntime_session(augmented)

        def job(data: Iterable[Inputs]) -> None:
            with Path(os.devnull).open("w") as silence, contextlib.redirect_stdout(silence):
                calibrator.collect_data(_Reader(data))
                calibrator.compute_data()

        return job

    return prepare


METHODS: dict[str, Prepare] = {
    "forward": _forward,
    "minmax": _calibrate("minmax"),
    "ema": _calibrate("ema"),
    "percentile": _calibrate("percentile"),
    "mse": _calibrate("mse"),
    "l1": _calibrate("l1"),
    "cosine": _calibrate("cosine"),
    "entropy": _calibrate("entropy"),
    "distribution": _calibrate("distribution"),
    "auto": _calibrate("auto"),
    "ort-forward": _onnxruntime_forward,
    "ort-minmax": _onnxruntime_calibrate("MinMax"),
    "ort-percentile": _onnxruntime_calibrate("Percentile"),
    "ort-entropy": _onnxruntime_calibrate("Entropy"),
}


def _seconds(job: Job, data: Iterable[Inputs]) -> float:
    start = time.perf_counter()
    job(data)
    return time.perf_counter() - start


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("export", "time", "memory"))
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--model", required=True)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--limit-gib", type=float, help="give up beyond this much address space")
    return parser.parse_args()


def _measure(arguments: argparse.Namespace, work: SharedWork | NetworkWork) -> dict[str, object]:
    data = batches(work, arguments.samples, arguments.batch_size)
    if arguments.what == "memory":
        (method,) = arguments.methods
        failures: list[str] = []
        with _survive(method, failures):
            METHODS[method](work.path)(data)
        if failures:
            return {"failed": failures[0]}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
        return {"peak_MiB": peak / 1024}
    held = list(data)
    seconds: dict[str, list[float]] = {method: [] for method in arguments.methods}
    failures: list[str] = []
    for _ in range(arguments.rounds):
        for method in list(seconds):
            with _survive(method, failures):
                seconds[method].append(_seconds(METHODS[method](work.path), held))
    done = {method: taken for method, taken in seconds.items() if len(taken) == arguments.rounds}
    return {"seconds": done, "failed": "; ".join(dict.fromkeys(failures))}


@contextlib.contextmanager
def _survive(method: str, failures: list[str]) -> Iterator[None]:
    """Let a method of onnxruntime fail, most often for want of memory, and take down why."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        if not method.startswith("ort-"):
            raise
        failures.append(str(error).partition("\n")[0] or "out of memory")


def main() -> None:
    """Measure what the command line asks for."""
    arguments = _arguments()
    unknown = [method for method in arguments.methods if method not in METHODS]
    if unknown:
        raise SystemExit(f"no method {unknown[0]!r}; choose from {', '.join(METHODS)}")
    torch.set_num_threads(arguments.threads)
    if arguments.limit_gib:
        most = int(arguments.limit_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    work: SharedWork | NetworkWork
    if arguments.model in NETWORKS:
        work = NetworkWork(arguments.model, arguments.workdir)
    else:
        work = SharedWork(arguments.model, SharedModels(arguments.shared))
    if arguments.what == "export":
        if isinstance(work, NetworkWork):
            work.export()
        return
    print(json.dumps(_measure(arguments, work)))


if __name__ == "__main__":
    main()
