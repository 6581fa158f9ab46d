"""Method "auto": for each tensor the range with the least error behind what reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwrap.config import METHODS
from qwrap.errors import NotCalibratedError
from qwrap.model.points import Program, UsePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams
from qwrap.quant.auto.consumers import ConsumerErrors
from qwrap.quant.auto.held_out import HeldOut, outputs_of
from qwrap.quant.auto.samples import Samples
from qwrap.quant.observe.sync import summed
from qwrap.quant.prepare import device_of, plan_of, set_mode, stub_at
from qwrap.quant.scales import Way, activation_qparams, candidates_by, ranges_by, set_activations
from qwrap.quant.unify import Range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # missing where torch was built without

Choice = Mapping[str, str]
"""Source tensor -> method."""

FALLBACK = "mse"  # where no operator computes on a tensor
ALIKE = 0.01  # of the width: ranges that differ by less are tried once
ROUNDS = 4  # parts of the samples; the first is also what single tensors are measured on
SURELY = 3  # standard errors: one in some hundred is that far off by chance
CLEARLY = 1  # the same for a gain that other samples should have, too
LEAST = 1e-12  # relative error that counts as none
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
    only the tensors with the most to gain take another one. There the mean SQNR of the samples
    decides. All of this is measured on the kept samples, summed over the processes of
    ``torch.distributed``, which decide alike.

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
        self._held_out = HeldOut(model, batches, wanted, samples.sizes)
        self._parts = [slice(i * share, (i + 1) * share) for i in range(ROUNDS)]

    def _summed(self, values: Tensor) -> Tensor:
        return summed(values, device_of(self._model), self._group)

    def ranges(self, choice: Choice) -> dict[str, Range]:
        """Return the ranges of a choice."""
        return {key: self._candidates[key][method] for key, method in choice.items()}

    def decide(self) -> Choice:
        """Return the best of all single methods, mixtures, and prefixes of mixtures."""
        singles = [dict.fromkeys(self._candidates, method) for method in self._methods()]
        base = self._best_of(self._different(singles), None)
        mixture = {key: self._best(key, base.choice[key]) for key in base.choice}
        gains = {key: self._gain(key, base.choice[key], mixture[key]) for key in mixture}
        order = sorted((key for key in gains if gains[key] > 0), key=lambda k: -gains[k])
        prefixes = [order[: math.ceil(len(order) * share)] for share in PREFIXES]
        mixtures = [{**base.choice, **{key: mixture[key] for key in p}} for p in prefixes]
        return self._best_of(self._different([base.choice, *mixtures])[1:], base).choice

    def _best_of(self, choices: Sequence[Choice], rival: _Course | None) -> _Course:
        """Return the course of the choice with the least error, or ``rival``.

        All run the first part of the samples; then the most promising come first, and others stop
        where they are surely worse. A rival has to be beaten all the way and clearly, so that the
        gain is not that of a few samples.
        """
        started = [_Course(choice, [self._logs(choice, self._parts[0])]) for choice in choices]
        means = {id(c): float(self._mean(c.logs[0])[0]) for c in started}
        best = rival
        for course in sorted(started, key=lambda c: means[id(c)]):
            if self._finishes(course, best, surely=rival is None):
                best = course
        assert best is not None
        return best

    def _finishes(self, course: _Course, best: _Course | None, *, surely: bool) -> bool:
        """Run the rest of the samples, in place; return whether ``course`` is better in the end.

        Args:
            course: has run the first part.
            best: has run all; None if there is none yet.
            surely: stop only where it is more than ``SURELY`` standard errors behind, not at once;
                and be better by any amount, not by ``CLEARLY`` standard errors.
        """
        mean, deviation = -math.inf, 0.0
        for number, part in enumerate(self._parts):
            if number:
                course.logs.append(self._logs(course.choice, part))
            if best is not None:
                behind = torch.cat(course.logs) - torch.cat(best.logs[: number + 1])
                mean, deviation = self._mean(behind)
                if mean > (SURELY * deviation if surely else 0):
                    return False
        return mean < (0 if surely or best is None else -CLEARLY * deviation)

    def _mean(self, values: Tensor) -> tuple[float, float]:
        """Return the mean over all processes and its standard error, both 0 for no values."""
        parts = torch.tensor([len(values), values.sum(), values.square().sum()])
        count, total, squares = self._summed(parts.to(torch.float64)).tolist()
        mean = total / max(count, 1)
        variance = max(squares / max(count, 1) - mean**2, 0.0)
        return mean, math.sqrt(variance / max(count - 1, 1)) if count > 1 else math.inf

    def _logs(self, choice: Choice, part: slice) -> Tensor:
        """Return the logarithm of each sample's relative error, with everything quantized.

        Errors of samples differ by orders of magnitude, and a sum would be that of the few worst.
        """
        self.restore()
        set_activations(self._model, {**self._others, **self.ranges(choice)}, self._given)
        set_mode(self._model, "quantize")
        errors, powers = self._held_out.errors(part)
        relative = torch.where(powers > 0, errors / powers, 0.0).sum(1)
        return relative.clamp(min=LEAST).log()

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

    def restore(self) -> None:
        """Give weights the scales they had before a trial made room for biases, in place."""
        for point, scale in self._weights.items():
            stub = stub_at(self._model, point)
            stub.set_qparams(replace(stub.qparams, scale=scale))


@dataclass(slots=True)
class _Course:
    """A choice, and the logarithms of the samples' errors so far, part by part."""

    choice: Choice
    logs: list[Tensor]


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
