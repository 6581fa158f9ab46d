"""What ``qwrap.search`` is worth on real models, against one type everywhere and greedy order.

``python scripts/search_models.py resnet20_cifar10 minilm_l6`` prints for each model the float file,
everything in 8 bits (``scope="all"``), everything with activations of 16 bits, the choice of the
greedy order at the search's budget, and the search's own: the task metric in onnxruntime on
validation data that the search has not seen, bytes, and latency, timed in turns. The search itself
goes by held-out calibration samples, without labels.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from finetune_models import batched, runner
from measurements import latency
from shared_models import Inputs, SharedModels, default_folder

import qwrap
from qwrap.mixed.search.linear import LinearCost
from qwrap.mixed.search.pareto import Point
from qwrap.mixed.search.solve import greedy


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["resnet20_cifar10"])
    parser.add_argument("--shared", type=Path, default=default_folder())
    parser.add_argument("--budget", default="latency=1 x uint8/int8")
    parser.add_argument("--choices", nargs="*", default=["uint8/int8", "uint16/int8", "float32"])
    parser.add_argument("--samples", type=int, default=256, help="calibration samples")
    parser.add_argument("--measured", type=int, default=64, help="samples for the losses of groups")
    parser.add_argument("--batch", type=int, default=1, help="samples in a batch")
    parser.add_argument("--by", default="layer")
    parser.add_argument("--method", default="measured")
    parser.add_argument("--measure", default="kl")
    parser.add_argument("--points", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20, help="of timing the files at the end")
    parser.add_argument("--resume", type=Path, help="folder for the state of each search")
    asked = parser.parse_args()
    shared = SharedModels(asked.shared)
    for name in asked.models:
        compare(shared, name, asked)


def compare(shared: SharedModels, name: str, asked: argparse.Namespace) -> None:
    """Print one model's table."""
    samples = shared.calibration(name, asked.samples)
    batches = list(batched(samples, asked.batch)) if asked.batch > 1 else samples
    start = time.monotonic()
    result = qwrap.search(
        shared.path(name),
        batches,
        budget=asked.budget,
        choices=asked.choices,
        by=asked.by,
        method=asked.method,
        measure=asked.measure,
        samples=asked.measured,
        points=asked.points,
        threads=asked.threads,
        resume=None if asked.resume is None else asked.resume / f"{name}.json",
    )
    print(f"\n{name}: searched in {time.monotonic() - start:.0f} s\n{result}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": shared.path(name), **made(shared, name, result, batches, Path(folder))}
        show(shared, name, files, batches[0], asked)


def made(
    shared: SharedModels, name: str, result: qwrap.SearchResult, batches: Any, folder: Path
) -> dict[str, Path]:
    """Write the files that are compared."""
    configs = {
        "all 8 bits": qwrap.QConfig(scope="all"),
        "all 16 bits": qwrap.QConfig(scope="all", activation="uint16"),
        "all kernels 8 bits": qwrap.QConfig(scope="kernels"),
        "default": qwrap.QConfig(),
        "search": result.config_of(),
    }
    by_order = greedy_point(result)
    if by_order is not None:
        configs["greedy"] = result.config_of(by_order)
    files = {}
    for label, config in configs.items():
        model = qwrap.load(shared.path(name)).eval()
        qwrap.prepare(model, config)
        qwrap.calibrate(model, batches, progress=False)
        files[label] = folder / f"{label}.onnx"
        qwrap.export(model, files[label])
    return files


def greedy_point(result: qwrap.SearchResult) -> Point | None:
    """Return the greedy order's point at the budget of the search, by the same losses and costs.

    None if it does not get there: no step by itself saves what conversions around it cost.
    """
    assert result.sensitivity is not None
    budget = qwrap.Budget.parse(result.asked)
    limits = budget.limits(result.costs, result.groups)
    loss = LinearCost(name="loss", of=result.sensitivity.losses)
    try:
        assignment = greedy(result.groups, loss, limits)
    except qwrap.QwrapError as error:
        print(f"greedy: {error}")
        return None
    known = [point for point in result.points if point.assignment == assignment]
    if not known:
        raise SystemExit("the greedy order's assignment was not evaluated")
    print(f"greedy: loss {known[0].measured.loss:.4g}, {known[0].costs}")
    return known[0]


def show(
    shared: SharedModels,
    name: str,
    files: dict[str, Path],
    inputs: Inputs,
    asked: argparse.Namespace,
) -> None:
    """Print the metric, bytes and latency of each file."""
    times = latency(files, inputs, asked.threads, asked.rounds)
    print(f"{'':20s} {'metric':>9s} {'bytes':>11s} {'ms':>8s} {'of float':>9s} {'fastest':>8s}")
    for label, path in files.items():
        metric = next(iter(shared.evaluate(name, runner(path)).values()))
        took = times[label]
        print(
            f"{label:20s} {metric:9.4f} {path.stat().st_size:11d} {took.seconds * 1e3:8.3f} "
            f"{took.ratio:9.3f} {took.fastest_ratio:8.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
