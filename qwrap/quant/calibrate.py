"""Run data through a prepared model and fix every scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from qwrap.errors import NotCalibratedError
from qwrap.model.batches import count_batches, iterate
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.prepare import config_of, new_observer, plan_of, set_mode, stubs
from qwrap.quant.problems import leave_out_problems
from qwrap.quant.rescale import fix_scales
from qwrap.quant.samples import keeping


def calibrate(
    model: WrappedModel,
    batches: Iterable[Any],
    *,
    progress: bool = True,
    total: int | None = None,
) -> None:
    """Run ``batches`` through ``model`` and fix the scale of every quantized tensor, in place.

    Memory does not grow with the number of batches. Afterwards the model simulates quantization.

    Args:
        model: a prepared model; computes in float while observers watch.
        batches: tensors or arrays, tuples of them in graph-input order (more items, such as
            labels, are ignored), or mappings from graph-input name; a DataLoader or an
            onnxruntime ``CalibrationDataReader`` will do.
        progress: show a bar on a terminal.
        total: how many batches there are, for the bar, where ``len(batches)`` does not tell.

    Raises:
        InputError: there is no batch, or one lacks an input, has another rank or type, or holds
            NaN or infinity.
        ConfigError: the model is not prepared.
    """
    with calibrating(model), torch.no_grad():
        bar = tqdm(
            iterate(batches, model),
            desc="calibrating",
            total=count_batches(batches) if total is None else total,
            unit="batch",
            disable=None if progress else True,
        )
        for inputs in bar:
            model(**inputs)


@contextmanager
def calibrating(model: WrappedModel) -> Iterator[None]:
    """Let observers watch what the user runs in the ``with`` block, then fix all scales, in place.

    Every calibration starts from nothing. One that fails or is interrupted leaves the model
    prepared, and computing in float. What an earlier one returned to float stays so.

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
        with keeping(model, config_of(model).kept_samples):
            yield
        _finish(model)
    except BaseException:
        _start_afresh(model)
        raise
    finally:
        for module, training in modes:
            module.training = training


def _start_afresh(model: WrappedModel) -> None:
    for _, stub in stubs(model):
        observed = stub.observer is not None
        stub.forget(new_observer(stub.name, config_of(model)) if observed else None)
    model.samples = None
    set_mode(model, "float")


def _finish(model: WrappedModel) -> None:
    observers = [s.observer for _, s in stubs(model) if s.observer is not None]
    if observers and not any(o.count + o.masked + o.nonfinite for o in observers):
        raise NotCalibratedError("no data ran through the model; give at least one batch")
    leave_out_problems(model)
    fix_scales(model)
    set_mode(model, "quantize")
