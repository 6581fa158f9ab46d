"""Runs one sensitivity analysis on calibrated copies of a model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwrap.errors import ConfigError
from qwrap.mixed.choices import FLOAT, Choice, Group
from qwrap.mixed.loss.book import Book
from qwrap.mixed.loss.carriers import Carrier, Place, switches_of, tensors_of
from qwrap.mixed.loss.fisher import fisher_losses
from qwrap.mixed.loss.measured import (
    EVERYTHING,
    Metric,
    Trial,
    measure_metric,
    measure_outputs,
    outputs_on,
)
from qwrap.mixed.loss.outputs import Output, in_decibel, outputs_of_graph
from qwrap.mixed.loss.ranking import Key, Sensitivity
from qwrap.model.points import ValuePoint
from qwrap.quant.auto.samples import Samples
from qwrap.quant.prepare import device_of, plan_of
from qwrap.quant.statistics.fingerprint import Fingerprint


@dataclass(frozen=True, slots=True)
class Part:
    """What is quantized at a time.

    Attributes:
        group: its name, nodes and choices.
        own: choice -> where the stubs are that quantize it.
        others: choice -> where the stubs are that quantize all else.
    """

    group: Group
    own: Mapping[Choice, frozenset[Place]]
    others: Mapping[Choice, frozenset[Place]]


def parts_of_groups(
    carriers: Sequence[Carrier],
    groups: Sequence[Group],
    *,
    drop_empty: bool,
    with_others: bool,
) -> list[Part]:
    """Return the parts that ``groups`` make.

    Args:
        carriers: copies of the model.
        groups: of its nodes.
        drop_empty: leave out those without stubs.
        with_others: say of each part also where the stubs of all else are, which takes a while.
    """
    own: dict[str, dict[Choice, frozenset[Place]]] = {group.name: {} for group in groups}
    others: dict[str, dict[Choice, frozenset[Place]]] = {group.name: {} for group in groups}
    for carrier in carriers:
        for name, points in switches_of(carrier, groups).items():
            own[name][carrier.choice] = points
        if not with_others:
            continue
        keys = set(plan_of(carrier.model).nodes)
        rest = [Group(g.name, tuple(sorted(keys - {*g.nodes})), g.choices) for g in groups]
        for name, points in switches_of(carrier, rest).items():
            others[name][carrier.choice] = points
    found = [Part(group, own[group.name], others[group.name]) for group in groups]
    return [part for part in found if any(part.own.values()) or not drop_empty]


def parts_of_tensors(carriers: Sequence[Carrier]) -> list[Part]:
    """Return a part for every tensor with a scale of its own in any of ``carriers``.

    Activations have one choice for each of their types, and so have weights.
    """
    own: dict[str, dict[Choice, frozenset[Place]]] = {}
    for carrier in carriers:
        for name, points in tensors_of(carrier).items():
            own.setdefault(name, {})[carrier.choice] = points
    parts = []
    for name, points_by in own.items():
        is_activation = any(point == ValuePoint(name) for p in points_by.values() for point in p)
        types: dict[str, Choice] = {}
        for choice in points_by:
            types.setdefault(choice.activation if is_activation else choice.weight, choice)
        kept = {choice: points_by[choice] for choice in types.values()}
        others = {c.choice: c.points - kept[c.choice] for c in carriers if c.choice in kept}
        parts.append(Part(Group(name, (), tuple(kept)), kept, others))
    return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """Everything that losses depend on.

    Attributes:
        carriers: copies of the model, one for each choice.
        parts: what is quantized at a time.
        by: how the parts were made.
        samples: to run.
        measure: see ``sensitivity``.
        rest: see ``sensitivity``.
    """

    carriers: Sequence[Carrier]
    parts: Sequence[Part]
    by: str
    samples: Samples
    measure: str | Mapping[str, str]
    rest: str

    def measured(
        self, metric: Metric | None, resume: str | os.PathLike[str] | None, *, progress: bool
    ) -> Sensitivity:
        """Return the losses found by running every trial; arguments as for ``sensitivity``."""
        trials = self._trials()
        book = Book(resume, self._settings(trials) if resume is not None else {})
        if metric is not None:
            outputs: list[Output] = []
            found = measure_metric(trials, metric, book, progress=progress)
        else:
            outputs = self._outputs()
            found = measure_outputs(trials, outputs, self.samples, book, progress=progress)
        found = self._in_unit(found)
        everything = {c.choice: found[EVERYTHING, c.choice] for c in self.carriers}
        losses = {key: loss for key, loss in found.items() if key[0] != EVERYTHING}
        if self.rest == "quantized":
            losses = {key: everything[key[1]] - loss for key, loss in losses.items()}
        return self._result("measured", losses, everything, outputs)

    def fisher(self, projections: int, seed: int, *, progress: bool) -> Sensitivity:
        """Return the losses estimated from gradients; arguments as for ``sensitivity``."""
        outputs = self._outputs()
        own = {part.group.name: part.own for part in self.parts}
        found = fisher_losses(
            self.carriers,
            own,
            outputs,
            self.samples,
            projections=projections,
            seed=seed,
            progress=progress,
        )
        return self._result("fisher", self._in_unit(found), {}, outputs)

    def _trials(self) -> list[Trial]:
        """Return what to run: for each choice everything first, then part after part."""
        trials = []
        for carrier in self.carriers:
            trials.append(Trial(EVERYTHING, carrier, carrier.points))
            for part in self.parts:
                if carrier.choice in part.group.choices:
                    points = part.own if self.rest == "float" else part.others
                    trials.append(Trial(part.group.name, carrier, points[carrier.choice]))
        return trials

    def _outputs(self) -> list[Output]:
        first, samples = self.carriers[0], self.samples
        first.switch(())
        with torch.no_grad():
            inputs = next(samples.on(device_of(first.model)))
            wanted = outputs_on(first.model, inputs)
            return outputs_of_graph(first.model.graph, wanted, self.measure)

    def _in_unit(self, found: dict[Key, float]) -> dict[Key, float]:
        if self.measure != "sqnr":
            return found
        return {key: in_decibel(error) for key, error in found.items()}

    def _result(
        self,
        method: str,
        losses: Mapping[Key, float],
        everything: Mapping[Choice, float],
        outputs: Sequence[Output],
    ) -> Sensitivity:
        none = -float("inf") if self.measure == "sqnr" and self.rest == "float" else 0.0
        groups = tuple(part.group for part in self.parts)
        if not groups:
            raise ConfigError("nothing of the model is quantized; plan.summary() says why")
        ordered = {
            (group.name, choice): none if choice == FLOAT else losses[group.name, choice]
            for group in groups
            for choice in group.choices
            if choice == FLOAT or (group.name, choice) in losses
        }
        return Sensitivity(
            losses=ordered,
            groups=groups,
            by=self.by,
            method=method,
            measure=self.measure if isinstance(self.measure, str) else "outputs",
            rest=self.rest,
            samples=self.samples.count if outputs else 0,
            outputs={output.name: output.kind for output in outputs},
            everything=dict(everything),
        )

    def _settings(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """Return what the losses depend on, in short."""
        model = self.carriers[0].model
        stubs = [[str(t.name), str(t.choice), sorted(map(str, t.points))] for t in trials]
        return {
            "model": _digest(json.dumps(Fingerprint.of(model).to_dict()).encode()),
            "samples": _digest(*map(_bytes, self.samples.batches)),
            "scales": _digest(*(_scales(carrier) for carrier in self.carriers)),
            "groups": _digest(json.dumps(stubs).encode()),
            "measure": self.measure if isinstance(self.measure, str) else dict(self.measure),
            "rest": self.rest,
        }


def _scales(carrier: Carrier) -> bytes:
    states = carrier.model.state_dict()
    return b"".join(
        tensor.detach().cpu().numpy().tobytes()
        for name, tensor in sorted(states.items())
        if isinstance(tensor, Tensor) and name.endswith(("initial_scale", "initial_zero_point"))
    )


def _bytes(value: Any) -> bytes:
    if isinstance(value, Mapping):
        return b"".join(_bytes(item) for item in value.values())
    if isinstance(value, list):
        return b"".join(map(_bytes, value))
    array = value.numpy() if isinstance(value, Tensor) else value
    return b"" if array is None else array.tobytes()


def _digest(*parts: bytes) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()
