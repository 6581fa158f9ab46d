"""Eager forward of wrapped networks against the native torch modules, and load times.

Native and wrapped module take turns in pairs, in an order that alternates, so that drift of the
machine meets both; the figure is the median over the pairs of the ratio within a pair.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from networks import NETWORKS, Network, export
from peak_memory import peak_activation_bytes
from shared_models import SharedModels, default_folder
from torch import nn

import qwrap

BURST = 0.2  # seconds one module runs before the other takes over
Call = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """One network at one batch size.

    Attributes:
        milliseconds: of the native module, by number of threads.
        ratios: wrapped over native time, by number of threads.
        mebibytes: peak of activations, native and wrapped.
        load_seconds: of ``qwrap.load``.
    """

    name: str
    batch: int
    milliseconds: dict[int, float]
    ratios: dict[int, float]
    mebibytes: tuple[float, float]
    load_seconds: float


def time_calls(call: Call, count: int) -> float:
    """Return the seconds a call takes, the mean over ``count``."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def compare(native: Call, wrapped: Call, rounds: int) -> tuple[float, float]:
    """Return the native seconds and the ratio of wrapped to native, medians over the rounds."""
    native(), wrapped()
    count = max(1, math.ceil(BURST / time_calls(native, 1)))
    pairs = []
    for i in range(rounds):
        order = (native, wrapped) if i % 2 else (wrapped, native)
        seconds = {call: time_calls(call, count) for call in order}
        pairs.append((seconds[native], seconds[wrapped]))
    return statistics.median(a for a, _ in pairs), statistics.median(b / a for a, b in pairs)


def exported(network: Network, module: nn.Module, path: Path, exporter: str) -> Path:
    """Return the file of a network, made if it is not there."""
    if not path.exists():
        export(network, module, network.sample(module, 2, network.real_size, 1), path, exporter)
    return path


def load(path: Path, rounds: int = 3) -> tuple[qwrap.WrappedModel, float]:
    """Return a wrapped model and the seconds that loading took, the least of a few times."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        model = qwrap.load(path)
        seconds.append(time.perf_counter() - start)
    return model.eval(), min(seconds)


@torch.inference_mode()
def measure(name: str, exporter: str, arguments: argparse.Namespace) -> Iterator[Forward]:
    """Yield the figures of one network for each batch size."""
    network = NETWORKS[name]
    with torch.inference_mode(False):
        native = network.make(small=False)
        path = exported(network, native, arguments.workdir / f"{name}_{exporter}.onnx", exporter)
        wrapped, load_seconds = load(path)
    for batch in arguments.batches:
        inputs = list(network.sample(native, batch, network.real_size, 1).values())

        def run(module: nn.Module, inputs: Sequence[Any] = inputs) -> Call:
            return lambda: module(*inputs)

        milliseconds, ratios = {}, {}
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            seconds, ratios[threads] = compare(run(native), run(wrapped), arguments.rounds)
            milliseconds[threads] = seconds * 1e3
        yield Forward(
            name=f"{name} {exporter}",
            batch=batch,
            milliseconds=milliseconds,
            ratios=ratios,
            mebibytes=tuple(peak_activation_bytes(run(m)) / 2**20 for m in (native, wrapped)),
            load_seconds=load_seconds,
        )


def header(threads: Sequence[int]) -> str:
    """Return the head of the table of forwards."""
    times = [f"{what}, {n} thread{'s' if n > 1 else ''}" for n in threads for what in ("ms", "x")]
    cells = ["network", "batch", *times, "peak MiB", "wrapped", "load s"]
    return f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}"


def row(result: Forward) -> str:
    """Return a row of the table of forwards."""
    times = []
    for threads, ratio in result.ratios.items():
        times += [f"{result.milliseconds[threads]:.1f}", f"{ratio:.3f}"]
    memory = [f"{x:.1f}" for x in result.mebibytes]
    cells = [result.name, str(result.batch), *times, *memory, f"{result.load_seconds:.2f}"]
    return f"| {' | '.join(cells)} |"


def print_load_times(folder: Path) -> None:
    """Print how long each shared model takes to load."""
    shared = SharedModels(folder)
    print("\n| shared model | load s |\n|---|---|")
    for name in shared.names:
        print(f"| {name} | {load(shared.path(name))[1]:.2f} |", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--exporters", nargs="+", default=["torchscript", "dynamo"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15, help="pairs of bursts")
    parser.add_argument("--workdir", type=Path, default=Path("build/networks"), help="files stay")
    parser.add_argument("--shared", type=Path, default=default_folder())
    parser.add_argument("--skip-shared", action="store_true", help="networks only")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    print(header(arguments.threads))
    for name in arguments.networks:
        for exporter in arguments.exporters:
            print(f"{name} {exporter}", file=sys.stderr)
            for result in measure(name, exporter, arguments):
                print(row(result), flush=True)
    if not arguments.skip_shared:
        print_load_times(arguments.shared)


if __name__ == "__main__":
    main()
