"""qwrap's file, made as a user makes it, and what ``qwrap.verify`` says of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from incumbent import one_line
from results import FileResult
from shared_models import Inputs

import qwrap

# Column of the results -> attribute of the report that ``qwrap.verify`` returns.
VERIFY_FIGURES = {
    "differing_codes": "differing_codes",
    "codes": "codes",
    "largest_steps": "largest_steps",
    "sqnr_dB": "sqnr",
    "top1_agreement": "top1_agreement",
}


def quantize(source: Path, folder: Path, samples: Sequence[Inputs]) -> FileResult:
    """``qwrap.quantize`` with no options beyond the samples."""
    target = folder / f"{source.stem}.qwrap.onnx"
    result = FileResult(method="qwrap")
    start = time.perf_counter()
    try:
        qwrap.quantize(source, target, calibration=samples)
    except Exception as error:  # one model that fails does not end the run over all of them
        result.error = one_line(error)
    else:
        result.file = str(target)
    result.seconds = time.perf_counter() - start
    return result


def verify(
    source: Path, quantized: Path, calibration: Sequence[Inputs], batches: Sequence[Inputs]
) -> dict[str, Any]:
    """The simulation, calibrated as for ``quantized``, against that file in onnxruntime."""
    try:
        model = qwrap.load(source)
        qwrap.prepare(model)
        qwrap.calibrate(model, calibration, progress=False)
        report = qwrap.verify(model, quantized, batches)
        return {column: getattr(report, name) for column, name in VERIFY_FIGURES.items()}
    except Exception as error:  # as above
        return {"error": one_line(error)}
