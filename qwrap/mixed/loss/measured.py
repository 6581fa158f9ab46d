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
from qwrap.mixed.choices import Choice
from qwrap.mixed.loss.book import Book, Tally
from qwrap.mixed.loss.carriers import Carrier, Place
from qwrap.mixed.loss.outputs import Output, Reference
from qwrap.mixed.loss.prefixes import Kept, Prefixes, bytes_of, choose_cuts
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.samples import Samples
from qwrap.quant.prepare import device_of

EVERYTHING = ""  # no group is called so
ROOM = 2**28  # bytes of activations and float outputs that are kept at a time
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
    points: frozenset[Place]

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

    What a trial does not change is not run again: see ``qwrap.mixed.loss.prefixes``.

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
        latest, references = -1, []
        for trial, i, found, wanted in _Runs(trials, samples, tallies).each():
            if i != latest:
                latest, references = i, [o.reference(wanted[o.index]) for o in outputs]
            tallies[trial].add(_distances(trial, outputs, found, references))
            book.write(now=False)
            bar.update()
    return {(trial.name, trial.choice): tally.loss for trial, tally in tallies.items()}


class _Runs:
    """Runs trials on batches, those together that can be taken up at the same cut.

    Args:
        trials: what to run; those of one choice have the same carrier.
        samples: what to run it on.
        tallies: say how many batches of each trial are done.
    """

    def __init__(
        self, trials: Sequence[Trial], samples: Samples, tallies: Mapping[Trial, Tally]
    ) -> None:
        self._first, self._samples, self._tallies = trials[0].carrier, samples, tallies
        carriers = {id(trial.carrier): trial.carrier for trial in trials}
        self._prefixes = {key: Prefixes(carrier) for key, carrier in carriers.items()}
        own = self._prefixes[id(self._first)]
        starts = {trial: self._start(trial, own) for trial in trials}
        self.cuts = choose_cuts([*starts.values()])
        self._batches = list(samples.on(device_of(self._first.model)))
        self._at: dict[tuple[int, int], list[Trial]] = {}
        for trial, start in starts.items():
            cut = max(cut for cut in self.cuts if cut <= start)
            self._at.setdefault((cut, id(trial.carrier)), []).append(trial)

    def _start(self, trial: Trial, own: Prefixes) -> int:
        """Return the first node that a trial changes, 0 where its model is another graph."""
        prefixes = self._prefixes[id(trial.carrier)]
        return prefixes.start(trial.points) if prefixes.nodes == own.nodes else 0

    def each(self) -> Iterator[tuple[Trial, int, list[Any], list[Any]]]:
        """Yield trial, number of the batch, outputs and float outputs."""
        for batches in self._in_parts():
            kept, wanted = self._float_runs(batches)
            for cut in self.cuts:
                for key, prefixes in self._prefixes.items():
                    trials = self._at.get((cut, key), [])
                    now: Kept = {}
                    with prefixes.skipping(cut if trials else 0, now):
                        for i in batches:
                            now.update(kept[i])
                            for trial in self._left(trials, i):
                                yield trial, i, self._run(trial, i, wanted[i]), wanted[i]
                    for trial in trials:
                        trial.carrier.switch(())

    def _left(self, trials: Sequence[Trial], batch: int) -> list[Trial]:
        return [trial for trial in trials if self._tallies[trial].batches <= batch]

    def _run(self, trial: Trial, batch: int, wanted: list[Any]) -> list[Any]:
        if not trial.points:  # nothing is quantized
            return wanted
        trial.carrier.switch(trial.points)
        return outputs_on(trial.carrier.model, self._batches[batch])

    def _float_runs(self, batches: Sequence[int]) -> tuple[dict[int, Kept], dict[int, list[Any]]]:
        """Return for each batch what crosses the cuts, and the outputs."""
        self._first.switch(())
        kept: dict[int, Kept] = {}
        wanted: dict[int, list[Any]] = {}
        now: Kept = {}
        with self._prefixes[id(self._first)].keeping(self.cuts, now):
            for i in batches:
                wanted[i] = outputs_on(self._first.model, self._batches[i])
                kept[i] = dict(now)
        return kept, wanted

    def _in_parts(self) -> Iterator[list[int]]:
        """Yield the numbers of batches such that what is kept of them fits into ``ROOM``."""
        done = min(self._tallies[trial].batches for trial in self._tallies)
        left = list(range(done, len(self._batches)))
        if not left:
            return
        kept, wanted = self._float_runs(left[:1])
        size = bytes_of([*kept[left[0]].values(), *wanted[left[0]]])
        step = max(1, ROOM // max(size, 1))
        for start in range(0, len(left), step):
            yield left[start : start + step]


def _distances(
    trial: Trial,
    outputs: Sequence[Output],
    found: Sequence[Any],
    references: Sequence[Reference],
) -> list[tuple[float, float]]:
    pairs = zip(outputs, references, strict=True)
    try:
        return [output.distance(found[output.index], known) for output, known in pairs]
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
    reference = checked("the float model", metric(first.model))
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
        value = checked(str(trial), metric(trial.carrier.model))
        trial.carrier.switch(())
    tally.add([(reference - value, 1.0)])


def checked(what: str, value: object) -> float:
    """Return what a metric said of a model, as a number.

    Raises:
        InputError: it is none, or not finite.
    """
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
