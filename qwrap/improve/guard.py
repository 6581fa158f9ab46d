"""The guard: what ruins the outputs of a quantized model is computed in float, or in 16 bits."""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qwrap.config import QConfig
from qwrap.errors import ConfigError
from qwrap.mixed.choices import FLOAT, Choice, Group, groups_of
from qwrap.mixed.loss.carriers import own_choice
from qwrap.mixed.loss.sensitivity import sensitivity
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.held_out import HeldOut
from qwrap.quant.outcome import Outcome
from qwrap.quant.place_again import place_again
from qwrap.quant.prepare import config_of
from qwrap.quant.snapshot import Snapshot
from qwrap.quant.trial import Inputs, as_before, attempt, split
from qwrap.targets import find_target

MIN_SQNR = 10.0  # dB: a tenth of the outputs' power is error; classifiers begin to fail there


def guard(
    model: WrappedModel,
    batches: Iterable[Any],
    *,
    min_sqnr: float = MIN_SQNR,
    progress: bool = True,
) -> Outcome:
    """Return layers to float, or to 16 bits, in place, until the outputs are as good as asked.

    Layers come in the order of what leaving each of them alone in float wins; of these as few are
    raised as hold the bound. On CPUs they become float, for 16 bits have no integer kernels there;
    on other targets activations become uint16 where the target runs that, and float only where
    this is not enough. Scales and weights of all else stay as they are.

    Args:
        model: calibrated.
        batches: as for ``calibrate``; every other one is measured on.
        min_sqnr: least ratio of signal to quantization noise of every float output, in dB.
        progress: show a bar on a terminal.

    Returns:
        What was raised; not kept, and not in the plan, where the bound held before.

    Raises:
        InputError: there are no batches, or one does not fit.
        NotCalibratedError: the model is not calibrated.
        ConfigError: ``min_sqnr`` is not a number.
    """
    if math.isnan(min_sqnr):
        raise ConfigError(f"min_sqnr={min_sqnr}: expected a number of dB; 10 is usual")
    _, deciding = split(model, batches)
    with as_before(model):
        held_out = HeldOut(model, deciding)
        before = held_out.sqnr()
        if before >= min_sqnr:
            error = held_out.error()
            return Outcome("guard", False, error, error, (f"{before:.1f} dB hold the bound",))
        ranked = _ranked(model, deciding, progress=progress)

    def raise_layers() -> list[str]:
        count = _raise_fewest(model, ranked, held_out, min_sqnr, deciding)
        raised = {layer.group.name: str(layer.wide) for layer in ranked[:count]}
        total = len({layer.group.name for layer in ranked})
        listed = ", ".join(f"{name} to {types}" for name, types in raised.items())
        return [
            f"{before:.1f} dB to {held_out.sqnr():.1f}, where {min_sqnr:g} were asked for",
            f"{len(raised)} of {total} layers raised: {listed}",
        ]

    return attempt(model, "guard", deciding, raise_layers)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer, and the types that it would be raised to."""

    group: Group
    wide: Choice


def _ranked(model: WrappedModel, batches: Sequence[Inputs], *, progress: bool) -> list[_Layer]:
    """Return the layers, that first which wins most by being float.

    Those that can have 16 bits are there once more, before all that become float.
    """
    own = own_choice(model)
    wide = Choice("uint16", own.weight)
    found = sensitivity(
        model, batches, by="layer", measure="error", rest="quantized", progress=progress
    )
    groups = {group.name: group for group in found.groups}
    able: set[str] = set()
    if not find_target(config_of(model).target).is_cpu and wide != own:
        offered = groups_of(model, config_of(model), (own, wide, FLOAT))
        able = {group.name for group in offered if wide in group.choices}
    order = [groups[name] for name in found.ranking()]
    in_16_bits = [_Layer(group, wide) for group in order if group.name in able]
    return [*in_16_bits, *(_Layer(group, FLOAT) for group in order)]


def _raise_fewest(
    model: WrappedModel,
    layers: Sequence[_Layer],
    held_out: HeldOut,
    min_sqnr: float,
    batches: Sequence[Inputs],
) -> int:
    """Raise as many of the first ``layers`` as the bound needs, in place; return how many."""
    snapshot, config = Snapshot(model), config_of(model)

    def holds(count: int) -> bool:
        snapshot.restore()
        place_again(model, _with(config, layers[:count]), batches)
        return held_out.sqnr() >= min_sqnr

    enough, last = 1, 0
    while enough < len(layers) and not holds(enough):
        enough, last = min(2 * enough, len(layers)), enough
    found = last + 1 + bisect_left(range(last + 1, enough), True, key=holds)
    holds(found)
    return found


def _with(config: QConfig, layers: Sequence[_Layer]) -> QConfig:
    result = copy.deepcopy(config)
    for layer in layers:
        weight = layer.wide.weight if layer.wide == FLOAT else None
        result.set(list(layer.group.nodes), activation=layer.wide.activation, weight=weight)
    return result
