"""Change a quantized model, and keep the change if held-back batches come closer to float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qwrap.errors import InputError
from qwrap.model.batches import iterate
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.held_out import HeldOut
from qwrap.quant.outcome import Outcome
from qwrap.quant.prepare import device_of, plan_of, stubs
from qwrap.quant.snapshot import Snapshot

Inputs = Mapping[str, Any]
"""Graph input -> tensor."""


def split(
    model: WrappedModel, batches: Iterable[Any], every: int = 2
) -> tuple[list[Inputs], list[Inputs]]:
    """Return the batches to learn from, and those that decide; a single one does both.

    Args:
        model: what they are for.
        batches: as for ``calibrate``; all are held in memory.
        every: how many batches there are for each that decides; fewer than that count as so many.

    Raises:
        InputError: there are no batches, or one does not fit.
    """
    data: list[Inputs] = list(iterate(batches, model))
    if not data:
        raise InputError("there are no batches to learn from; give at least one")
    every = min(every, max(len(data), 2))
    teaching = [batch for i, batch in enumerate(data) if i % every != every - 1]
    return teaching, data[every - 1 :: every] or data


def attempt(
    model: WrappedModel,
    algorithm: str,
    deciding: Sequence[Inputs],
    change: Callable[[], Iterable[str] | None],
    *,
    least_gain: float = 0.0,
    rounds: bool = False,
) -> Outcome:
    """Change a calibrated model in place; undo it, bit for bit, unless the outputs come closer.

    ``change`` runs in ``eval`` mode. Modes, and torch's random numbers, are put back afterwards.
    The outcome becomes part of the model's plan.

    Args:
        model: calibrated.
        algorithm: what is tried, in words.
        deciding: batches that ``change`` has not seen.
        change: changes the model in place, weights, scales, stubs, plan or graph; returns what
            there is to say of it, one line each.
        least_gain: share of the error by which it has to fall at least.
        rounds: whether ``change`` puts weights on the grid of their codes.

    Raises:
        NotCalibratedError: a scale is not known.
        Exception: what ``change`` raises; the model is then as it was.
    """
    for _, stub in stubs(model):
        assert stub.qparams
    with as_before(model):
        held_out = HeldOut(model, deciding)
        before = held_out.error()
        if before == 0:
            return _noted(model, Outcome(algorithm, False, before, before, ("nothing to gain",)))
        snapshot = Snapshot(model)
        try:
            details = tuple(change() or ())
            after = held_out.error()
        except BaseException:
            snapshot.restore()
            raise
        kept = after < (1 - least_gain) * before
        if not kept:
            snapshot.restore()
    return _noted(model, Outcome(algorithm, kept, before, after, details, kept and rounds))


def _noted(model: WrappedModel, outcome: Outcome) -> Outcome:
    plan_of(model).outcomes.append(outcome)
    return outcome


@contextmanager
def as_before(model: WrappedModel) -> Iterator[None]:
    """Compute in ``eval`` mode; put back, at the end, modes and torch's random numbers."""
    training = model.training
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        model.train(training)  # of what is new since
        for module, mode in modes:
            module.training = mode
