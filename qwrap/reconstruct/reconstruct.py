"""Train a model unit by unit, each behind the quantized units before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.held_out import float_model
from qwrap.quant.outcome import Outcome
from qwrap.quant.trial import attempt
from qwrap.reconstruct.fit import EQUAL, Recipe, fit
from qwrap.reconstruct.samples import Inputs, Samples
from qwrap.reconstruct.sensitivity import sensitivities
from qwrap.reconstruct.stream import HELD, Stream
from qwrap.reconstruct.units import Granularity, Unit, find_units

MEMORY = 400 * 2**20  # bytes of activations that wait for their unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model is trained unit by unit.

    Attributes:
        algorithm: what this is called.
        granularity: how large units are.
        recipe: how each is trained.
        seed: of the order of samples, and of what is not rounded.
        memory: bytes that activations may take between two units.
        fisher: weigh errors by how much the model's outputs depend on them, see ``sensitivities``.
        progress: show a bar on a terminal.
    """

    algorithm: str
    granularity: Granularity
    recipe: Recipe
    seed: int = 0
    memory: int = MEMORY
    fisher: bool = False
    progress: bool = True


def reconstruct(model: WrappedModel, batches: Sequence[Inputs], plan: Plan) -> Outcome:
    """Train every unit of a calibrated model in turn, in place, if the outputs gain by it.

    Every eighth sample is held back. They judge each unit, which stays as it was if it does not
    come closer to its float outputs, and all of them together.

    Args:
        model: calibrated.
        batches: graph inputs, at least one.
        plan: how to.
    """
    course = _Course(model, batches, plan)
    return attempt(model, plan.algorithm, course.deciding, course.run, rounds=True)


class _Course:
    """The way through all units."""

    def __init__(self, model: WrappedModel, batches: Sequence[Inputs], plan: Plan) -> None:
        self._model, self._plan = model, plan
        self._units, self._left_out = find_units(model, plan.granularity)
        self._reference = float_model(model)
        keys = {key for unit in self._units for key in (*unit.alive, *unit.outputs)}
        self._samples = Samples(self._reference, batches, sorted(keys))

    @property
    def deciding(self) -> list[Inputs]:
        """What is held back, as batches."""
        held = range(0, len(self._samples.rows), HELD)
        return [self._samples.batch(group) for group in self._samples.groups(held, {})]

    def run(self) -> list[str]:
        """Train, in place; return what there is to say."""
        plan, model, reference = self._plan, self._model, self._reference
        if not any(unit.weights for unit in self._units):
            return [f"no {plan.granularity} has a weight to learn", *self._left_out]
        generator = torch.Generator().manual_seed(plan.seed)
        counts = self._counts(generator)
        both = plan.recipe.choice.drop > 0
        stream = Stream(model, reference, self._units, self._samples, plan.memory, both=both)
        results = []
        for unit in self._shown():
            stream.enter(unit)
            if unit.weights:
                results.append(fit(model, reference, unit, stream, plan.recipe, generator, counts))
            stream.leave(unit)
        kept = sum(result.kept for result in results)
        learned = f"{kept} of {len(results)} {plan.granularity}s improved"
        return [learned, *stream.notes, *self._left_out]

    def _shown(self) -> tqdm[Unit]:
        """Return the units, behind a progress bar."""
        plan = self._plan
        off = None if plan.progress else True
        return tqdm(self._units, plan.algorithm, unit=plan.granularity, disable=off)

    def _counts(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Return how much the error of each element of an activation counts."""
        if not self._plan.fisher:
            return EQUAL
        learning = [i for i in range(len(self._samples.rows)) if i % HELD] or [0]
        outputs = sorted({key for unit in self._units for key in unit.outputs})
        return sensitivities(self._reference, self._samples, learning, outputs, generator)
