"""What ``qwrap.finetune`` is worth on real models: calibration alone against training after it.

``python scripts/finetune_models.py minilm_l6 resnet20_cifar10`` prints, for every model, quantized
with the defaults and with all that has an integer kernel: how far the deployed file is from the
float one in onnxruntime on validation samples, and the model's own metric there. Training sees
calibration samples only, without labels.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from shared_models import Inputs, Run, SharedModels, default_folder

import qwrap

Figures = dict[str, float]

MASK = "attention_mask"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["minilm_l6", "resnet20_cifar10"])
    parser.add_argument("--shared", type=Path, default=default_folder())
    parser.add_argument("--samples", type=int, default=256, help="calibration samples")
    parser.add_argument("--batch", type=int, default=16, help="samples in a batch")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--scale-lr", type=float, default=3e-3)
    parser.add_argument("--block-weight", type=float, default=1.0)
    parser.add_argument("--loss", default="mse")
    parser.add_argument("--training", default="lsq")
    parser.add_argument("--weight", default="int8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--everything", action="store_true", help="skip the default placement")
    parser.add_argument("--all-steps", action="store_true", help="print the whole report")
    asked = parser.parse_args()
    shared = SharedModels(asked.shared)
    for name in asked.models:
        for everything in (True,) if asked.everything else (False, True):
            compare(shared, name, asked, everything=everything)


def compare(
    shared: SharedModels, name: str, asked: argparse.Namespace, *, everything: bool
) -> None:
    """Print one model's figures before and after training."""
    samples = shared.calibration(name, asked.samples)
    batches = list(batched(samples, asked.batch))
    model = qwrap.load(shared.path(name))
    settings = {"training": asked.training, "weight": asked.weight}
    qwrap.prepare(model, qwrap.QConfig(scope="kernels" if everything else "faster", **settings))
    qwrap.calibrate(model, samples, progress=False)
    print(f"{name}, {'everything' if everything else 'defaults'}, weights {asked.weight}")
    show("float", measure(shared, name, shared.path(name)))
    with tempfile.TemporaryDirectory() as folder:
        show("calibrated", exported(shared, name, model, Path(folder)))
        start = time.monotonic()
        distillation = qwrap.Distillation(
            model, outputs=asked.loss, block_weight=asked.block_weight
        )
        report = qwrap.finetune(
            model,
            batches,
            steps=asked.steps,
            loss=distillation,
            lr=asked.lr,
            scale_lr=asked.scale_lr,
            seed=asked.seed,
        )
        seconds = time.monotonic() - start
        show("fine-tuned", exported(shared, name, model, Path(folder)))
    print(f"  {report if asked.all_steps else report.summary()}", flush=True)
    print(f"  {seconds / max(report.history[-1].step, 1):.2f} s a step", flush=True)


def batched(samples: Sequence[Inputs], size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield samples put together, those of like lengths, padded, where the model has a mask."""
    if MASK in samples[0]:
        samples = sorted(samples, key=lambda inputs: inputs[MASK].shape[1])
    for start in range(0, len(samples), size):
        part = samples[start : start + size]
        yield {key: stacked([inputs[key] for inputs in part], MASK in part[0]) for key in part[0]}


def stacked(arrays: Sequence[np.ndarray], padded: bool) -> np.ndarray:
    """Return arrays of one sample each as one array; zeros are the padding."""
    if padded:
        longest = max(array.shape[1] for array in arrays)
        arrays = [np.pad(a, [(0, 0), (0, longest - a.shape[1])]) for a in arrays]
    return np.concatenate(arrays)


def exported(shared: SharedModels, name: str, model: qwrap.WrappedModel, folder: Path) -> Figures:
    """Write the model and return the figures of the file."""
    path = folder / "quantized.onnx"
    qwrap.export(model, path)
    return measure(shared, name, path)


def measure(shared: SharedModels, name: str, path: Path) -> Figures:
    """Return the metric of a file, and its distance from the float file."""
    run, reference = runner(path), runner(shared.path(name))
    metric = {k: v for k, v in shared.evaluate(name, run).items() if k != "samples"}
    samples = shared.validation(name, 400)
    if name == "minilm_l6":
        return metric | similarity(embeddings(run, samples), embeddings(reference, samples))
    pairs = [(run(inputs)[0], reference(inputs)[0]) for inputs in samples]
    noise = sum(float(np.square(x - y, dtype=np.float64).sum()) for x, y in pairs)
    power = sum(float(np.square(y, dtype=np.float64).sum()) for _, y in pairs)
    return metric | {"SQNR dB": 10 * np.log10(power / noise) if noise else np.inf}


def runner(path: Path) -> Run:
    """Return what runs a file in onnxruntime, with all optimisations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, dict(inputs))


def embeddings(run: Run, samples: Sequence[Inputs]) -> np.ndarray:
    """Return the normalised mean of the token vectors of each text."""
    rows = []
    for inputs in samples:
        mask = inputs[MASK][..., None]
        mean = (run(inputs)[0] * mask).sum(1) / mask.sum(1)
        rows.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(rows)


def similarity(found: np.ndarray, wanted: np.ndarray) -> Figures:
    """Compare embeddings, and the similarities of all pairs of texts by them."""
    pairs = np.triu_indices(len(found), 1)
    ours, theirs = (found @ found.T)[pairs], (wanted @ wanted.T)[pairs]
    return {
        "cosine to float": float((found * wanted).sum(1).mean()),
        "least cosine": float((found * wanted).sum(1).min()),
        "error of similarities": float(np.abs(ours - theirs).mean()),
        "Spearman": float(np.corrcoef(ranks(ours), ranks(theirs))[0, 1]),
    }


def ranks(x: np.ndarray) -> np.ndarray:
    """Return the rank of every number."""
    found = np.empty(len(x))
    found[np.argsort(x, kind="stable")] = np.arange(len(x))
    return found


def show(what: str, figures: Mapping[str, Any]) -> None:
    """Print one line."""
    text = "  ".join(f"{key} {value:.5g}" for key, value in figures.items())
    print(f"  {what:11} {text}", flush=True)


if __name__ == "__main__":
    main()
