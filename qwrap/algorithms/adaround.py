"""AdaRound: learn for each weight of a layer whether it is rounded up or down."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qwrap.model.batches import iterate
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.outcome import Outcome
from qwrap.reconstruct.fit import Recipe
from qwrap.reconstruct.reconstruct import MEMORY, Plan, reconstruct


def adaround(
    model: WrappedModel,
    batches: Iterable[Any],
    *,
    iterations: int = 500,
    batch_size: int = 32,
    lr: float = 0.05,
    seed: int = 0,
    memory: int = MEMORY,
    progress: bool = True,
) -> Outcome:
    """Learn which codes the weights of each layer get, so that its output stays near the float one.

    In place. Layers are trained one after the other, each on what the quantized layers before it
    make, with the activation function behind it. Nothing but the rounding is learned. Every eighth
    sample is held back: a layer that does not come closer for them stays as it was, and all does
    if the model's outputs do not.

    Weights that lie on their grid already, as after ``round_weights``, have to be beaten as they
    are. What is inside the bodies of If, Loop and Scan, or read in several layers, is left alone.

    Args:
        model: calibrated.
        batches: as for ``calibrate``, without labels; some hundred samples do. They are held in
            memory. Samples are drawn one by one where they can run side by side.
        iterations: for each layer.
        batch_size: samples in each.
        lr: of the variables that decide on rounding (Adam).
        seed: of the order of samples.
        memory: bytes that the activations between two layers may take; where the samples need more,
            fewer of them teach.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: a number is out of its range, or the model is not prepared.
        InputError: there are no batches, or one does not fit.
        NotCalibratedError: the model is not calibrated.

    Source: Nagel et al., arXiv:2004.10568, sections 3.3 to 3.5.
    """
    recipe = Recipe(iterations=iterations, batch_size=batch_size, lr=lr)
    plan = Plan(
        algorithm="AdaRound",
        granularity="layer",
        recipe=recipe,
        seed=seed,
        memory=memory,
        progress=progress,
    )
    return reconstruct(model, list(iterate(batches, model)), plan)
