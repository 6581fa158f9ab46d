"""From a float file to a quantized one in one call."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from qwrap.config import QConfig
from qwrap.errors import ConfigError, ExportError
from qwrap.export.exporter import export, same_file
from qwrap.graph.load import Source
from qwrap.graph.save import check_target
from qwrap.improve.guard import MIN_SQNR, guard
from qwrap.improve.improve import Effort, check_effort, improve
from qwrap.model.batches import count_batches, iterate
from qwrap.model.build import load
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.samples import is_divisible, keep
from qwrap.quant.calibrate import calibrate, calibrating, run_batches
from qwrap.quant.prepare import observers, plan_of, prepare, stubs
from qwrap.quant.rescale import rescale
from qwrap.quant.statistics.statistics import Statistics
from qwrap.quant.tables import RangeTable
from qwrap.train.finetune import finetune as train


def quantize(
    source: Source,
    target: str | os.PathLike[str],
    *,
    calibration: Iterable[Any] | None = None,
    statistics: Statistics | str | os.PathLike[str] | None = None,
    table: RangeTable | str | os.PathLike[str] | None = None,
    config: QConfig | None = None,
    effort: Effort = "default",
    min_sqnr: float | None = MIN_SQNR,
    finetune: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> WrappedModel:
    """Quantize an ONNX file with calibration data and write a QDQ file for onnxruntime.

    Loads, prepares and calibrates; then goes through the algorithms of ``effort``, each of which is
    kept only if held-back batches come out closer to the float model; returns layers to float, as
    few as can be, where the outputs are still not as good as ``min_sqnr``; exports. What was kept,
    undone and returned is in ``model.plan.summary()``. The data is read once, but where layers were
    equalized and for ``finetune``; the first batches stay in memory.

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
        effort: "none" for calibration alone, "default" (up to 128 samples, at most some twenty
            times as long as calibration), or "high", which learns how to round weights (up to 1024
            samples, minutes): see ``improve``.
        min_sqnr: least ratio of signal to quantization noise of the outputs, in dB, on batches that
            were held back: see ``guard``. None, and ``effort="none"``: whatever comes out.
        finetune: steps of training towards the float model's outputs after all of that, without
            labels, on the same data (see ``finetune``); some hundreds. Data that can be read once
            gives the batches that stayed in memory. None: no training.
        seed: of everything that is drawn.
        progress: show a bar on a terminal.

    Returns:
        The calibrated model: ``model.plan.summary()`` says what is quantized, and
        ``qwrap.verify(model, target, batches)`` how close simulation and deployment are.

    Raises:
        ModelError: the source cannot be loaded.
        InputError: there is no batch, or one does not fit.
        ConfigError: there is no such effort, there are neither ``calibration`` nor ``statistics``
            nor a ``table`` for the ranges, or no ``calibration`` for ``finetune``.
        NotCalibratedError: the table is all there is, and lacks tensors.
        TableError: the table's file cannot be read, or an entry does not fit its tensor.
        StatisticsError: the file is damaged, or of another model; it is not replaced.
        ExportError: the target cannot be written, or is the source.
    """
    if isinstance(source, (str, os.PathLike)) and same_file(source, target):
        raise ExportError(f"{target}: is the float model itself; write to another file")
    check_target(target)
    check_effort(effort)
    if finetune is not None and (finetune < 1 or calibration is None):
        raise ConfigError(f"finetune={finetune}: takes 1 step or more, and calibration data")
    if isinstance(statistics, (str, os.PathLike)):
        check_target(statistics)
    if isinstance(table, (str, os.PathLike)):
        table = RangeTable.read(table)
    model = load(source).eval()
    prepare(model, config)
    kept = _Kept()
    if table is None or calibration is not None or statistics is not None:
        kept = _calibrate(model, calibration, statistics, _ROOM[effort], progress=progress)
    if table is not None:
        rescale(model, table)
    is_once = isinstance(calibration, Iterator) or hasattr(calibration, "get_next")
    if kept.batches:
        improve(
            model,
            kept.batches,
            effort=effort,
            calibration=None if is_once or kept.is_all else calibration,
            keep_ranges=table is not None,
            seed=seed,
            progress=progress,
        )
        if min_sqnr is not None and effort != "none":
            guard(model, kept.batches, min_sqnr=min_sqnr, progress=progress)
    elif effort != "none":
        plan_of(model).changes.append("weights and biases as they were: no data to improve them by")
    if finetune is not None and calibration is not None:
        data = kept.batches if is_once else calibration
        _finetune(model, data, finetune, seed, progress=progress)
    export(model, target)
    return model


def _finetune(
    model: WrappedModel, data: Iterable[Any], steps: int, seed: int, *, progress: bool
) -> None:
    """Train ``model``, in place; scales of weights stay where the weights are rounded to them."""
    changes = plan_of(model).changes
    if not any(True for _ in stubs(model)):
        changes.append("not fine-tuned: nothing is quantized")
        return
    rounded = any(outcome.rounds for outcome in plan_of(model).outcomes)
    tune = partial(train, weight_scale_lr=0.0) if rounded else train
    changes.extend(tune(model, data, steps=steps, seed=seed, progress=progress).lines())


def _calibrate(
    model: WrappedModel,
    calibration: Iterable[Any] | None,
    statistics: Statistics | str | os.PathLike[str] | None,
    room: _Room,
    *,
    progress: bool,
) -> _Kept:
    """Fix the scales of ``model``, in place; return the first batches, for what follows."""
    file = None if isinstance(statistics, Statistics) else statistics
    given = None if file is not None and not os.path.exists(file) else statistics
    if calibration is None:
        if given is None and observers(model):
            raise ConfigError(
                "give calibration data, statistics that exist, or a table: activations need ranges"
            )
        calibrate(model, (), statistics=given, progress=progress)
        return _Kept()
    kept = _Kept(is_divisible(model), room)
    done, count = _batches_of(given), count_batches(calibration)
    left = None if count is None else max(0, count - done)

    def rest() -> Iterator[Any]:
        for number, inputs in enumerate(iterate(calibration, model)):
            has_room = kept.take(inputs)
            if number >= done:
                yield inputs
            elif has_room:  # not observed again, but method "auto" wants to see some
                keep(model, inputs)

    with calibrating(model, statistics=given, save=file):
        run_batches(model, rest(), progress=progress, total=left)
    return kept


@dataclass(frozen=True, slots=True)
class _Room:
    """How much data stays in memory for what follows calibration.

    Attributes:
        samples: most of them; where batches cannot be told apart into samples, most batches.
        bytes: from where on no more is kept.
    """

    samples: int
    bytes: int


_FEW = _Room(128, 2**28)
_ROOM: dict[Effort, _Room] = {"none": _FEW, "default": _FEW, "high": _Room(1024, 2**29)}


class _Kept:
    """The first batches, as many as there is room for; the very first in any case.

    Attributes:
        batches: those that are kept.
        is_all: whether there were no others.
    """

    def __init__(self, divisible: bool = False, room: _Room = _Room(0, 0)) -> None:
        self.batches: list[Any] = []
        self.is_all = True
        self._divisible, self._room = divisible, room
        self._samples, self._bytes = 0, 0

    def take(self, inputs: Mapping[str, Any]) -> bool:
        """Keep a batch if there is room; return whether there was."""
        full = self._samples >= self._room.samples or self._bytes >= self._room.bytes
        if full and self.batches:
            self.is_all = False
            return False
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        self._samples += len(tensors[0]) if self._divisible else 1
        self._bytes += sum(tensor.nbytes for tensor in tensors)
        self.batches.append(inputs)
        return True


def _batches_of(given: Statistics | str | os.PathLike[str] | None) -> int:
    """Return how many batches were run for statistics."""
    if given is None or isinstance(given, Statistics):
        return 0 if given is None else given.batches
    return Statistics.load(given).batches
