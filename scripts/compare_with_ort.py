#!/usr/bin/env python3
"""Quantize real models with onnxruntime.quantization and with qwrap.ort, and compare the files.

Usage:

    python scripts/compare_with_ort.py                         # every model, form and method
    python scripts/compare_with_ort.py resnet20_cifar10 minilm_l6 --samples 4 --methods MinMax
    python scripts/compare_with_ort.py mnist_cntk --verbose    # and the first differences

A row: whether both files are of one form, the largest relative difference of two scales, how far
each is from the float model (the lowest SQNR over the samples, onnxruntime without optimizations),
and the drop-in's wall time over the other's. Constant nodes become initializers first, and the
incumbent's percentile takes the right edge of
the bin it finds (see ``ort_script.corrected_percentile``).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from ort_script import INCUMBENT, OWN, Batch, Setting, quantize
from same_form import Comparison, compare
from shared_models import SharedModels, default_folder

FORMS = ("QDQ", "QOperator", "dynamic")
METHODS = ("MinMax", "Percentile", "Distribution", "Entropy")
HEADER = ("model", "form", "method", "one form", "scales", "SQNR ours/theirs, dB", "time")
SINGLE_SHAPE = ("ppocr_en_number_rec", "minilm_l6")  # whose samples differ in size


@dataclass
class Outcome:
    """What one module made of one model: a file, or why there is none."""

    model: onnx.ModelProto | None
    seconds: float
    error: str = ""


def run_script(module: str, source: Path, batches: Sequence[Batch], setting: Setting) -> Outcome:
    """Quantize ``source`` with ``module``."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        try:
            model = quantize(module, source, batches, Path(folder) / "out.onnx", setting)
        except Exception as error:  # whatever stops the incumbent is a row of the table
            return Outcome(None, time.perf_counter() - start, f"{type(error).__name__}: {error}")
        return Outcome(model, time.perf_counter() - start)


def outputs(source: Path | onnx.ModelProto, batches: Sequence[Batch]) -> list[list[np.ndarray]]:
    """Run the model in onnxruntime, unoptimised."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    data = source if isinstance(source, Path) else source.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [session.run(None, dict(batch)) for batch in batches]


def quality(outcome: Outcome, wanted: list[list[np.ndarray]], batches: Sequence[Batch]) -> str:
    """The lowest SQNR over the samples, in dB, or why there is none."""
    if outcome.model is None:
        return outcome.error.split(":")[0]
    try:
        got = outputs(outcome.model, batches)
    except Exception as error:  # the file does not load
        return f"does not run: {type(error).__name__}"
    return f"{min(map(_sqnr, wanted, got)):.1f}"


def _sqnr(wanted: list[np.ndarray], got: list[np.ndarray]) -> float:
    a, b = (
        np.concatenate([np.ravel(o).astype(np.float64) for o in side if o.dtype.kind == "f"])
        for side in (wanted, got)
    )
    noise = float(np.linalg.norm(a - b))
    return float("inf") if noise == 0 else 20 * float(np.log10(np.linalg.norm(a) / noise))


def lifted(source: Path, folder: Path) -> Path:
    """Save the model with initializers for Constant nodes, which the incumbent cannot quantize."""
    model = onnx.load(source)
    graph, kept = model.graph, []
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    onnx.save(model, folder / source.name)
    return folder / source.name


def settings(source: Path, forms: Sequence[str], methods: Sequence[str]) -> Iterator[Setting]:
    """The forms and methods of one model."""
    opset = max(o.version for o in onnx.load(source, load_external_data=False).opset_import)
    for form in forms:
        if form == "dynamic":
            yield Setting(form=form, weight="QUInt8")
            continue
        for method in methods:
            kind = "QFLOAT8E4M3FN" if method == "Distribution" else ""
            if kind and form == "QOperator":
                continue  # float8 operators exist on CUDA alone
            # Below opset 13 the incumbent's files with axes do not load; the drop-in raises it.
            channels = not kind and opset >= 13
            yield Setting(form, kind or "QUInt8", kind or "QInt8", method, per_channel=channels)


def row(
    name: str, setting: Setting, source: Path, batches: Sequence[Batch]
) -> tuple[list[str], Comparison | None, str]:
    """One row of the table, what differs, and errors."""
    theirs, ours = (run_script(module, source, batches, setting) for module in (INCUMBENT, OWN))
    wanted = outputs(source, batches)
    found = None
    if theirs.model is not None and ours.model is not None:
        found = compare(theirs.model, ours.model)
    cells = [
        name,
        setting.form,
        "" if setting.form == "dynamic" else setting.method,
        "-" if found is None else ("yes" if found.same else f"{len(found.form)} differ"),
        "-" if found is None else f"{found.scale:.1e}",
        " / ".join(quality(outcome, wanted, batches) for outcome in (ours, theirs)),
        f"{ours.seconds / theirs.seconds:.2f}",
    ]
    return cells, found, " | ".join(o.error for o in (ours, theirs) if o.error)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", help="names of shared models; all without any")
    parser.add_argument("--shared", type=Path, default=default_folder())
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--verbose", action="store_true", help="print what differs")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    shared = SharedModels(arguments.shared)
    print(f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}")
    for name in arguments.models or shared.names:
        batches = shared.calibration(name, arguments.samples)
        if name in SINGLE_SHAPE:
            batches = [batches[0]] * arguments.samples
        with tempfile.TemporaryDirectory() as folder:
            source = lifted(shared.path(name), Path(folder))
            for setting in settings(source, arguments.forms, arguments.methods):
                cells, found, errors = row(name, setting, source, batches)
                print(f"| {' | '.join(cells)} |", flush=True)
                if arguments.verbose and (errors or (found and not found.same)):
                    print(errors or found)


if __name__ == "__main__":
    main()
