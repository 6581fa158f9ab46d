"""Method "auto": for each tensor the range with the least error behind what reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwrap.config import METHODS
from qwrap.errors import NotCalibratedError
from qwrap.model.points import Program, UsePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams
from qwrap.quant.consumers import ConsumerErrors
from qwrap.quant.held_out import HeldOut, outputs_of, relative
from qwrap.quant.prepare import device_of, plan_of, set_mode
from qwrap.quant.samples import Samples
from qwrap.quant.scales import (
    Way,
    activation_qparams,
    candidates_by,
    ranges_by,
    set_activations,
    stub_at,
)
from qwrap.quant.sync import summed
from qwrap.quant.unify import Range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # missing where torch was built without

Choice = Mapping[str, str]
"""Source tensor -> method."""

FALLBACK = "mse"  # where no operator computes on a tensor
ALIKE = 0.01  # of the width: ranges that differ by less are tried once
ROUNDS = 4  # parts of the samples; the first is also what single tensors are measured on
PREFIXES = (1.0, 0.5, 0.25, 0.125)
"""Shares of the tensors with the most to gain that leave the best single method together."""


@torch.no_grad()
def auto_ranges(
    model: WrappedModel,
    ways: Mapping[str, Way],
    others: Mapping[str, Range],
    given: Mapping[str, QParams],
    group: ProcessGroup | None = None,
) -> dict[str, Range]:
    """Return the range of every tensor in ``ways``, those of method "auto" by trial.

    Each tensor takes the method with the least error at the outputs of its consumers. What comes
    of that has to stand the test of the whole model's output against every single method, or else
    only the tensors with the most to gain take another one. All of this is measured on the kept
    samples, summed over the processes of ``torch.distributed``, which decide alike.

    Args:
        model: prepared, observed, in ``eval`` mode; its weights have their scales. The stubs' modes
            and scales of activations change.
        ways: watched tensor -> method and percentile.
        others: further tensors -> range.
        given: further tensors -> scale.
        group: the processes that decide together, all if None.

    Raises:
        NotCalibratedError: no samples were kept, or an observer saw no value.
    """
    ranges = ranges_by(model, {k: way for k, way in ways.items() if way[0] != "auto"})
    wanted = {key: way for key, way in ways.items() if way[0] == "auto"}
    if not wanted:
        return ranges
    trials = _Trials(model, candidates_by(model, wanted), {**others, **ranges}, given, group)
    choice = trials.decide()
    trials.restore()
    plan_of(model).methods = dict(choice)
    return {**ranges, **trials.ranges(choice)}


class _Trials:
    """Tries ranges on the kept samples.

    Args:
        model: prepared and observed.
        candidates: tensor to choose for -> method -> range.
        others: the ranges of other tensors.
        given: the scales of yet others.
        group: the processes that decide together.

    Raises:
        NotCalibratedError: no samples were kept, in no process.
    """

    def __init__(
        self,
        model: WrappedModel,
        candidates: Mapping[str, Mapping[str, Range]],
        others: Mapping[str, Range],
        given: Mapping[str, QParams],
        group: ProcessGroup | None,
    ) -> None:
        self._model, self._candidates, self._group = model, candidates, group
        self._others, self._given = others, given
        samples = model.samples if isinstance(model.samples, Samples) else Samples(0)
        if not self._summed(torch.tensor([samples.count])):
            raise NotCalibratedError(
                "method 'auto' compares ranges on samples kept from calibration, and there are "
                "none; calibrate in this process, with QConfig(kept_samples=...) above 0"
            )
        batches = list(samples.on(device_of(model)))
        self._weights = _weight_scales(model)
        self._distinct = {key: _Distinct.of(model, key, c) for key, c in candidates.items()}
        measured = ConsumerErrors(model, {key: d.qparams for key, d in self._distinct.items()})
        share = math.ceil(len(batches) / ROUNDS)
        wanted = measured.run(batches[:share])
        with model.running(Program()):
            wanted += [outputs_of(model, inputs) for inputs in batches[share:]]
        self._errors = measured.by_tensor(self._summed(measured.sums()))
        self._held_out = HeldOut(model, batches, wanted)
        self._power = self._summed(self._held_out.power)
        self._parts = [slice(i * share, (i + 1) * share) for i in range(ROUNDS)]

    def _summed(self, values: Tensor) -> Tensor:
        return summed(values, device_of(self._model), self._group)

    def ranges(self, choice: Choice) -> dict[str, Range]:
        """Return the ranges of a choice."""
        return {key: self._candidates[key][method] for key, method in choice.items()}

    def decide(self) -> Choice:
        """Return the best of all single methods, mixtures, and prefixes of mixtures."""
        singles = [dict.fromkeys(self._candidates, method) for method in self._methods()]
        base, error = self._best_of(self._different(singles), math.inf)
        mixture = {key: self._best(key, base[key]) for key in base}
        gains = {key: self._gain(key, base[key], mixture[key]) for key in base}
        order = sorted((key for key in base if gains[key] > 0), key=lambda k: -gains[k])
        prefixes = [order[: math.ceil(len(order) * share)] for share in PREFIXES]
        mixtures = [{**base, **{key: mixture[key] for key in prefix}} for prefix in prefixes]
        better, _ = self._best_of(self._different([base, *mixtures])[1:], error)
        return better or base

    def _best_of(self, choices: Sequence[Choice], limit: float) -> tuple[Choice, float]:
        """Return the choice with the least error below ``limit``, or an empty one, and that error.

        All run the first part of the samples; then the most promising come first, and others stop
        where what they have is more than the best has in all.
        """
        first = [self._errors_in(self._parts[0], choice) for choice in choices]
        order = sorted(range(len(choices)), key=lambda i: relative(first[i], self._power))
        best: Choice = {}
        for i in order:
            errors = first[i]
            for part in self._parts[1:]:
                if relative(errors, self._power) >= limit:
                    break
                errors = errors + self._errors_in(part, choices[i])
            if relative(errors, self._power) < limit:
                best, limit = choices[i], relative(errors, self._power)
        return best, limit

    def _methods(self) -> list[str]:
        """Return the methods that every tensor has a candidate of, ``FALLBACK`` first."""
        shared = [m for m in METHODS if all(m in c for c in self._candidates.values())]
        return sorted(shared, key=lambda method: method != FALLBACK)

    def _different(self, choices: Iterable[Choice]) -> list[Choice]:
        """Return the choices without those that come to the same ranges as an earlier one."""
        seen = {
            tuple(self._distinct[key].index[method] for key, method in choice.items()): choice
            for choice in reversed(list(choices))
        }
        return list(seen.values())[::-1]

    def _best(self, key: str, method: str) -> str:
        """Return the method with the least error behind ``key``; of equal ones ``method``."""
        if key not in self._errors:
            return FALLBACK if FALLBACK in self._candidates[key] else method
        index, error = self._distinct[key].index, self._errors[key]
        return min([method, *index], key=lambda m: float(error[index[m]]))

    def _gain(self, key: str, before: str, after: str) -> float:
        if key not in self._errors:
            return 0.0
        index, error = self._distinct[key].index, self._errors[key]
        return float(error[index[before]] - error[index[after]])

    def _errors_in(self, part: slice, choice: Choice) -> Tensor:
        """Return the squared error of every output, with everything quantized, on some batches."""
        self.restore()
        set_activations(self._model, {**self._others, **self.ranges(choice)}, self._given)
        set_mode(self._model, "quantize")
        return self._summed(self._held_out.errors(part))

    def restore(self) -> None:
        """Give weights the scales they had before a trial made room for biases, in place."""
        for point, scale in self._weights.items():
            stub_at(self._model, point).scale.copy_(scale)


@dataclass(frozen=True, slots=True)
class _Distinct:
    """The candidates of one tensor without repetitions.

    Attributes:
        qparams: scales to try.
        index: method -> which of them it comes to.
    """

    qparams: Sequence[QParams]
    index: Mapping[str, int]

    @classmethod
    def of(cls, model: WrappedModel, key: str, candidates: Mapping[str, Range]) -> _Distinct:
        """Return what is to be tried for tensor ``key``."""
        kept: list[Range] = []
        index = {}
        for method, span in candidates.items():
            alike = (i for i, other in enumerate(kept) if _are_alike(span, other))
            index[method] = next(alike, len(kept))
            if index[method] == len(kept):
                kept.append(span)
        return cls([activation_qparams(model, key, span) for span in kept], index)


def _are_alike(a: Range, b: Range) -> bool:
    slack = ALIKE * (a[1] - a[0])
    return abs(a[0] - b[0]) <= slack and abs(a[1] - b[1]) <= slack


def _weight_scales(model: WrappedModel) -> dict[UsePoint, Tensor]:
    """Return the scales that room for biases may enlarge, as they are now."""
    points = {UsePoint(*bias.weight) for bias in plan_of(model).biases.values()}
    return {point: stub_at(model, point).scale.clone() for point in points}
