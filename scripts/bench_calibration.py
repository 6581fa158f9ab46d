"""What calibrating costs: time over the bare forward, and peak memory with few and many samples.

    python scripts/bench_calibration.py --models resnet50 mobilenet_v2 bert_base --samples 32 128
    python scripts/bench_calibration.py --only memory --samples 32 512 --methods mse

Models are networks of ``scripts/networks`` or shared models. Time is taken in one process per
model and number of samples, all methods in turn in each round, so that ratios are within a run;
onnxruntime's methods are over onnxruntime's forward. Memory is taken in a process of its own per
method. What needs more than ``--limit-gib`` is reported so: histogram methods of onnxruntime keep
every activation of every sample.

This process imports nothing large: on Linux a child's ``ru_maxrss`` starts from its parent's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SCRIPTS = Path(__file__).resolve().parent
_QWRAP = ("minmax", "ema", "percentile", "mse", "l1", "cosine", "entropy", "distribution", "auto")
_ONNXRUNTIME = ("ort-minmax", "ort-percentile", "ort-entropy")
_BASE = {"q": "forward", "o": "ort-forward"}


def run(what: str, model: str, methods: Sequence[str], samples: int, options: Any) -> Any:
    """Return what calibration_run.py prints when asked for ``what``, None if that is nothing."""
    given = {
        "--model": model,
        "--shared": options.shared,
        "--workdir": options.workdir,
        "--samples": samples,
        "--batch-size": options.batch_size,
        "--threads": options.threads,
        "--rounds": options.rounds,
        "--limit-gib": options.limit_gib,
    }
    command = [sys.executable, str(_SCRIPTS / "calibration_run.py"), what, *methods]
    command += [str(part) for option in given.items() for part in option]
    environment = {**os.environ, "QWRAP_BENCH_OP_TYPES": ",".join(options.ort_op_types)}
    if what == "memory":
        # glibc's threshold moves with what was freed before, and the peak by 5 % with it.
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout) if done.stdout else None


def times(model: str, samples: int, options: Any) -> list[dict[str, Any]]:
    """Return a row for each method: seconds, over its forward, and over onnxruntime's entropy."""
    methods = list(options.methods)
    bases = {m: "ort-forward" if m.startswith("ort-") else "forward" for m in methods}
    result = run("time", model, [*dict.fromkeys(bases.values()), *methods], samples, options)
    seconds = result.get("seconds", {})
    rows = []
    for method in methods:
        row: dict[str, Any] = {"model": model, "samples": samples, "method": method}
        if method not in seconds:
            rows.append({**row, "failed": result["failed"]})
            continue
        row["seconds"] = statistics.median(seconds[method])
        row["over_forward"] = _ratio(seconds[method], seconds[bases[method]])
        if "ort-entropy" in seconds and method != "ort-entropy":
            row["over_ort_entropy"] = _ratio(seconds[method], seconds["ort-entropy"])
        rows.append(row)
    return rows


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def peaks(model: str, options: Any) -> list[dict[str, Any]]:
    """Return a row for each method: peak memory at every number of samples."""
    rows = []
    for method in options.methods:
        measured = [run("memory", model, [method], n, options) for n in options.samples]
        cells = {
            f"peak_{n}": m.get("peak_MiB") for n, m in zip(options.samples, measured, strict=True)
        }
        known = [m.get("peak_MiB") for m in measured]
        ratio = known[-1] / known[0] if known[0] and known[-1] else None
        rows.append({"model": model, "method": method, **cells, "ratio": ratio})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a Markdown table; a value that is missing is a dash."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    lines += [f"| {' | '.join(_shown(row.get(name)) for name in names)} |" for row in rows]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
    return "-" if value is None else str(value)


def _arguments() -> argparse.Namespace:
    shared = os.environ.get("QWRAP_SHARED", _SCRIPTS.parents[1] / "shared")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mobilenetv2_cifar10_128"])
    parser.add_argument("--methods", nargs="+", default=[*_QWRAP, *_ONNXRUNTIME])
    parser.add_argument("--samples", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--only", choices=("time", "memory"))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit-gib", type=float, default=16.0)
    parser.add_argument("--shared", type=Path, default=shared)
    parser.add_argument("--workdir", type=Path, default=Path("build/networks"), help="files stay")
    parser.add_argument(
        "--ort-op-types",
        nargs="+",
        default=[],
        help="operators that onnxruntime calibrates, where its histograms fail on others: on masks",
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    options = _arguments()
    found: dict[str, list[dict[str, Any]]] = {"time": [], "memory": []}
    for model in options.models:
        run("export", model, [], 1, options)
        if options.only != "memory":
            for samples in options.samples:
                found["time"] += times(model, samples, options)
        if options.only != "time":
            found["memory"] += peaks(model, options)
    for rows in filter(None, found.values()):
        print(f"{table(rows)}\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
