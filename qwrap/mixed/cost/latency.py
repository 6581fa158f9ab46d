"""Measured onnxruntime latency of every choice, and of the conversions between groups."""

from __future__ import annotations

import functools
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qwrap.config import QConfig
from qwrap.errors import InputError
from qwrap.mixed.choices import (
    Assignment,
    Choice,
    Edge,
    Group,
    all_quantized,
    check_assignment,
)
from qwrap.mixed.cost.attribution import attribute
from qwrap.mixed.cost.correction import corrected
from qwrap.mixed.cost.cost import shapes_seen
from qwrap.mixed.cost.estimate import estimated_parts
from qwrap.mixed.cost.fit import fitted
from qwrap.mixed.cost.origin import Origin
from qwrap.mixed.cost.owners import Border, Owners
from qwrap.mixed.cost.parts import Parts, Timed
from qwrap.mixed.cost.profiling import Feed, kernels_of, latencies
from qwrap.mixed.cost.samples import sample_assignments
from qwrap.mixed.cost.table_file import Content, read, write
from qwrap.mixed.cost.trial import Trial, make_trial
from qwrap.model.wrapped import WrappedModel

ROUNDS = 8
MIXES = 12
PROFILED = 0.04  # seconds for each round


@dataclass(slots=True)
class LatencyTable:
    """What every choice costs in onnxruntime on this machine; sums of it predict assignments.

    Attributes:
        seconds: (group, choice) -> seconds, with what it always pays on its outputs.
        edges: tensors between groups, with the seconds of each conversion.
        constant: seconds that every assignment pays: nodes in no group, and the run itself.
        origin: of which model, where, and with how many threads.
        timed: assignments whose files were timed as wholes, with their seconds.
        took: seconds that measuring took.
    """

    seconds: dict[tuple[str, Choice], float]
    edges: list[Edge]
    constant: float
    origin: Origin
    timed: list[tuple[dict[str, Choice], float]] = field(default_factory=list)
    took: float = 0.0

    @classmethod
    def measure(
        cls,
        model: WrappedModel,
        groups: Sequence[Group],
        inputs: Mapping[str, Any],
        *,
        config: QConfig | None = None,
        threads: int = 0,
        mixes: int = MIXES,
        rounds: int = ROUNDS,
        seed: int = 0,
        progress: bool = True,
    ) -> LatencyTable:
        """Time files with one choice everywhere and mixtures, as wholes and by kernel.

        About a second for each file of a small network, a few for a large one, most of it to make
        the file. Nothing else should run meanwhile.

        Args:
            model: a wrapped model, unchanged.
            groups: of ``groups_of``.
            inputs: graph input -> tensor or array, of the shapes that latency is wanted for.
            config: what else the model will be quantized with.
            threads: that one operator may use; 0 for onnxruntime's default, one for each core.
            mixes: how many mixtures are timed.
            rounds: turns in which the files are timed, for some hundredths of a second each.
            seed: of the mixtures.
            progress: show a progress bar on a terminal.

        Raises:
            ModelError: onnxruntime refuses a file.
            InputError: it cannot run the model on ``inputs``.
            ConfigError: there are no groups.
        """
        start = time.monotonic()
        bench = _Bench(model, groups, inputs, config, threads)
        borders = bench.borders()
        samples = sample_assignments(groups, borders, mixes, seed)
        trials, walls, profiles = bench.run(samples, rounds, progress, profile=True)
        timed = [
            Timed(trial.assignment, wall, attribute(trial, kernels))
            for trial, wall, kernels in zip(trials, walls, profiles, strict=True)
        ]
        parts = fitted(groups, borders, bench.sizes(borders), timed)
        origin = Origin.here(model, groups, inputs, threads)
        whole = [(dict(t.assignment), t.seconds) for t in timed]
        took = time.monotonic() - start
        return cls(parts.seconds, parts.edges, parts.constant, origin, whole, took)

    @classmethod
    def estimate(
        cls,
        model: WrappedModel,
        groups: Sequence[Group],
        inputs: Mapping[str, Any],
        *,
        config: QConfig | None = None,
    ) -> LatencyTable:
        """Return a table from shapes alone, with the cost model that placement decides by.

        It knows one thread of one class of CPUs, each kernel by itself: it ranks assignments, but
        does not predict a latency. Arguments as in ``measure``.
        """
        bench = _Bench(model, groups, inputs, config, 1)
        prepared = bench.prepared
        parts = estimated_parts(prepared, groups, bench.borders(), bench.shapes())
        origin = Origin.here(model, groups, inputs, 1)
        return cls(parts.seconds, parts.edges, parts.constant, origin)

    def predict(self, assignment: Assignment) -> float:
        """Return the seconds that one run of the file of an assignment should take."""
        parts = self._parts
        values = parts.values()
        return sum(values[term] for term in parts.terms(assignment))

    def learn(self, timed: Sequence[tuple[Assignment, float]]) -> LatencyTable:
        """Return a table that also fits files timed since, such as those a search has chosen.

        A search chooses what is predicted too low more often than what is predicted too high;
        timing some of its choices and learning from them takes that away.

        Args:
            timed: assignments with their seconds, see ``measured_latencies``.
        """
        more = [(dict(assignment), seconds) for assignment, seconds in timed]
        parts = corrected(self._parts, [Timed(a, seconds) for a, seconds in more])
        whole = [*self.timed, *more]
        return LatencyTable(
            parts.seconds, parts.edges, parts.constant, self.origin, whole, self.took
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, all of it or nothing.

        Raises:
            ExportError: the folder does not exist or cannot be written to.
        """
        content = Content(
            self.seconds, self.edges, self.constant, self.origin, self.timed, self.took
        )
        write(Path(path), content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table that ``save`` wrote; ``origin`` says what it holds for.

        Raises:
            TableError: it cannot be read, is damaged, or of another kind.
        """
        c = read(Path(path))
        return cls(c.seconds, c.edges, c.constant, c.origin, c.timed, c.took)

    @property
    def _parts(self) -> Parts:
        known = {(edge.tensor, pair) for edge in self.edges for pair in edge.costs}
        return Parts(self.seconds, self.edges, self.constant, known)


def measured_latencies(
    model: WrappedModel,
    groups: Sequence[Group],
    assignments: Sequence[Assignment],
    inputs: Mapping[str, Any],
    *,
    config: QConfig | None = None,
    threads: int = 0,
    rounds: int = ROUNDS,
    progress: bool = True,
) -> list[float]:
    """Return the seconds that one run of the file of each assignment takes, timed in turns.

    Arguments, errors and the time it needs as in ``LatencyTable.measure``.

    Args:
        model: a wrapped model, unchanged.
        groups: of ``groups_of``.
        assignments: what to make files of.
        inputs: graph input -> tensor or array.
        config: what else the model will be quantized with.
        threads: that one operator may use; 0 for onnxruntime's default.
        rounds: turns.
        progress: show a progress bar on a terminal.
    """
    bench = _Bench(model, groups, inputs, config, threads)
    return bench.run(assignments, rounds, progress, profile=False)[1]


class _Bench:
    """Makes files of assignments and times them."""

    def __init__(
        self,
        model: WrappedModel,
        groups: Sequence[Group],
        inputs: Mapping[str, Any],
        config: QConfig | None,
        threads: int,
    ) -> None:
        self.model, self.groups, self.inputs = model, groups, inputs
        self.config, self.threads = config, threads
        self.feed = as_feed(model, inputs)

    def run(
        self, assignments: Sequence[Assignment], rounds: int, progress: bool, *, profile: bool
    ) -> tuple[list[Trial], list[float], list[Any]]:
        """Return files, which are gone by then, their seconds, and their kernels if wanted."""
        for assignment in assignments:
            check_assignment(self.groups, assignment)
        steps = len(assignments) * (1 + rounds + profile)
        off = None if progress else True  # None: where there is no terminal
        with (
            tempfile.TemporaryDirectory(prefix="qwrap-latency-") as name,
            tqdm(total=steps, desc="measuring latency", unit="step", disable=off) as bar,
        ):
            folder, trials = Path(name), []
            for number, assignment in enumerate(assignments):
                path = folder / f"{number}.onnx"
                trials.append(self._trial(assignment, path))
                bar.update()
            paths = [trial.path for trial in trials]
            walls = latencies(paths, self.feed, self.threads, rounds, bar.update)
            profiles = []
            for path in paths if profile else ():
                seconds = PROFILED * rounds
                profiles.append(kernels_of(path, self.feed, self.threads, folder, seconds))
                bar.update()
        return trials, walls, profiles

    def _trial(self, assignment: Assignment, path: Path) -> Trial:
        return make_trial(self.model, self.groups, assignment, self.inputs, path, self.config)

    @functools.cached_property
    def prepared(self) -> WrappedModel:
        """A copy of the model with all quantized that can be."""
        return all_quantized(self.model, self.config)

    def borders(self) -> list[Border]:
        """Return the tensors between groups."""
        return Owners(self.prepared, self.groups).borders

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all float tensors, of the first time they are made."""
        graph, values = self.prepared.graph, self.prepared.layout.values
        nodes = [node for node, _ in self.prepared.layout.placed()]
        computed = {
            graph.key(v)
            for node in nodes
            for v in (*node.inputs, *node.outputs)
            if v is not None and v.name and graph.type_of(v).is_float and values.is_computed(v)
        }
        seen = shapes_seen(self.prepared, sorted(computed), self.inputs)
        return {key: shapes[0] for key, shapes in seen.items() if shapes}

    def sizes(self, borders: Sequence[Border]) -> dict[str, int]:
        """Return the number of elements of the tensors between groups; 0 if they are not made."""
        shapes = self.shapes()
        return {b.tensor: math.prod(shapes.get(b.tensor, (0,))) for b in borders}


def as_feed(model: WrappedModel, inputs: Mapping[str, Any]) -> Feed:
    """Return inputs as onnxruntime takes them.

    Raises:
        InputError: one is missing or unknown, or numpy has no such type.
    """
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"inputs: expected {{graph input: tensor}}, got {type(inputs).__name__}; "
            "give one batch, not a list of them"
        )
    if set(inputs) != set(model.input_names):
        raise InputError(f"inputs {sorted(inputs)}: the graph has {sorted(model.input_names)}")
    try:
        return {name: np.asarray(value) for name, value in inputs.items()}
    except TypeError as error:
        raise InputError(f"onnxruntime takes no inputs of this type: {error}") from error
