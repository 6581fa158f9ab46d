"""What an assignment really loses: prepared, calibrated, and held against the float model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qwrap.config import QConfig
from qwrap.errors import InputError, StatisticsError
from qwrap.mixed.choices import Assignment, Group, config_with
from qwrap.mixed.loss.book import Tally
from qwrap.mixed.loss.measured import checked, outputs_on
from qwrap.mixed.loss.outputs import Output, outputs_of_graph
from qwrap.mixed.search.pareto import Measured
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.calibrate import calibrate
from qwrap.quant.prepare import prepare
from qwrap.quant.statistics.statistics import Statistics

Metric = Callable[[WrappedModel], float]
Inputs = Mapping[str, Any]

ROOM = 2**28  # bytes of float outputs that stay in memory


class Again:
    """Batches that every iteration makes anew."""

    def __init__(self, read: Callable[[], Iterable[Inputs]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Inputs]:
        yield from self._read()


class Evaluator:
    """Measures assignments of one model.

    Args:
        model: float; unchanged.
        groups: what assignments choose for.
        config: what else it is quantized with.
        calibration: batches for the ranges; read once for all assignments if they can be.
        held_out: batches to compare outputs on.
        measure: how outputs are compared, "kl" or "error", perhaps by name; see ``sensitivity``.
        metric: called with a model that simulates quantization, or with the float one.
    """

    def __init__(
        self,
        model: WrappedModel,
        groups: Sequence[Group],
        config: QConfig,
        calibration: Iterable[Inputs],
        held_out: Iterable[Inputs],
        measure: str | Mapping[str, str] = "kl",
        metric: Metric | None = None,
    ) -> None:
        self._model, self._groups, self._config = model, groups, config
        self._calibration, self._held_out, self._metric = calibration, held_out, metric
        self._measure = measure
        self._seen: list[Statistics] = []
        self._compared: list[Output] | None = None
        self._wanted: list[list[Any]] = []
        self._room = ROOM

    def of_float(self) -> Measured:
        """Return what the float model has: no loss."""
        return Measured(loss=0.0, metric=self._asked(self._model, "the float model"))

    def measure(self, assignment: Assignment) -> Measured:
        """Return what an assignment loses.

        Raises:
            InputError: a held-out batch does not fit, an output or the metric becomes NaN.
        """
        return self.judge(self.calibrated(assignment))

    def judge(self, model: WrappedModel) -> Measured:
        """Return what a quantized copy of the model loses; in ``eval`` mode, as it is."""
        return Measured(loss=self._loss(model), metric=self._asked(model, "the quantized model"))

    def calibrated(self, assignment: Assignment) -> WrappedModel:
        """Return a copy that simulates an assignment."""
        model = copy.deepcopy(self._model).eval()
        prepare(model, config_with(self._config, self._groups, assignment))
        for seen in self._seen:
            try:
                calibrate(model, (), statistics=seen, progress=False)
            except StatisticsError:  # of another opset, or without some tensor
                continue
            return model
        calibrate(model, self._calibration, progress=False)
        if "auto" not in _methods(self._config):
            self._keep(Statistics.of(model))
        return model

    def _keep(self, new: Statistics) -> None:
        """Add what was seen of one graph to what was seen of the same graph before, in place."""
        for i, old in enumerate(self._seen):
            if new.fingerprint.difference(old.fingerprint) is None:
                self._seen[i] = replace(old, tensors={**old.tensors, **new.tensors})
                return
        self._seen.append(new)

    def _asked(self, model: WrappedModel, what: str) -> float | None:
        if self._metric is None:
            return None
        with torch.no_grad():
            return checked(what, self._metric(model))

    @torch.no_grad()
    def _loss(self, model: WrappedModel) -> float:
        tally = Tally()
        for i, inputs in enumerate(self._held_out):
            wanted = self._float(i, inputs)
            if self._compared is None:
                self._compared = outputs_of_graph(self._model.graph, wanted, self._measure)
            found = outputs_on(model, inputs)
            tally.add([o.distance(found[o.index], wanted[o.index]) for o in self._compared])
        if not tally.batches:
            raise InputError("no batches were held out to compare outputs on; give held_out=")
        return tally.loss

    def _float(self, index: int, inputs: Inputs) -> list[Any]:
        """Return the float outputs of a held-out batch, which are kept as far as there is room."""
        if index < len(self._wanted):
            return self._wanted[index]
        wanted = outputs_on(self._model, inputs)
        size = sum(x.nbytes for x in wanted if isinstance(x, Tensor))
        if index == len(self._wanted) and size <= self._room:
            self._room -= size
            self._wanted.append(wanted)
        return wanted


def _methods(config: QConfig) -> set[str | None]:
    return {config.method, *(override.method for _, override in config.overrides)}
