"""Run data through a prepared model and fix every scale."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from qwrap.errors import NotCalibratedError, StatisticsError
from qwrap.model.batches import count_batches, iterate
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.samples import keeping
from qwrap.quant.early_stop import WIDENING, EarlyStop
from qwrap.quant.half import half_nodes, merge_half
from qwrap.quant.live import end_watching, merge_live, watch_unknown
from qwrap.quant.observe.sync import is_distributed, is_first, merge_ranks, sum_over_ranks
from qwrap.quant.prepare import (
    config_of,
    decisions_of,
    device_of,
    new_observer,
    observers,
    place_without,
    plan_of,
    set_mode,
    stubs,
)
from qwrap.quant.problems import leave_out_problems
from qwrap.quant.rescale import fix_scales
from qwrap.quant.session import Session
from qwrap.quant.statistics.statistics import Statistics, restore

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # missing where torch was built without

STOPPED = "calibration stopped early"

Given = Statistics | str | os.PathLike[str] | None


def calibrate(
    model: WrappedModel,
    batches: Iterable[Any],
    *,
    statistics: Given = None,
    save: str | os.PathLike[str] | None = None,
    early_stop: int | None = None,
    progress: bool = True,
    total: int | None = None,
    group: ProcessGroup | None = None,
) -> None:
    """Run ``batches`` through ``model`` and fix the scale of every quantized tensor, in place.

    Memory does not grow with the number of batches. Afterwards the model simulates quantization.
    Where torch.distributed is initialised, every rank gives its share of the batches, which may be
    none, and gets the scales that one process gets from all of them.

    A long calibration survives an interruption with ``save``: its file then says how many batches
    it saw, and the rest can be added to it::

        file = "statistics.safetensors"
        done = qwrap.Statistics.load(file)
        rest = itertools.islice(batches, done.batches, None)
        qwrap.calibrate(model, rest, statistics=done, save=file)

    Args:
        model: a prepared model; computes in float while observers watch.
        batches: tensors or arrays, tuples of them in graph-input order (more items, such as
            labels, are ignored), or mappings from graph-input name; a DataLoader or an
            onnxruntime ``CalibrationDataReader`` will do.
        statistics: what was seen before, or its file, to be taken in first, as if those batches
            had run too; then ``batches`` may be empty. Several are merged with
            ``Statistics.merge``. Of several ranks the first one takes them in.
        save: where to write ``Statistics``: at the end, every half minute, and when the data fails
            or the user interrupts between two batches; in the middle of one, the last file stays.
            Of several ranks the first one writes, at the end, what all saw.
        early_stop: number of batches in which no range has to have widened by more than 1 % of its
            width for calibration to be over; the ranges are looked at so often. The plan's
            ``changes`` then say so. None runs all batches. On several ranks each stops by itself,
            and waits for the others.
        progress: show a bar on a terminal, with the time left if it is known how many batches
            there are.
        total: how many batches there are, for the bar, where ``len(batches)`` does not tell.
        group: the ranks that calibrate together, all if None.

    Raises:
        InputError: there is no batch, or one lacks an input, has another rank or type, or holds
            NaN or infinity.
        ConfigError: the model is not prepared, a setting is wrong, or the ranks differ.
        NotCalibratedError: there is no batch on any of several ranks.
        StatisticsError: ``statistics`` cannot be read, or were observed in another model.
        ExportError: ``save`` cannot be written.
    """
    with calibrating(model, statistics=statistics, save=save, group=group):
        may_be_empty = statistics is not None or is_distributed(group) or not observers(model)
        run_batches(
            model,
            iterate(batches, model, may_be_empty=may_be_empty),
            early_stop=early_stop,
            progress=progress,
            total=count_batches(batches) if total is None else total,
        )


@torch.no_grad()
def run_batches(
    model: WrappedModel,
    batches: Iterable[dict[str, Any]],
    *,
    early_stop: int | None = None,
    progress: bool = True,
    total: int | None = None,
) -> None:
    """Run batches inside of ``calibrating``; arguments as for ``calibrate``.

    Args:
        model: being calibrated.
        batches: graph input -> tensor, as ``to_inputs`` returns them.
        early_stop: see ``calibrate``.
        progress: see ``calibrate``.
        total: how many batches there are, None if that is not known.
    """
    stop = None if early_stop is None else EarlyStop(model, early_stop)
    off = None if progress else True  # None: where there is no terminal
    bar = tqdm(batches, desc="calibrating", total=total, unit="batch", disable=off)
    for number, inputs in enumerate(bar, 1):
        model(**inputs)
        if stop is not None and stop.is_settled():
            bar.set_description("ranges stand still")
            plan_of(model).changes.append(
                f"{STOPPED} after {number} batches: no range had widened by more than "
                f"{WIDENING:.0%} in the last {stop.patience}"
            )
            break
    bar.close()


@contextmanager
def calibrating(
    model: WrappedModel,
    *,
    statistics: Given = None,
    save: str | os.PathLike[str] | None = None,
    group: ProcessGroup | None = None,
) -> Iterator[None]:
    """Let observers watch what the user runs in the ``with`` block, then fix all scales, in place.

    Every calibration starts from nothing, but for ``statistics``. One that fails or is interrupted
    leaves the model prepared, and computing in float.

    Where torch.distributed is initialised, the end of the block waits for every rank and merges
    what they saw. A rank may run nothing; one that fails leaves the others waiting, as anywhere in
    torch.distributed, until ``torchrun`` ends them. Run the module inside
    ``DistributedDataParallel`` rather than the wrapper, unless all ranks run as many batches.

    Args:
        model: a prepared model; of a wrapper like DistributedDataParallel, its ``module``.
        statistics: as for ``calibrate``.
        save: as for ``calibrate``.
        group: the ranks that calibrate together, all if None.

    Raises:
        ConfigError: the model is not prepared.
        NotCalibratedError: nothing was run.
        StatisticsError: ``statistics`` cannot be read, or were observed in another model.
        ExportError: ``save`` cannot be written.
    """
    plan_of(model)
    given = _opened(statistics, model)
    session = Session(
        model,
        None if save is None or not is_first(group) else Path(save),
        None if given is None else given.fingerprint,
        held=0 if given is None or statistics != save else given.batches,
        is_alone=not is_distributed(group),
    )
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    _start_afresh(model)
    try:
        if given is not None:
            restore(model, given, is_fresh=not is_first(group))
        set_mode(model, "observe")
        watch_unknown(model)
        with session.watching(), keeping(model, config_of(model).kept_samples):
            yield
        _merge_ranks(model, group)
        session.write()
        _finish(model, group)
    except BaseException:
        _start_afresh(model)
        raise
    finally:
        for module, training in modes:
            module.training = training


def _opened(statistics: Given, model: WrappedModel) -> Statistics | None:
    """Return statistics that were found to be of ``model``."""
    if statistics is None or isinstance(statistics, Statistics):
        given, where = statistics, ""
    else:
        given, where = Statistics.load(statistics), f"{os.fspath(statistics)}: "
    try:
        if given is not None:
            given.check(model)
    except StatisticsError as error:
        raise StatisticsError(f"{where}{error}") from error
    return given


def _start_afresh(model: WrappedModel) -> None:
    """Forget, in place, what earlier data told: scales, and which nodes it returned to float."""
    plan = plan_of(model)
    plan.changes = [line for line in plan.changes if not line.startswith(STOPPED)]
    if plan.without:
        place_without(model, {})
    decisions_of(model).batches = 0
    decisions_of(model).left_out.clear()
    for _, stub in stubs(model):
        observer = new_observer(stub.name, config_of(model), stub.spec.axis)
        stub.forget(None if stub.observer is None else observer)
    for _, node in half_nodes(model):
        node.overflown = 0
    model.samples = None
    end_watching(model, use=False)
    set_mode(model, "float")


def _merge_ranks(model: WrappedModel, group: ProcessGroup | None) -> None:
    """Let the model of every rank have seen what all ranks saw, in place."""
    watched = [(s, s.observer) for _, s in stubs(model) if s.observer is not None]
    if watched and is_distributed(group):
        home, decisions = watched[0][0].scale.device, decisions_of(model)
        merge_ranks([observer for _, observer in watched], home, group)
        decisions.batches = sum_over_ranks(decisions.batches, home, group)
    if is_distributed(group):
        merge_live(model, group)
        merge_half(model, device_of(model), group)


def _finish(model: WrappedModel, group: ProcessGroup | None) -> None:
    watching = observers(model).values()
    if watching and not any(observer.seen for observer in watching):
        raise NotCalibratedError("no data ran through the model; give at least one batch")
    end_watching(model, use=True)
    leave_out_problems(model)
    fix_scales(model, group=group)
    set_mode(model, "quantize")
