"""Output SQNR of every range method, and of "auto", on calibration and on held-back samples.

    python scripts/bench_auto.py --json auto.json

Every model is calibrated once; its scales are then chosen by each method in turn. SQNR is that of
the simulation against the float model in dB, the mean over samples; of several outputs the errors
over power add up.
"Regret" is how far "auto" lies below the best single method on that set; "forwards" is the
processor time of its choice over that of a float forward of the kept samples. The table goes to
standard output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from shared_models import Inputs, SharedModels, default_folder

import qwrap
from qwrap.config import METHODS

MODELS = (
    "mobilenetv2_cifar10_128",
    "squeezenet1_0_imagenet",
    "resnet20_cifar10",
    "minilm_l6",
    "espnetv2_s2_voc_256",
    "super_resolution",
    "ppocr_en_number_rec",
)


@dataclass(slots=True, kw_only=True)
class Figures:
    """What one method makes of one model.

    Attributes:
        model: its name.
        method: its name.
        calibration: SQNR in dB on the samples that calibration saw, their mean.
        held_back: the same on others.
        calibration_total: the same of all errors and powers added up: that of the few worst.
        held_back_total: the same on others.
        seconds: processor time that choosing the scales took.
        forwards: the same, over that of a float forward of the kept samples.
        chosen: for "auto", method -> number of tensors.
    """

    model: str
    method: str
    calibration: float
    held_back: float
    calibration_total: float
    held_back_total: float
    seconds: float
    forwards: float
    chosen: dict[str, int] = field(default_factory=dict)


def measure(shared: SharedModels, name: str, samples: int, config: qwrap.QConfig) -> list[Figures]:
    """Figures of all methods on one model."""
    calibration, held_back = shared.calibration(name, samples), shared.validation(name, samples)
    model = qwrap.load(shared.path(name)).eval()
    reference = qwrap.load(shared.path(name)).eval()
    qwrap.prepare(model, config)
    qwrap.calibrate(model, calibration, progress=False)
    kept = model.samples.batches
    forward = min(_seconds(lambda: [_run(reference, inputs) for inputs in kept]) for _ in range(2))
    found = []
    for method in (*METHODS, "auto"):
        seconds = _seconds(lambda method=method: qwrap.rescale(model, method=method))
        sets = [_sqnr(model, reference, part) for part in (calibration, held_back)]
        figures = Figures(
            model=name,
            method=method,
            calibration=sets[0][0],
            held_back=sets[1][0],
            calibration_total=sets[0][1],
            held_back_total=sets[1][1],
            seconds=seconds,
            forwards=seconds / forward,
        )
        for chosen in model.plan.methods.values():
            figures.chosen[chosen] = figures.chosen.get(chosen, 0) + 1
        found.append(figures)
        _progress(
            f"{name}: {method}: {sets[0][0]:.2f} {sets[1][0]:.2f} dB, {seconds:.1f} s"
            f" ({figures.forwards:.1f} forwards)"
        )
    return found


def _seconds(action: Callable[[], object]) -> float:
    start = time.process_time()  # of this process: others may be busy
    action()
    return time.process_time() - start


@torch.no_grad()
def _run(model: qwrap.WrappedModel, inputs: Inputs) -> list[torch.Tensor]:
    tensors = {name: torch.as_tensor(inputs[name]) for name in model.input_names}
    result = model(**tensors)
    return list(result) if isinstance(result, tuple) else [result]


def _sqnr(
    model: qwrap.WrappedModel, reference: qwrap.WrappedModel, samples: Iterable[Inputs]
) -> tuple[float, float]:
    """Mean of the samples' SQNRs, and the SQNR of their errors and powers added up."""
    shares, errors, powers = [], [], []
    for inputs in samples:
        pairs = list(zip(_run(model, inputs), _run(reference, inputs), strict=True))
        errors.append([float((a - b).double().square().sum()) for a, b in pairs])
        powers.append([float(b.double().square().sum()) for _, b in pairs])
        shares.append(_share(errors[-1], powers[-1]))
    total = _share(
        [sum(e) for e in zip(*errors, strict=True)], [sum(p) for p in zip(*powers, strict=True)]
    )
    return statistics.mean(map(_decibel, shares)), _decibel(total)


def _share(errors: Sequence[float], powers: Sequence[float]) -> float:
    return sum(e / p for e, p in zip(errors, powers, strict=True) if p > 0)


def _decibel(share: float) -> float:
    return -10 * math.log10(max(share, 1e-12))


def markdown(figures: Sequence[Figures]) -> str:
    """The figures as a table: a row for each model, both sets in each cell."""
    names = (*METHODS, "auto")
    lines = [
        f"| model | {' | '.join(names)} | regret | forwards | auto chose |",
        "| --- " * (len(names) + 4) + "|",
    ]
    for model, group in itertools.groupby(figures, key=lambda f: f.model):
        by_method = {f.method: f for f in group}
        cells = [f"{f.calibration:.2f} / {f.held_back:.2f}" for f in (by_method[n] for n in names)]
        auto = by_method["auto"]
        regret = [
            max(getattr(by_method[n], part) for n in METHODS) - getattr(auto, part)
            for part in ("calibration", "held_back")
        ]
        chosen = ", ".join(f"{n} {count}" for n, count in auto.chosen.items())
        cells += [f"{regret[0]:.2f} / {regret[1]:.2f}", f"{auto.forwards:.0f}", chosen]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--samples", type=int, default=64, help="of each of the two sets")
    parser.add_argument("--kept", type=int, default=64, help="samples that auto decides on")
    parser.add_argument("--activation", default="uint8")
    parser.add_argument("--shared", type=Path, default=default_folder())
    parser.add_argument("--json", type=Path, help="write all figures there")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    shared = SharedModels(arguments.shared)
    figures: list[Figures] = []
    for name in arguments.models:
        config = qwrap.QConfig(activation=arguments.activation, kept_samples=arguments.kept)
        figures += measure(shared, name, arguments.samples, config)
        if arguments.json:
            plain: list[Any] = [asdict(f) for f in figures]
            arguments.json.write_text(json.dumps(plain, indent=1), encoding="utf-8")
    print(markdown(figures))


if __name__ == "__main__":
    main()
