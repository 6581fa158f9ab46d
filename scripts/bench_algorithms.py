"""What each post-training algorithm brings to each shared model, alone and behind calibration.

    python scripts/bench_algorithms.py adaround --models mnist_cntk resnet20_cifar10 --weight int4

Prints the squared error of the outputs on held-back samples, relative to their power, before and
after, whether the change was kept, and the seconds that it took, with those of calibration.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shared_models import SharedModels, default_folder

import qwrap
from qwrap import algorithms
from qwrap.quant.outcome import Outcome

Algorithm = Callable[[qwrap.WrappedModel, Sequence[Any]], Outcome]
LEARNED = ("adaround", "brecq", "qdrop", "flexround")


def _algorithms(iterations: int) -> dict[str, Algorithm]:
    quiet = {"progress": False}
    learned = {**quiet, "iterations": iterations}
    return {
        "equalize": partial(algorithms.equalize, **quiet),
        "equalize_ranges": partial(algorithms.equalize, balance="ranges", **quiet),
        "absorb_biases": algorithms.absorb_biases,
        "smooth": partial(algorithms.smooth, **quiet),
        "choose_methods": algorithms.choose_methods,
        "clip_activations": partial(algorithms.clip_activations, **quiet),
        "sequential_mse": partial(algorithms.sequential_mse, **quiet),
        "round_weights": partial(algorithms.round_weights, **quiet),
        "round_in_turn": partial(algorithms.round_weights, sequential=True, **quiet),
        "restore_channels": partial(algorithms.restore_channels, **quiet),
        "correct_biases": algorithms.correct_biases,
        "adaround": partial(algorithms.adaround, **learned),
        "brecq": partial(algorithms.brecq, **learned),
        "qdrop": partial(algorithms.brecq, drop=0.5, **learned),
        "flexround": partial(algorithms.flexround, **learned),
    }


def _measure(
    shared: SharedModels, name: str, given: argparse.Namespace, algorithm: Algorithm
) -> list[str]:
    samples = shared.calibration(name, given.samples)
    model = qwrap.load(shared.path(name)).eval()
    qwrap.prepare(model, qwrap.QConfig(weight=given.weight, scope="kernels"))
    start = time.perf_counter()
    qwrap.calibrate(model, samples, progress=False)
    calibrated = time.perf_counter()
    outcome = algorithm(model, samples)
    seconds = time.perf_counter() - calibrated
    kept = "kept" if outcome else "undone"
    times = [f"{seconds:.1f}", f"{calibrated - start:.1f}"]
    return [name, f"{outcome.before:.3g}", f"{outcome.after:.3g}", kept, *times]


def main() -> None:
    """Run the benchmark."""
    names = list(_algorithms(1))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("algorithm", choices=names)
    parser.add_argument("--models", nargs="+", help="names of models; all by default")
    parser.add_argument("--weight", default="int4")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=60, help=f"of {', '.join(LEARNED)}")
    parser.add_argument("--shared", type=Path, default=default_folder())
    given = parser.parse_args()
    shared = SharedModels(given.shared)
    algorithm = _algorithms(given.iterations)[given.algorithm]
    print("| model | before | after | | seconds | calibration |\n" + "| --- " * 6 + "|")
    for name in given.models or shared.names:
        print(f"| {' | '.join(_measure(shared, name, given, algorithm))} |", flush=True)


if __name__ == "__main__":
    main()
