"""Rankings of layers by sensitivity against brute force: real files, run by onnxruntime.

    python scripts/bench_sensitivity.py resnet20_cifar10 mobilenetv2_cifar10_128 --json found.json

Brute force prepares, calibrates and exports the model once for each layer and choice, with all
else float, and runs the optimised file in onnxruntime on the same samples. What its outputs differ
from the float file's is measured in the same way. The tables say how the ranks of the losses agree
(Spearman), and how long each way took; the table goes to standard output.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from shared_models import Inputs, SharedModels, default_folder

import qwrap
from qwrap.mixed.choices import FLOAT, config_with
from qwrap.mixed.loss.outputs import Output, in_decibel, outputs_of_graph

MODELS = ("resnet20_cifar10", "mobilenetv2_cifar10_128", "minilm_l6")


@dataclass(slots=True, kw_only=True)
class Figures:
    """What was found for one model and choice of types.

    Attributes:
        model: its name.
        choice: its types.
        groups: how many layers.
        samples: how many.
        measured: Spearman's correlation of measured losses with brute force.
        fisher: the same of losses from gradients.
        fisher_measured: the same between these two.
        ratio: median of measured loss over brute force's.
        fisher_ratio: the same from gradients.
        seconds: way -> wall clock of all choices together.
        losses: layer -> loss by brute force, measured, from gradients.
    """

    model: str
    choice: str
    groups: int
    samples: int
    measured: float = 0.0
    fisher: float = 0.0
    fisher_measured: float = 0.0
    ratio: float = 0.0
    fisher_ratio: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    losses: dict[str, tuple[float, float, float]] = field(default_factory=dict)


class BruteForce:
    """Losses of real files.

    Args:
        path: the float file.
        samples: what is calibrated with and run.
        measure: as for ``qwrap.sensitivity``.
    """

    def __init__(self, path: Path, samples: Sequence[Inputs], measure: str) -> None:
        self._float = qwrap.load(path).eval()
        self._samples, self._measure = samples, measure
        self._wanted = _run(path, samples)
        first = [torch.from_numpy(x) for x in self._wanted[0]]
        self._outputs: list[Output] = outputs_of_graph(self._float.graph, first, measure)

    def loss(self, groups: Sequence[qwrap.Group], name: str, choice: qwrap.Choice) -> float:
        """Loss with one group quantized and all others float."""
        every = [qwrap.Group(g.name, g.nodes, (choice, FLOAT)) for g in groups]
        asked = {g.name: choice if g.name == name else FLOAT for g in groups}
        model = copy.deepcopy(self._float)
        qwrap.prepare(model, config_with(qwrap.QConfig(), every, asked))
        qwrap.calibrate(model, self._samples, progress=False)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "alone.onnx"
            qwrap.export(model, path)
            found = _run(path, self._samples)
        return self._distance(found)

    def _distance(self, found: Sequence[Sequence[np.ndarray]]) -> float:
        parts = []
        for output in self._outputs:
            pairs = [
                output.distance(
                    torch.from_numpy(a[output.index]), torch.from_numpy(b[output.index])
                )
                for a, b in zip(found, self._wanted, strict=True)
            ]
            error, scale = (sum(column) for column in zip(*pairs, strict=True))
            parts.append(error / scale)
        mean = statistics.mean(parts)
        return in_decibel(mean) if self._measure == "sqnr" else mean


def _run(path: Path, samples: Sequence[Inputs]) -> list[list[np.ndarray]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # Of a float layer between quantized tensors, as beside a residual connection, onnxruntime would
    # make an integer one and choose scales for its weights: then it is not one layer that hurts.
    session = onnxruntime.InferenceSession(
        os.fspath(path),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["WeightBiasQuantization"],
    )
    names = {i.name for i in session.get_inputs()}
    return [session.run(None, {k: v for k, v in s.items() if k in names}) for s in samples]


def measure(shared: SharedModels, name: str, arguments: argparse.Namespace) -> list[Figures]:
    """Figures of one model, one record a choice."""
    samples = shared.calibration(name, arguments.samples)
    choices = [qwrap.Choice.parse(text) for text in arguments.choices]
    model = qwrap.load(shared.path(name)).eval()
    settings = {
        "choices": choices,
        "samples": len(samples),
        "measure": arguments.measure,
        "progress": False,
    }
    seconds: dict[str, float] = {}
    found: dict[str, qwrap.Sensitivity] = {}
    for method in ("measured", "fisher"):
        start = time.perf_counter()
        found[method] = qwrap.sensitivity(model, samples, method=method, **settings)
        seconds[method] = time.perf_counter() - start
        _progress(f"{name}: {method}: {seconds[method]:.0f} s")
    start = time.perf_counter()
    brute: dict[tuple[str, qwrap.Choice], float] = {}
    force = BruteForce(shared.path(name), samples, arguments.measure)
    groups = found["measured"].groups
    keys = [(g.name, c) for c in choices for g in groups if c in g.choices]
    for i, (group, choice) in enumerate(keys):
        brute[group, choice] = force.loss(groups, group, choice)
        if i % 10 == 9:
            _progress(f"{name}: {i + 1} of {len(keys)} files, {time.perf_counter() - start:.0f} s")
    seconds["brute force"] = time.perf_counter() - start
    return [_figures(name, c, found, brute, len(samples), seconds) for c in choices]


def _figures(
    name: str,
    choice: qwrap.Choice,
    found: dict[str, qwrap.Sensitivity],
    brute: dict[tuple[str, qwrap.Choice], float],
    samples: int,
    seconds: dict[str, float],
) -> Figures:
    measured, fisher = found["measured"], found["fisher"]
    keys = [key for key in brute if key[1] == choice]
    ratios = [
        [one.losses[key] / brute[key] for key in keys if brute[key] > 0]
        for one in (measured, fisher)
    ]
    return Figures(
        model=name,
        choice=str(choice),
        groups=len(keys),
        samples=samples,
        measured=measured.spearman(brute, choice),
        fisher=fisher.spearman(brute, choice),
        fisher_measured=fisher.spearman(measured, choice),
        ratio=statistics.median(ratios[0]),
        fisher_ratio=statistics.median(ratios[1]),
        seconds=seconds,
        losses={k[0]: (brute[k], measured.losses[k], fisher.losses[k]) for k in keys},
    )


def markdown(figures: Sequence[Figures]) -> str:
    """The figures as a table."""
    lines = [
        "| model | types | layers | samples | measured: Spearman | ratio | s "
        "| from gradients: Spearman | ratio | s | brute force s |",
        "| --- " * 11 + "|",
    ]
    for f in figures:
        s = f.seconds
        lines.append(
            f"| {f.model} | {f.choice} | {f.groups} | {f.samples} | {f.measured:.3f} "
            f"| {f.ratio:.2f} | {s['measured']:.0f} | {f.fisher:.3f} | {f.fisher_ratio:.2f} "
            f"| {s['fisher']:.0f} | {s['brute force']:.0f} |"
        )
    return "\n".join(lines)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--choices", nargs="+", default=["uint8/int8"])
    parser.add_argument("--measure", default="kl", choices=("kl", "error", "sqnr"))
    parser.add_argument("--shared", type=Path, default=default_folder())
    parser.add_argument("--json", type=Path, help="write all figures there")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    torch.set_num_threads(1)
    shared = SharedModels(arguments.shared)
    figures: list[Figures] = []
    for name in arguments.models:
        figures += measure(shared, name, arguments)
        if arguments.json:
            plain = [asdict(f) for f in figures]
            arguments.json.write_text(json.dumps(plain, indent=1), encoding="utf-8")
    print(markdown(figures))


if __name__ == "__main__":
    main()
