"""One measured process of bench_calibration.py: prints seconds and peak memory as JSON.

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

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator
from shared_models import Inputs, SharedModels

import qwrap
from qwrap.config import Method

Work = Callable[[Iterable[Inputs]], None]
Prepare = Callable[[Path], Work]  # what is set up here is not on the clock


def _forward(path: Path) -> Work:
    model = qwrap.load(path)

    def work(batches: Iterable[Inputs]) -> None:
        with torch.no_grad():
            for batch in batches:
                model(*map(torch.from_numpy, batch.values()))

    return work


def _calibrate(method: Method) -> Prepare:
    def prepare(path: Path) -> Work:
        model = qwrap.load(path)
        qwrap.prepare(model, qwrap.QConfig(method=method))
        return lambda batches: qwrap.calibrate(model, batches, progress=False)

    return prepare


def _onnxruntime_session(path: str | Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _onnxruntime_forward(path: Path) -> Work:
    session = _onnxruntime_session(path)

    def work(batches: Iterable[Inputs]) -> None:
        for batch in batches:
            session.run(None, dict(batch))

    return work


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    def __init__(self, batches: Iterable[Inputs]) -> None:
        self._batches: Iterator[Inputs] = iter(batches)

    def get_next(self) -> Inputs | None:
        return next(self._batches, None)


def _onnxruntime_calibrate(method: str) -> Prepare:
    def prepare(path: Path) -> Work:
        with tempfile.TemporaryDirectory() as folder:
            augmented = str(Path(folder) / "augmented.onnx")
            calibrator = create_calibrator(
                path,
                augmented_model_path=augmented,
                calibrate_method=CalibrationMethod[method],
            )
            # Its own session takes all cores; the comparison is at the same number of threads.
            calibrator.infer_session = _onnxruntime_session(augmented)

        def work(batches: Iterable[Inputs]) -> None:
            with Path(os.devnull).open("w") as silence, contextlib.redirect_stdout(silence):
                calibrator.collect_data(_Reader(batches))
                calibrator.compute_data()

        return work

    return prepare


METHODS: dict[str, Prepare] = {
    "forward": _forward,
    "minmax": _calibrate("minmax"),
    "mse": _calibrate("mse"),
    "percentile": _calibrate("percentile"),
    "ort-forward": _onnxruntime_forward,
    "ort-minmax": _onnxruntime_calibrate("MinMax"),
    "ort-percentile": _onnxruntime_calibrate("Percentile"),
    "ort-entropy": _onnxruntime_calibrate("Entropy"),
}


def batches(shared: SharedModels, name: str, samples: int, size: int) -> Iterator[Inputs]:
    """Calibration samples joined to batches of ``size``; only one batch is in memory."""
    collected: list[Inputs] = []
    for inputs in shared.stream_calibration(name, samples):
        collected.append(inputs)
        if len(collected) == size:
            yield {key: np.concatenate([each[key] for each in collected]) for key in inputs}
            collected = []


def _seconds(work: Work, data: Iterable[Inputs]) -> float:
    start = time.perf_counter()
    work(data)
    return time.perf_counter() - start


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("time", "memory"))
    parser.add_argument("methods", nargs="+", choices=METHODS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Measure what the command line asks for."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    shared = SharedModels(arguments.shared)
    path = shared.path(arguments.model)
    data = batches(shared, arguments.model, arguments.samples, arguments.batch_size)
    if arguments.what == "memory":
        (method,) = arguments.methods
        METHODS[method](path)(data)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
        print(json.dumps({"peak_MiB": peak / 1024}))
        return
    held = list(data)
    seconds: dict[str, list[float]] = {method: [] for method in arguments.methods}
    for _ in range(arguments.rounds):
        for method in arguments.methods:
            seconds[method].append(_seconds(METHODS[method](path), held))
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
