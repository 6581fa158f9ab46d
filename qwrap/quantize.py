"""From a float file to a quantized one in one call."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from qwrap.algorithms.bias_correction import correct_biases
from qwrap.algorithms.gptq import round_weights
from qwrap.config import QConfig
from qwrap.errors import ConfigError, ExportError
from qwrap.export.exporter import export, same_file
from qwrap.graph.load import Source
from qwrap.graph.save import check_target
from qwrap.model.batches import count_batches, iterate
from qwrap.model.build import load
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.samples import keep
from qwrap.quant.calibrate import calibrate, calibrating, run_batches
from qwrap.quant.prepare import observers, plan_of, prepare, stubs
from qwrap.quant.rescale import rescale
from qwrap.quant.statistics.statistics import Statistics
from qwrap.quant.tables import RangeTable
from qwrap.train.finetune import finetune as train

KEPT = 32  # batches that stay in memory for what follows calibration


def quantize(
    source: Source,
    target: str | os.PathLike[str],
    *,
    calibration: Iterable[Any] | None = None,
    statistics: Statistics | str | os.PathLike[str] | None = None,
    table: RangeTable | str | os.PathLike[str] | None = None,
    config: QConfig | None = None,
    finetune: int | None = None,
    progress: bool = True,
) -> WrappedModel:
    """Quantize an ONNX file with calibration data and write a QDQ file for onnxruntime.

    Loads, prepares and calibrates; then rounds weights so that their errors cancel, or else
    corrects biases, each only if held-back batches come out closer to the float model; exports.
    The data is read once, but for ``finetune``; up to 32 batches of it stay in memory.

    With ``statistics`` in a file, the same call again need not observe again: the first one writes
    the file, another one, of another method or with more nodes excluded, takes ranges from it, and
    one that was interrupted goes on where the file ends.

    Args:
        source: the float model.
        target: file to make or replace; not the one that ``source`` names.
        calibration: batches as for ``calibrate``; some 50 to 500 samples like those the model
            will see. None leaves weights and biases as they are, for which it takes data, and
            ranges to ``statistics``.
        statistics: what was seen before, or a file for it, which is made if there is none. As many
            batches as were run for it count as seen, so the data has to be the same, or to begin
            so.
        table: ranges and scales from elsewhere, or their file, which may be that of onnxruntime,
            TensorRT, AIMET or QNN. They are taken for what the table has; the other tensors need
            one of the above.
        config: types, ranges and exclusions.
        finetune: steps of training towards the float model's outputs after all of that, without
            labels, on the same data (see ``finetune``); some hundreds. Data that can be read once
            gives the batches that stayed in memory. None: no training.
        progress: show a bar on a terminal.

    Returns:
        The calibrated model: ``model.plan.summary()`` says what is quantized, and
        ``qwrap.verify(model, target, batches)`` how close simulation and deployment are.

    Raises:
        ModelError: the source cannot be loaded.
        InputError: there is no batch, or one does not fit.
        ConfigError: there are neither ``calibration`` nor ``statistics`` nor a ``table`` for the
            ranges, or no ``calibration`` for ``finetune``.
        NotCalibratedError: the table is all there is, and lacks tensors.
        TableError: the table's file cannot be read, or an entry does not fit its tensor.
        StatisticsError: the file is damaged, or of another model; it is not replaced.
        ExportError: the target cannot be written, or is the source.
    """
    if isinstance(source, (str, os.PathLike)) and same_file(source, target):
        raise ExportError(f"{target}: is the float model itself; write to another file")
    check_target(target)
    if finetune is not None and (finetune < 1 or calibration is None):
        raise ConfigError(f"finetune={finetune}: takes 1 step or more, and calibration data")
    if isinstance(statistics, (str, os.PathLike)):
        check_target(statistics)
    if isinstance(table, (str, os.PathLike)):
        table = RangeTable.read(table)
    model = load(source).eval()
    prepare(model, config)
    kept = []
    if table is None or calibration is not None or statistics is not None:
        kept = _calibrate(model, calibration, statistics, progress=progress)
    if table is not None:
        rescale(model, table)
    rounded = _improve(model, kept)
    if finetune is not None and calibration is not None:
        is_once = isinstance(calibration, Iterator) or hasattr(calibration, "get_next")
        data = kept if is_once else calibration
        _finetune(model, data, finetune, rounded=rounded, progress=progress)
    export(model, target)
    return model


def _improve(model: WrappedModel, kept: list[Any]) -> bool:
    """Make rounding errors good, in place; return whether weights were rounded for it."""
    if not kept:
        plan_of(model).changes.append("weights and biases as they were: no data to improve them by")
        return False
    if round_weights(model, kept):
        return True
    correct_biases(model, kept)  # what GPTQ leaves of the mean error is too little to tell
    return False


def _finetune(
    model: WrappedModel, data: Iterable[Any], steps: int, *, rounded: bool, progress: bool
) -> None:
    """Train ``model``, in place; scales of weights stay where the weights are rounded to them."""
    changes = plan_of(model).changes
    if not any(True for _ in stubs(model)):
        changes.append("not fine-tuned: nothing is quantized")
        return
    tune = partial(train, weight_scale_lr=0.0) if rounded else train
    changes.extend(tune(model, data, steps=steps, progress=progress).lines())


def _calibrate(
    model: WrappedModel,
    calibration: Iterable[Any] | None,
    statistics: Statistics | str | os.PathLike[str] | None,
    *,
    progress: bool,
) -> list[Any]:
    """Fix the scales of ``model``, in place; return the first batches, for what follows."""
    file = None if isinstance(statistics, Statistics) else statistics
    given = None if file is not None and not os.path.exists(file) else statistics
    if calibration is None:
        if given is None and observers(model):
            raise ConfigError(
                "give calibration data, statistics that exist, or a table: activations need ranges"
            )
        calibrate(model, (), statistics=given, progress=progress)
        return []
    batches = iterate(calibration, model)
    kept = list(itertools.islice(batches, KEPT))
    done, count = _batches_of(given), count_batches(calibration)
    left = None if count is None else max(0, count - done)
    rest = () if left == 0 else itertools.islice(itertools.chain(kept, batches), done, None)
    with calibrating(model, statistics=given, save=file):
        for inputs in kept[:done]:  # not observed again, but method "auto" wants to see some
            keep(model, inputs)
        run_batches(model, rest, progress=progress, total=left)
    return kept


def _batches_of(given: Statistics | str | os.PathLike[str] | None) -> int:
    """Return how many batches were run for statistics."""
    if given is None or isinstance(given, Statistics):
        return 0 if given is None else given.batches
    return Statistics.load(given).batches
