"""From a float file to a quantized one in one call."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import Any

from qwrap.algorithms.bias_correction import correct_biases
from qwrap.algorithms.gptq import round_weights
from qwrap.config import QConfig
from qwrap.errors import ExportError
from qwrap.export.exporter import export, same_file
from qwrap.graph.load import Source
from qwrap.graph.save import check_target
from qwrap.model.batches import count_batches, iterate
from qwrap.model.build import load
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.calibrate import calibrate
from qwrap.quant.prepare import plan_of, prepare

KEPT = 32  # batches that stay in memory for what follows calibration


def quantize(
    source: Source,
    target: str | os.PathLike[str],
    *,
    calibration: Iterable[Any],
    config: QConfig | None = None,
    progress: bool = True,
) -> WrappedModel:
    """Quantize an ONNX file with calibration data and write a QDQ file for onnxruntime.

    Loads, prepares and calibrates; then rounds weights so that their errors cancel, or else
    corrects biases, each only if held-back batches come out closer to the float model; exports.
    The data is read once; up to 32 batches of it stay in memory.

    Args:
        source: the float model.
        target: file to make or replace; not the one that ``source`` names.
        calibration: batches as for ``calibrate``; some 50 to 500 samples like those the model
            will see.
        config: types, ranges and exclusions.
        progress: show a bar on a terminal.

    Returns:
        The calibrated model: ``model.plan.summary()`` says what is quantized, and
        ``qwrap.verify(model, target, batches)`` how close simulation and deployment are.

    Raises:
        ModelError: the source cannot be loaded.
        InputError: there is no batch, or one does not fit.
        ExportError: the target cannot be written, or is the source.
    """
    if isinstance(source, (str, os.PathLike)) and same_file(source, target):
        raise ExportError(f"{target}: is the float model itself; write to another file")
    check_target(target)
    model = load(source).eval()
    prepare(model, config)
    batches = iterate(calibration, model)
    kept = list(itertools.islice(batches, KEPT))
    calibrate(
        model, itertools.chain(kept, batches), progress=progress, total=count_batches(calibration)
    )
    if round_weights(model, kept):
        plan_of(model).changes.append("weights rounded so that their errors cancel (GPTQ)")
    elif correct_biases(model, kept):  # what GPTQ leaves of the mean error is too little to tell
        plan_of(model).changes.append("biases corrected for the mean error of their channels")
    export(model, target)
    return model
