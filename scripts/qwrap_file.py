"""qwrap's file, made as a user makes it, and what ``qwrap.verify`` says of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from file_order import one_line
from results import FileResult
from shared_models import Inputs

import qwrap
from qwrap.verify import LevelReport


def quantize(
    source: Path, folder: Path, samples: Sequence[Inputs]
) -> tuple[FileResult, qwrap.WrappedModel | None]:
    """The file and the model of ``qwrap.quantize`` with no options beyond the samples."""
    target = folder / f"{source.stem}.qwrap.onnx"
    result, model = FileResult(method="qwrap"), None
    start = time.perf_counter()
    try:
        model = qwrap.quantize(source, target, calibration=samples)
    except Exception as error:  # one model that fails does not end the run over all of them
        result.error = one_line(error)
    else:
        result.file = str(target)
    result.seconds = time.perf_counter() - start
    return result, model


def verify(model: qwrap.WrappedModel, quantized: str, batches: Sequence[Inputs]) -> dict[str, Any]:
    """What ``qwrap.verify`` says of the model and the file made from it, both levels."""
    try:
        report = qwrap.verify(model, quantized, batches)
    except Exception as error:  # as above
        return {"error": one_line(error)}
    levels = {"specification": report.specification, "deployed": report.deployed}
    return {name: _figures(level) for name, level in levels.items()}


def _figures(level: LevelReport) -> dict[str, Any]:
    return {
        "differing_codes": level.differing,
        "codes": level.elements,
        "largest_steps": level.worst_step,
        "sqnr_dB": level.sqnr,
        "top1_agreement": level.top1_agreement,
    }
