"""What calibrating costs: time over the bare forward, and peak memory with few and many samples.

    python scripts/bench_calibration.py --of qwrap onnxruntime

Every measurement runs in a fresh process. This one imports nothing large: on Linux a child's
``ru_maxrss`` starts from its parent's.
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
_OWN = ("forward", "minmax", "percentile", "mse")
_ONNXRUNTIME = ("ort-forward", "ort-minmax", "ort-percentile", "ort-entropy")


def run(what: str, methods: Sequence[str], samples: int, arguments: argparse.Namespace) -> Any:
    """What calibration_run.py prints when asked for ``what``."""
    options = {
        "--model": arguments.model,
        "--shared": arguments.shared,
        "--samples": samples,
        "--batch-size": arguments.batch_size,
        "--threads": arguments.threads,
        "--rounds": arguments.rounds,
    }
    command = [sys.executable, str(_SCRIPTS / "calibration_run.py"), what, *methods]
    command += [str(part) for option in options.items() for part in option]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def compare(
    methods: Sequence[str], samples: tuple[int, int], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per method; the first of ``methods`` is the bare forward the others are over."""
    seconds = run("time", methods, samples[1], arguments)["seconds"]
    rows = []
    for method in methods:
        ratios = [a / b for a, b in zip(seconds[method], seconds[methods[0]], strict=True)]
        peaks = [run("memory", [method], n, arguments)["peak_MiB"] for n in samples]
        rows.append({
            "method": method,
            "samples": samples,
            "seconds": statistics.median(seconds[method]),
            "over_forward": statistics.median(ratios),
            "peak_MiB": peaks,
            "peak_ratio": peaks[1] / peaks[0],
        })
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| method | samples | seconds | over the forward | peak, MiB | peak ratio |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        few, many = row["samples"]
        low, high = row["peak_MiB"]
        lines.append(
            f"| {row['method']} | {few}, {many} | {row['seconds']:.2f} | {row['over_forward']:.2f} "
            f"| {low:.0f}, {high:.0f} | {row['peak_ratio']:.3f} |"
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    shared = os.environ.get("QWRAP_SHARED", _SCRIPTS.parents[1] / "shared")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mobilenetv2_cifar10_128")
    parser.add_argument("--shared", type=Path, default=shared)
    parser.add_argument("--samples", type=int, nargs=2, default=(32, 512), metavar=("FEW", "MANY"))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--of",
        nargs="+",
        choices=("qwrap", "onnxruntime"),
        default=["qwrap"],
        help="whose calibration to measure",
    )
    parser.add_argument(
        "--onnxruntime-samples",
        type=int,
        nargs=2,
        default=(32, 128),
        metavar=("FEW", "MANY"),
        help="fewer: histogram methods keep every activation of every sample",
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    rows: list[dict[str, Any]] = []
    if "qwrap" in arguments.of:
        rows += compare(_OWN, arguments.samples, arguments)
    if "onnxruntime" in arguments.of:
        rows += compare(_ONNXRUNTIME, arguments.onnxruntime_samples, arguments)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
