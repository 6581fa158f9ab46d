"""Measured sensitivity: one group after another is quantized, and the outputs are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from qwrap.errors import InputError
from qwrap.mixed.book import Book, Tally
from qwrap.mixed.carriers import Carrier
from qwrap.mixed.choices import Choice
from qwrap.mixed.outputs import Output
from qwrap.model.points import Point
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.samples import Samples
from qwrap.quant.prepare import device_of

EVERYTHING = ""  # no group is called so
Metric = Callable[[WrappedModel], float]


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """One state of a model that is measured.

    Attributes:
        name: of the group that is quantized, or the only one that is not; ``EVERYTHING``.
        carrier: whose stubs are switched.
        points: which of them quantize.
    """

    name: str
    carrier: Carrier
    points: frozenset[Point]

    @property
    def choice(self) -> Choice:
        """The types of what is quantized."""
        return self.carrier.choice

    def __str__(self) -> str:
        what = f"group {self.name!r}" if self.name else "everything"
        return f"{what} in {self.choice}"


def outputs_on(model: WrappedModel, inputs: Mapping[str, Any]) -> list[Any]:
    """Return the graph outputs as a list."""
    result = model(**inputs)
    return list(result) if isinstance(result, tuple) else [result]


@torch.no_grad()
def measure_outputs(
    trials: Sequence[Trial],
    outputs: Sequence[Output],
    samples: Samples,
    book: Book,
    *,
    progress: bool,
) -> dict[tuple[str, Choice], float]:
    """Return (name, choice) -> how far the outputs are from the float ones, for each trial.

    Batch by batch, so that the float outputs of one are all that is kept.

    Args:
        trials: what to run.
        outputs: how to compare.
        samples: what to run it on.
        book: knows what was run before, and takes in what is run now.
        progress: show a bar on a terminal.

    Raises:
        InputError: an output has become NaN.
    """
    tallies = {trial: book.tally(trial.name, str(trial.choice)) for trial in trials}
    total = sum(len(samples.batches) - tally.batches for tally in tallies.values())
    bar = tqdm(desc="sensitivity", total=total, unit="run", disable=None if progress else True)
    with _writing(book), closing(bar):
        for i, inputs in enumerate(samples.on(device_of(trials[0].carrier.model))):
            left = [trial for trial in trials if tallies[trial].batches <= i]
            for trial, found, wanted in _runs(left, inputs):
                tallies[trial].add(_distances(trial, outputs, found, wanted))
                book.write(now=False)
                bar.update()
    return {(trial.name, trial.choice): tally.loss for trial, tally in tallies.items()}


def _runs(
    trials: Sequence[Trial], inputs: Mapping[str, Any]
) -> Iterator[tuple[Trial, list[Any], list[Any]]]:
    """Yield each trial with its outputs and the float ones."""
    if not trials:
        return
    first = trials[0].carrier
    first.switch(())
    wanted = outputs_on(first.model, inputs)
    for trial in trials:
        if not trial.points:  # nothing is quantized
            yield trial, wanted, wanted
            continue
        trial.carrier.switch(trial.points)
        yield trial, outputs_on(trial.carrier.model, inputs), wanted
    for trial in trials:
        trial.carrier.switch(())


def _distances(
    trial: Trial, outputs: Sequence[Output], found: list[Any], wanted: list[Any]
) -> list[tuple[float, float]]:
    try:
        return [o.distance(found[o.index], wanted[o.index]) for o in outputs]
    except InputError as error:
        raise InputError(f"{trial}: {error}") from error


@torch.no_grad()
def measure_metric(
    trials: Sequence[Trial], metric: Metric, book: Book, *, progress: bool
) -> dict[tuple[str, Choice], float]:
    """Return (name, choice) -> what ``metric`` falls by from the float model, for each trial.

    Raises:
        InputError: the metric is NaN or infinite.
    """
    first = trials[0].carrier
    first.switch(())
    reference = _checked("the float model", metric(first.model))
    bar = tqdm(trials, "sensitivity", unit="run", disable=None if progress else True)
    found: dict[tuple[str, Choice], float] = {}
    with _writing(book), closing(bar):
        for trial in bar:
            tally = book.tally(trial.name, str(trial.choice))
            if not tally.batches:
                _measure(trial, metric, reference, tally)
                book.write(now=False)
            found[trial.name, trial.choice] = tally.loss
    return found


def _measure(trial: Trial, metric: Metric, reference: float, tally: Tally) -> None:
    value = reference
    if trial.points:
        trial.carrier.switch(trial.points)
        value = _checked(str(trial), metric(trial.carrier.model))
        trial.carrier.switch(())
    tally.add([(reference - value, 1.0)])


def _checked(what: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # what is no number raises
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: the metric returned {value!r}; expected a number") from error
    if not math.isfinite(number):
        raise InputError(f"{what}: the metric is {number}; it has to be finite to be compared")
    return number


@contextmanager
def _writing(book: Book) -> Iterator[None]:
    """Write the book at the end of the ``with`` block, also if that fails."""
    try:
        yield
    finally:
        book.write()
