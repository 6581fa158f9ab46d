"""Run data through a prepared model and fix every scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from qwrap.errors import NotCalibratedError
from qwrap.model.batches import count_batches, iterate
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.observers import HALF_SENTINEL, SENTINEL, MinMaxObserver, Observer
from qwrap.quant.prepare import bias_stubs, config_of, new_observer, place_without, plan_of, stubs
from qwrap.quant.scales import fix_scales, stored
from qwrap.quant.sources import integer_users
from qwrap.quant.stubs import Mode
from qwrap.quant.sync import is_distributed, merge_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # missing where torch was built without


def calibrate(
    model: WrappedModel,
    batches: Iterable[Any],
    *,
    progress: bool = True,
    total: int | None = None,
    group: ProcessGroup | None = None,
) -> None:
    """Run ``batches`` through ``model`` and fix the scale of every quantized tensor, in place.

    Memory does not grow with the number of batches. Afterwards the model simulates quantization.
    Where torch.distributed is initialised, every rank gives its share of the batches, which may be
    none, and gets the scales that one process gets from all of them.

    Args:
        model: a prepared model; computes in float while observers watch.
        batches: tensors or arrays, tuples of them in graph-input order (more items, such as
            labels, are ignored), or mappings from graph-input name; a DataLoader or an
            onnxruntime ``CalibrationDataReader`` will do.
        progress: show a bar on a terminal.
        total: how many batches there are, for the bar, where ``len(batches)`` does not tell.
        group: the ranks that calibrate together, all if None.

    Raises:
        InputError: there is no batch, or one lacks an input, has another rank or type, or holds
            NaN or infinity.
        ConfigError: the model is not prepared, or not the same on all ranks.
        NotCalibratedError: there is no batch on any of several ranks.
    """
    with calibrating(model, group=group), torch.no_grad():
        bar = tqdm(
            iterate(batches, model, may_be_empty=is_distributed(group)),
            desc="calibrating",
            total=count_batches(batches) if total is None else total,
            unit="batch",
            disable=None if progress else True,
        )
        for inputs in bar:
            model(**inputs)


@contextmanager
def calibrating(model: WrappedModel, *, group: ProcessGroup | None = None) -> Iterator[None]:
    """Let observers watch what the user runs in the ``with`` block, then fix all scales, in place.

    Every calibration starts from nothing. One that fails or is interrupted leaves the model
    prepared, and computing in float. What an earlier one returned to float stays so.

    Where torch.distributed is initialised, the end of the block waits for every rank and merges
    what they saw. A rank may run nothing; one that fails leaves the others waiting, as anywhere in
    torch.distributed, until ``torchrun`` ends them. Run the module inside
    ``DistributedDataParallel`` rather than the wrapper, unless all ranks run as many batches.

    Args:
        model: a prepared model; of a wrapper like DistributedDataParallel, its ``module``.
        group: the ranks that calibrate together, all if None.

    Raises:
        ConfigError: the model is not prepared.
        NotCalibratedError: nothing was run.
    """
    plan_of(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    _start_afresh(model)
    set_mode(model, "observe")
    try:
        yield
        _finish(model, group)
    except BaseException:
        _start_afresh(model)
        raise
    finally:
        for module, training in modes:
            module.training = training


def set_mode(model: WrappedModel, mode: Mode) -> None:
    """Switch every stub to ``mode``, in place."""
    for _, stub in (*stubs(model), *bias_stubs(model)):
        stub.mode = mode


def _start_afresh(model: WrappedModel) -> None:
    for _, stub in stubs(model):
        observed = stub.observer is not None
        stub.forget(new_observer(stub.name, config_of(model)) if observed else None)
    set_mode(model, "float")


def _finish(model: WrappedModel, group: ProcessGroup | None) -> None:
    watched = [(s, s.observer) for _, s in stubs(model) if s.observer is not None]
    observers = [observer for _, observer in watched]
    if watched and is_distributed(group):
        merge_ranks(observers, watched[0][0].scale.device, group)
    if observers and not any(o.seen for o in observers):
        raise NotCalibratedError("no data ran through the model; give at least one batch")
    _leave_out_problems(model)
    fix_scales(model)
    set_mode(model, "quantize")


def _leave_out_problems(model: WrappedModel) -> None:
    """Return to float what no data reached, and what works on attention masks, in place."""
    without = dict(plan_of(model).without)
    while problems := _problems(model):
        assert not problems.keys() <= without.keys(), "a node stayed although it has to go"
        without = problems | without
        place_without(model, without)


def _problems(model: WrappedModel) -> dict[str, str]:
    """Return node key -> why the node cannot be quantized, after all."""
    plan = plan_of(model)
    found: dict[str, str] = {}
    users = integer_users(plan, model.graph)
    for _, stub in stubs(model):
        problem = None if stub.observer is None else _trouble(stub.observer)
        if problem:
            found |= dict.fromkeys(sorted(users[stub.name]), f"{problem} (tensor {stub.name!r})")
    for (node, _), constant in plan.constants.items():
        observer = MinMaxObserver(constant.value)
        observer.observe(stored(model, constant.value))
        problem = _trouble(observer)
        if problem:
            found[node] = f"{problem} (constant {constant.value!r})"
    return found


def _trouble(observer: Observer) -> str | None:
    if observer.masked:
        return (
            f"works on {observer.masked} mask values, of magnitude {SENTINEL:g} or more "
            f"({HALF_SENTINEL:g} in float16)"
        )
    if observer.nonfinite:
        return f"works on {observer.nonfinite} values that are NaN or infinite"
    return None if observer.count else "no calibration data reached it"
