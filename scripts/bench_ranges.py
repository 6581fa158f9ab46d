"""What choosing ranges costs, for 100 tensors of 2 x 2048 bins, beside onnxruntime's collector.

    python scripts/bench_ranges.py

onnxruntime sweeps entropy thresholds in Python, so that its time is taken on a few tensors and
multiplied. Both run on one thread, on the same values in as many bins.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from onnxruntime.quantization.calibrate import HistogramCollector

from qwrap.config import METHODS, QuantSpec
from qwrap.quant.observe.observers import HistogramObserver
from qwrap.quant.ranges import candidate_ranges, choose_ranges, choose_weight_range

BINS = 2048  # a side
CODES = 256  # which entropy sums bins to, as qwrap does for 8 bits
PERCENTILE = 99.99
TYPES = {
    "uint8": QuantSpec(dtype="uint8", symmetric=False),
    "int8": QuantSpec(dtype="int8"),
    "uint16": QuantSpec(dtype="uint16", symmetric=False),
    "uint4": QuantSpec(dtype="uint4", symmetric=False),
    "float8e4m3fn": QuantSpec(dtype="float8e4m3fn"),
}
WEIGHTS = {
    "embedding 32000 x 768, int8 per tensor": ((32000, 768), QuantSpec()),
    "embedding 32000 x 768, int8 per row": ((32000, 768), QuantSpec(axis=0, narrow_range=True)),
    "matrix 4096 x 1024, int4 in blocks of 32": (
        (4096, 1024),
        QuantSpec(dtype="int4", axis=0, block_size=32),
    ),
    "matrix 4096 x 1024, float4 with float8 scales": (
        (4096, 1024),
        QuantSpec(dtype="float4e2m1", axis=0, block_size=16, scale_type="float8e4m3fn"),
    ),
}


def made_values(count: int) -> list[np.ndarray]:
    """Values of ``count`` tensors: every third normal, after a Relu, and with heavy tails."""
    random = np.random.default_rng(0)
    kinds: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda x: x,
        lambda x: np.maximum(x, 0),
        lambda x: x * np.abs(x),
    ]
    return [
        kinds[i % 3](random.normal(size=100_000) * 1.7 ** (i % 20)).astype(np.float32)
        for i in range(count)
    ]


def seconds(work: Callable[..., object], *arguments: object) -> float:
    """Processor time of one call; other work on the machine does not count."""
    start = time.process_time()
    work(*arguments)
    return time.process_time() - start


def collected(values: Sequence[np.ndarray], method: str) -> HistogramCollector:
    """Onnxruntime's histograms of the same values, in as many bins."""
    collector = HistogramCollector(method, False, 2 * BINS, CODES, PERCENTILE, "same")
    with contextlib.redirect_stdout(io.StringIO()):
        collector.collect({str(i): x for i, x in enumerate(values)})
    return collector


def result_of(collector: HistogramCollector) -> None:
    """Let onnxruntime choose its ranges, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        collector.compute_collection_result()


def choose(observers: Sequence[HistogramObserver], spec: QuantSpec, method: str) -> None:
    """Let qwrap choose the ranges of all tensors by one method, or by all of them."""
    count = len(observers)
    specs, percentiles = [spec] * count, [PERCENTILE] * count
    if method == "all of them":
        candidate_ranges(observers, specs, percentiles)
    else:
        choose_ranges(observers, specs, [method] * count, percentiles)


def compare(values: Sequence[np.ndarray], few: int, rounds: int) -> None:
    """Print the time of every method and type, and onnxruntime's for the two that it has."""
    observers = [HistogramObserver(str(i), bins=BINS) for i in range(len(values))]
    for observer, x in zip(observers, values, strict=True):
        observer.observe(torch.from_numpy(x))  # 1-D, so that it is not sampled
    theirs = {"percentile": values, "entropy": values[:few]}
    print(f"{'type':14}{'method':14}{'seconds':>9}{'onnxruntime':>13}{'ratio':>9}")
    for name, spec in TYPES.items():
        for method in (*METHODS, "all of them"):
            ours = [seconds(choose, observers, spec, method) for _ in range(rounds)]
            line = f"{name:14}{method:14}{statistics.median(ours):9.4f}"
            if name == "uint8" and method in theirs:
                collector = collected(theirs[method], method)
                share = len(theirs[method]) / len(values)
                other = [seconds(result_of, collector) / share for _ in range(rounds)]
                ratio = statistics.median(ours) / statistics.median(other)
                line += f"{statistics.median(other):13.3f}{ratio:9.4f}"
            print(line, flush=True)


def time_weights() -> None:
    """Print the time of both methods for large weights."""
    print(f"\n{'weight':48}{'minmax':>9}{'mse':>9}  seconds")
    for name, (shape, spec) in WEIGHTS.items():
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        times = [seconds(choose_weight_range, weight, spec, m) for m in ("minmax", "mse")]
        print(f"{name:48}{times[0]:9.3f}{times[1]:9.3f}", flush=True)


def main() -> None:
    """Run on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--few", type=int, default=2, help="tensors for onnxruntime's entropy")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compare(made_values(arguments.tensors), arguments.few, arguments.rounds)
    time_weights()


if __name__ == "__main__":
    main()
