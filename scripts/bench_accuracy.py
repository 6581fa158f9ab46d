"""Task metric, seconds and memory of every shared model in 8 and 4 bits, beside other tools.

    python scripts/bench_accuracy.py --json accuracy.json --update-readme
    python scripts/bench_accuracy.py --python nncf=/venvs/nncf/bin/python --models resnet20_cifar10

Quantizes with qwrap's three efforts, with onnxruntime's ``quantize_static`` (the best of its
calibration methods, each with the file as it is and pre-processed) and with the rivals that a
Python is given for; each file in a process of its own, from the same calibration samples. The task
metric is onnxruntime's over all validation samples, latency is the interleaved ratio to the float
file. With ``--json`` a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from accuracy_files import RIVALS, Makers
from accuracy_goals import SETTINGS
from accuracy_results import Cell, Results, Way
from accuracy_table import markdown
from file_order import EFFORTS
from judge import judge
from measurements import latency
from readme_section import update_section
from results import FileResult
from shared_models import SharedModels, default_folder

_README = Path(__file__).resolve().parents[1] / "README.md"
_THREADS = (1, 2)


def measure(
    shared: SharedModels,
    name: str,
    results: Results,
    makers: Makers,
    ways: list[Way],
    arguments: argparse.Namespace,
) -> None:
    """Measure what ``results`` lack of one model."""
    if name not in results.references:
        reference = FileResult(method="float", file=str(shared.path(name)))
        judge(shared, name, reference)
        results.references[name] = reference
        results.write()
    missing = [
        (setting, way)
        for setting in arguments.settings
        if SETTINGS[setting].suits(name)
        for way in ways
        if makers.has(way, setting) and _is_open(results.find(name, setting, way), arguments)
    ]

    def make(job: tuple[str, Way]) -> Cell:
        cell = makers.make(name, *job)
        _show(cell)
        return cell

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for cell in pool.map(make, missing):
            results.put([cell])
    for setting in arguments.settings:
        _measure_latency(shared, name, setting, results, arguments.rounds)


def _is_open(cell: Cell | None, arguments: argparse.Namespace) -> bool:
    return cell is None or arguments.again or (arguments.retry and not cell.file.metric)


def _measure_latency(
    shared: SharedModels, name: str, setting: str, results: Results, rounds: int
) -> None:
    """Time the files of one setting side by side, if any of them has not been timed."""
    there = [cell for cell in results.of(name, setting) if cell.file.metric and cell.file.exists]
    if not rounds or all(cell.file.latency for cell in there):
        return
    timed = {cell.file.file: cell.file for cell in there}
    inputs = shared.validation(name, 1)[0]
    reference = str(shared.path(name))
    for threads in _THREADS:
        measured = latency({key: key for key in (reference, *timed)}, inputs, threads, rounds)
        for key, file in timed.items():
            file.milliseconds[str(threads)] = measured[key].seconds * 1e3
            file.latency[str(threads)] = measured[key].ratio
            file.fastest_latency[str(threads)] = measured[key].fastest_ratio
    results.write()


def _show(cell: Cell) -> None:
    what = f"{cell.model}, {cell.setting}, {cell.way.label}"
    file = cell.file
    figures = f"{next(iter(file.metric.values())):.4f}" if file.metric else file.error
    print(
        f"{what}: {figures} ({file.seconds:.1f} s, {file.peak / 2**20:.0f} MiB)",
        file=sys.stderr,
        flush=True,
    )


def _python(text: str) -> tuple[str, str]:
    rival, _, python = text.partition("=")
    if rival not in RIVALS or not python:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(RIVALS)}, =, path")
    return rival, os.path.abspath(python)  # not resolved: an environment's Python is a link


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", help="names of models; all by default")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--efforts", nargs="+", default=list(EFFORTS), choices=EFFORTS)
    parser.add_argument("--tools", nargs="*", default=["qwrap", "onnxruntime"])
    parser.add_argument(
        "--python",
        nargs="+",
        default=[],
        type=_python,
        metavar="RIVAL=PATH",
        help=f"Pythons of environments that have a rival: {', '.join(RIVALS)}",
    )
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--high-samples", type=int, default=1024, help="the same for effort high")
    parser.add_argument("--rounds", type=int, default=15, help="of latency; 0 takes none")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one file")
    parser.add_argument("--jobs", type=int, default=1, help="files at a time; spoils seconds")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--again", action="store_true", help="measure again what the JSON has")
    parser.add_argument("--shared", type=Path, default=default_folder())
    parser.add_argument("--workdir", type=Path, default=Path("build/accuracy"), help="files stay")
    parser.add_argument("--json", type=Path, help="write all figures there, go on from what is")
    parser.add_argument("--update-readme", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    shared = SharedModels(arguments.shared)
    results = Results(arguments.json)
    counts = dict.fromkeys(EFFORTS, arguments.samples) | {"high": arguments.high_samples}
    results.describe(
        samples=counts,
        latency_rounds=arguments.rounds,
        cores=os.cpu_count(),
        threads=os.environ.get("OMP_NUM_THREADS", "all"),
    )
    makers = Makers(
        shared, arguments.workdir.resolve(), dict(arguments.python), counts, arguments.timeout
    )
    ways = makers.ways(arguments.efforts, arguments.tools)
    for name in arguments.models or shared.names:
        measure(shared, name, results, makers, ways, arguments)
    table = markdown(results)
    print(table)
    if arguments.update_readme:
        update_section(_README, "accuracy", table)


if __name__ == "__main__":
    main()
