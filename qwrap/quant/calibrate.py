"""Run data through a prepared model and fix every scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qwrap.config import QConfig
from qwrap.errors import NotCalibratedError
from qwrap.model.batches import iterate
from qwrap.model.points import UsePoint, ValuePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams, choose_qparams
from qwrap.quant.observers import Observer
from qwrap.quant.placement import place
from qwrap.quant.prepare import bias_stubs, install, plan_of, stubs
from qwrap.quant.ranges import choose_ranges, choose_weight_range
from qwrap.quant.stubs import BiasStub, Mode, Stub

LARGEST_BIAS = 2**30  # codes; half of int32, so that the accumulator has room beside it


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
    if total is None and isinstance(batches, Sized):
        total = len(batches)
    with calibrating(model), torch.no_grad():
        bar = tqdm(
            iterate(batches, model),
            desc="calibrating",
            total=total,
            unit="batch",
            disable=None if progress else True,
        )
        for inputs in bar:
            model(**inputs)


@contextmanager
def calibrating(model: WrappedModel) -> Iterator[None]:
    """Let observers watch what the user runs in the ``with`` block, then fix all scales, in place.

    Raises:
        NotCalibratedError: nothing was run.
    """
    plan_of(model)
    training = model.training
    model.eval()
    set_mode(model, "observe")
    try:
        yield
    except BaseException:
        set_mode(model, "float")
        raise
    finally:
        model.train(training)
    _finish(model)


def set_mode(model: WrappedModel, mode: Mode) -> None:
    """Switch every stub to ``mode``, in place."""
    for _, stub in stubs(model):
        stub.mode = mode
    for _, bias in bias_stubs(model):
        bias.mode = mode


def _finish(model: WrappedModel) -> None:
    observers = {s.name: s.observer for _, s in stubs(model) if s.observer is not None}
    if observers and not any(o.count for o in observers.values()):
        raise NotCalibratedError("no data ran through the model; give at least one batch")
    _leave_out_unseen(model, observers)
    _set_activations(model)
    _set_constants(model)
    _fit_biases(model)
    set_mode(model, "quantize")


def _leave_out_unseen(model: WrappedModel, observers: dict[str, Observer]) -> None:
    """Return to float what no data reached, and what works on attention masks, in place."""
    config = model.config
    assert isinstance(config, QConfig)
    without: dict[str, str] = {}
    while True:
        plan = plan_of(model)
        problems = {
            key: problem
            for key, tensor in plan.sources().items()
            if tensor.fixed is None and (problem := _problem(observers.get(key)))
        }
        if not problems:
            return
        without |= {
            node: f"{problem} (tensor {key!r})"
            for key, problem in problems.items()
            for node in _integer_neighbours(model, key)
        }
        changes = plan.changes
        plan = place(model.layout, config, without=without)
        plan.changes = changes
        install(model, plan, config, observers)


def _problem(observer: Observer | None) -> str | None:
    if observer is None or not (observer.count or observer.masked or observer.nonfinite):
        return "no calibration data reached it"
    if observer.masked or observer.nonfinite:
        return (
            f"its input or output holds {observer.masked} mask values (beyond 1e30) and "
            f"{observer.nonfinite} that are not finite"
        )
    return None


def _integer_neighbours(model: WrappedModel, source: str) -> list[str]:
    """Return the integer nodes that read or write a tensor with the scale of ``source``."""
    plan, graph = plan_of(model), model.graph
    found = []
    for key, tensor in plan.tensors.items():
        if tensor.source == source:
            value = graph.values[key]
            nodes = [n for n in (value.producer(), *value.consumers()) if n is not None]
            found += [graph.node_key(n) for n in nodes]
    around = {
        graph.node_key(n)
        for key in found
        for v in (*graph.nodes[key].inputs, *graph.nodes[key].outputs)
        if v is not None
        for n in (v.producer(), *v.consumers())
        if n is not None and plan.nodes.get(key) and plan.nodes[key].role != "integer"
    }
    return [k for k in {*found, *around} if k in plan.nodes and plan.nodes[k].role == "integer"]


def _set_activations(model: WrappedModel) -> None:
    config = model.config
    assert isinstance(config, QConfig)
    plan = plan_of(model)
    watched: list[tuple[Stub, Observer]] = []
    for point, stub in stubs(model):
        if isinstance(point, ValuePoint):
            fixed = plan.tensors[point.value].fixed
            if fixed is not None:
                scale, zero_point = torch.tensor([fixed[0]]), torch.tensor([fixed[1]])
                stub.set_qparams(QParams(scale, zero_point.to(torch.int32)))
            elif stub.observer is not None:
                watched.append((stub, stub.observer))
    if not watched:
        return
    lows, highs = choose_ranges(
        [o for _, o in watched], [s.spec for s, _ in watched], config.method, config.percentile
    )
    for (stub, _), low, high in zip(watched, lows, highs, strict=True):
        stub.set_qparams(choose_qparams(low, high, stub.spec))


def _set_constants(model: WrappedModel) -> None:
    config = model.config
    assert isinstance(config, QConfig)
    for point, constant in plan_of(model).constants.items():
        stub, value = model.tap(UsePoint(*point)), model.stored(constant.value)
        assert isinstance(stub, Stub)
        assert value is not None
        low, high = choose_weight_range(value.detach(), stub.spec, config.weight_method)
        stub.set_qparams(choose_qparams(low, high, stub.spec))


@torch.no_grad()
def _fit_biases(model: WrappedModel) -> None:
    """Enlarge the weight scale of channels whose bias would overflow int32, in place."""
    for point, bias in plan_of(model).biases.items():
        stub, weight = model.tap(UsePoint(*point)), model.tap(UsePoint(*bias.weight))
        value = model.stored(bias.value)
        assert isinstance(stub, BiasStub)
        assert isinstance(weight, Stub)
        assert isinstance(value, Tensor)
        activation = model.tap(ValuePoint(bias.activation))
        assert isinstance(activation, Stub)
        least = value.abs() / (activation.scale * LARGEST_BIAS)
        if weight.scale.numel() == 1:
            least = least.max().reshape(1)
        weight.scale.copy_(torch.maximum(weight.scale, least))
