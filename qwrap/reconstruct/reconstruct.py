"""Train a model unit by unit, each behind the quantized units before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm

from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.held_out import float_model
from qwrap.quant.outcome import Outcome
from qwrap.quant.trial import attempt
from qwrap.reconstruct.fit import Recipe, fit
from qwrap.reconstruct.samples import Inputs, Samples
from qwrap.reconstruct.stream import HELD, Stream
from qwrap.reconstruct.units import Granularity, find_units

MEMORY = 400 * 2**20  # bytes of activations that wait for their unit


def reconstruct(
    model: WrappedModel,
    batches: Sequence[Inputs],
    algorithm: str,
    granularity: Granularity,
    recipe: Recipe,
    *,
    seed: int = 0,
    memory: int = MEMORY,
    progress: bool = True,
) -> Outcome:
    """Train every unit of a calibrated model in turn, in place, if the outputs gain by it.

    Every eighth sample is held back. They judge each unit, which stays as it was if it does not
    come closer to its float outputs, and all of them together.

    Args:
        model: calibrated.
        batches: graph inputs, at least one.
        algorithm: what this is called.
        granularity: how large units are.
        recipe: how they are trained.
        seed: of the order of samples, and of what is not rounded.
        memory: bytes that activations may take between two units.
        progress: show a bar on a terminal.
    """
    units, left_out = find_units(model, granularity)
    reference = float_model(model)
    keys = {key for unit in units for key in (*unit.alive, *unit.outputs)}
    samples = Samples(reference, batches, sorted(keys))
    held = range(0, len(samples.rows), HELD)
    deciding = [samples.batch(group) for group in samples.groups(held, {})]

    def change() -> list[str]:
        if not any(unit.weights for unit in units):
            return [f"no {granularity} has a weight to learn", *left_out]
        both = recipe.choice.drop > 0
        stream = Stream(model, reference, units, samples, memory, both=both)
        generator = torch.Generator().manual_seed(seed)
        results = []
        for unit in tqdm(units, algorithm, unit=granularity, disable=None if progress else True):
            stream.enter(unit)
            if unit.weights:
                results.append(fit(model, reference, unit, stream, recipe, generator))
            stream.leave(unit)
        kept = sum(result.kept for result in results)
        learned = f"{kept} of {len(results)} {granularity}s improved"
        return [learned, *stream.notes, *left_out]

    return attempt(model, algorithm, deciding, change)
