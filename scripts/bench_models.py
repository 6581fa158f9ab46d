"""Float, qwrap and onnxruntime's quantize_static on every shared model, in one run.

    python scripts/bench_models.py --json results.json --update-readme

All three see the same calibration samples; the task metric is over all validation samples. Of the
incumbent's calibration methods, each with the file as it is and pre-processed, the best counts.
Latencies are ratios to the float file in interleaved rounds. The table goes to standard output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import incumbent
import numpy as np
import onnxruntime
import results
from judge import judge
from measurements import latency
from readme_section import update_section
from results import FileResult, ModelResult
from results_table import markdown
from shared_models import SharedModels, default_folder

_README = Path(__file__).resolve().parents[1] / "README.md"
_THREADS = (1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one run of the benchmark does."""

    methods: Sequence[str]
    preparations: Sequence[str]
    samples: int
    verify_samples: int
    rounds: int
    workdir: Path
    skip_qwrap: bool


def measure(
    shared: SharedModels, name: str, settings: Settings, cached: ModelResult | None
) -> ModelResult:
    """All figures of one model; the incumbent's files and metrics come from ``cached`` if given."""
    source = shared.path(name)
    calibration = shared.calibration(name, settings.samples)
    reference = FileResult(method="float", file=str(source))
    judge(shared, name, reference)
    model = ModelResult(model=name, samples=len(calibration), reference=reference)
    if cached is not None and cached.samples == len(calibration):
        model.incumbent = cached.incumbent
        for attempt in model.incumbent:  # latency means something only beside the others
            attempt.latency, attempt.fastest_latency, attempt.milliseconds = {}, {}, {}
    else:
        model.incumbent = _attempts(shared, name, calibration, settings)
    if not settings.skip_qwrap:
        _measure_qwrap(shared, model, calibration, settings)
    _measure_latency(model, shared.validation(name, 1)[0], settings.rounds)
    _show_errors(model)
    return model


def _attempts(
    shared: SharedModels, name: str, calibration: Sequence[Any], settings: Settings
) -> list[FileResult]:
    done = []
    for preparation in settings.preparations:
        for method in settings.methods:
            _progress(f"{name}: quantize_static, {method}, {preparation}")
            attempt = incumbent.attempt(
                shared.path(name), settings.workdir, calibration, method, preparation
            )
            if attempt.exists:
                judge(shared, name, attempt)
            done.append(attempt)
    return done


def _measure_qwrap(
    shared: SharedModels, model: ModelResult, calibration: Sequence[Any], settings: Settings
) -> None:
    import qwrap_file  # torch loads only when it is needed

    _progress(f"{model.model}: qwrap")
    source = shared.path(model.model)
    model.qwrap, wrapped = qwrap_file.quantize(source, settings.workdir, calibration)
    if wrapped is not None:
        judge(shared, model.model, model.qwrap)
        batches = shared.validation(model.model, settings.verify_samples)
        model.verify = qwrap_file.verify(wrapped, model.qwrap.file, batches)


def _measure_latency(model: ModelResult, inputs: Any, rounds: int) -> None:
    """Time the float file, qwrap's and the incumbent's best of each preparation, side by side."""
    _progress(f"{model.model}: latency")
    best = [model.best_incumbent(each) for each in incumbent.PREPARATIONS]
    files = [model.reference, *(file for file in (model.qwrap, *best) if file and file.metric)]
    timed = {file.file: file for file in files if file.exists}
    for threads in _THREADS:
        measured = latency({key: key for key in timed}, inputs, threads, rounds)
        for key, figures in measured.items():
            file = timed[key]
            file.milliseconds[str(threads)] = figures.seconds * 1e3
            file.latency[str(threads)] = figures.ratio
            file.fastest_latency[str(threads)] = figures.fastest_ratio


def _show_errors(model: ModelResult) -> None:
    for file in (model.reference, *model.incumbent, *filter(None, [model.qwrap])):
        if file.error:
            what = " ".join(filter(None, (file.method, file.preparation)))
            _progress(f"{model.model}: {what}: {file.error}")
    if "error" in model.verify:
        _progress(f"{model.model}: verify: {model.verify['error']}")


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", help="names of models; all by default")
    parser.add_argument(
        "--methods", nargs="+", default=incumbent.METHODS, choices=incumbent.METHODS
    )
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--verify-samples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved latency rounds")
    parser.add_argument("--shared", type=Path, default=default_folder())
    parser.add_argument("--workdir", type=Path, default=Path("build/bench"), help="made files stay")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--incumbent-cache", type=Path, help="JSON of an earlier run")
    parser.add_argument("--skip-qwrap", action="store_true", help="float and incumbent only")
    parser.add_argument("--update-readme", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    settings = Settings(
        methods=arguments.methods,
        preparations=incumbent.PREPARATIONS,
        samples=arguments.samples,
        verify_samples=arguments.verify_samples,
        rounds=arguments.rounds,
        workdir=arguments.workdir.resolve(),
        skip_qwrap=arguments.skip_qwrap,
    )
    settings.workdir.mkdir(parents=True, exist_ok=True)
    shared = SharedModels(arguments.shared)
    cache = results.read(arguments.incumbent_cache) if arguments.incumbent_cache else {}
    models: list[ModelResult] = []
    for name in arguments.models or shared.names:
        models.append(measure(shared, name, settings, cache.get(name)))
        if arguments.json:  # after each model: a long run that is stopped leaves what it had
            results.write(arguments.json, _versions(settings), models)
    table = markdown(models)
    print(table)
    if arguments.update_readme:
        update_section(_README, "results", table)


def _versions(settings: Settings) -> dict[str, Any]:
    return {
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "calibration_samples": settings.samples,
        "verify_samples": settings.verify_samples,
        "latency_rounds": settings.rounds,
    }


if __name__ == "__main__":
    main()
