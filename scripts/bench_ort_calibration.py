"""What calibration costs through ``qwrap.ort`` and through onnxruntime's tool: time and memory.

    python scripts/bench_ort_calibration.py mobilenetv2_cifar10_128.onnx --samples 16
    python scripts/bench_ort_calibration.py resnet20_cifar10.onnx --only memory --samples 4 16 64

Models are files, or names in ``--shared``; batches are normal values. Times of the two tools are
taken in turn in one process, that of ``create_calibrator``, ``collect_data`` and ``compute_data``
together, or with ``--whole`` that of ``quantize_static``; the least of ``--rounds`` counts. Peak
memory is that of a process of its own, above what it has before the calibrator is made.

This process imports nothing large: on Linux a child's ``ru_maxrss`` starts from its parent's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOOLS = {"qwrap": "qwrap.ort", "onnxruntime": "onnxruntime.quantization"}
METHODS = ("MinMax", "Entropy", "Percentile", "Distribution")


class Reader:
    """Gives so many batches of normal values for the inputs of a model."""

    def __init__(self, path: Path, count: int) -> None:
        import onnx  # not in the process that starts others

        graph = onnx.load(path, load_external_data=False).graph
        constants = {tensor.name for tensor in graph.initializer}
        self._inputs = [value for value in graph.input if value.name not in constants]
        self._left = count

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, None at the end."""
        import numpy as np

        if not self._left:
            return None
        rng = np.random.default_rng(self._left)
        self._left -= 1
        batch = {}
        for value in self._inputs:
            tensor = value.type.tensor_type
            shape = [d.dim_value or 1 for d in tensor.shape.dim]
            is_float = tensor.elem_type == 1
            array = rng.normal(size=shape) if is_float else rng.integers(0, 2, shape)
            batch[value.name] = array.astype(np.float32 if is_float else np.int64)
        return batch


def calibrate(tool: str, path: Path, method: str, samples: int, whole: bool) -> None:
    """Calibrate, or quantize as a whole, with one tool; what it prints is dropped."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        package = importlib.import_module(TOOLS[tool])
        chosen = package.CalibrationMethod[method]
        reader = Reader(path, samples)
        if whole:
            output = os.path.join(folder, "out.onnx")
            package.quantize_static(str(path), output, reader, calibrate_method=chosen)
            return
        augmented = os.path.join(folder, "augmented.onnx")
        calibrator = package.create_calibrator(str(path), None, augmented, chosen)
        calibrator.collect_data(reader)
        calibrator.compute_data()


def times(path: Path, method: str, samples: int, rounds: int, whole: bool) -> dict[str, float]:
    """Return the least seconds of each tool; both are imported and have run before."""
    seconds: dict[str, list[float]] = {tool: [] for tool in TOOLS}
    for index in range(rounds + 1):
        for tool, found in seconds.items():
            start = time.perf_counter()
            calibrate(tool, path, method, samples if index else 1, whole)
            found.append(time.perf_counter() - start)
    return {tool: min(found[1:]) for tool, found in seconds.items()}


def peak(tool: str, path: Path, method: str, samples: int) -> float:
    """Return the MiB that calibrating takes above what a first run with one sample took."""
    calibrate(tool, path, method, 1, whole=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calibrate(tool, path, method, samples, whole=False)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def child(options: argparse.Namespace, **asked: Any) -> Any:
    """Return what this script prints when asked in a process of its own."""
    command = [sys.executable, __file__, *options.models, "--ask", json.dumps(asked)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def answer(asked: dict[str, Any]) -> Any:
    """Return what was asked of this process."""
    import logging

    import torch

    logging.disable(logging.WARNING)
    torch.set_num_threads(asked.pop("threads"))
    path = Path(asked.pop("path"))
    if "tool" in asked:
        return peak(asked["tool"], path, asked["method"], asked["samples"])
    return times(path, **asked)


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of each model and method."""
    for model in options.models:
        path = Path(model) if Path(model).exists() else Path(options.shared) / "models" / model
        common = {"path": str(path), "threads": options.threads}
        for method in options.methods:
            row = {"model": path.stem, "method": method}
            if options.only != "memory":
                for samples in options.samples:
                    found = child(
                        options,
                        **common,
                        method=method,
                        samples=samples,
                        rounds=options.rounds,
                        whole=options.whole,
                    )
                    ratio = found["qwrap"] / found["onnxruntime"]
                    yield {**row, "samples": samples, "seconds": found, "ratio": round(ratio, 2)}
            if options.only != "time":
                for tool in TOOLS:
                    peaks = {
                        samples: child(options, **common, tool=tool, method=method, samples=samples)
                        for samples in options.samples
                    }
                    yield {**row, "tool": tool, "MiB by samples": peaks}


def main() -> None:
    """Print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--shared", default=os.environ.get("QWRAP_SHARED", "shared"))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--samples", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--only", choices=("time", "memory"))
    parser.add_argument("--ask", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask is not None:
        print(json.dumps(answer(options.ask)))
        return
    for row in rows(options):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
