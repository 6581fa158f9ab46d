"""BRECQ and QDrop: learn the rounding of all weights of a block together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qwrap.model.batches import iterate
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.outcome import Outcome
from qwrap.reconstruct.fit import Recipe
from qwrap.reconstruct.reconstruct import MEMORY, Plan, reconstruct
from qwrap.reconstruct.trainee import Choice


def brecq(
    model: WrappedModel,
    batches: Iterable[Any],
    *,
    iterations: int = 500,
    batch_size: int = 32,
    lr: float = 0.05,
    drop: float = 0.0,
    learn_scales: bool = True,
    learn_biases: bool = True,
    scale_lr: float = 1e-3,
    bias_lr: float = 1e-2,
    fisher: bool = False,
    seed: int = 0,
    memory: int = MEMORY,
    progress: bool = True,
) -> Outcome:
    """Learn the codes of the weights of each block, so that its outputs stay near the float ones.

    In place. Blocks, such as a residual block or half a transformer layer, are found on the graph,
    and trained one after the other, each on what the quantized blocks before it make, under the
    scheme that is deployed: with all activations rounded, those inside the block and its output
    included. Every eighth sample is held back: a block that does not come closer for them stays as
    it was, and all does if the model's outputs do not.

    Weights that lie on their grid already, as after ``round_weights``, have to be beaten as they
    are. What is inside the bodies of If, Loop and Scan, or read in several blocks, is left alone.

    Args:
        model: calibrated.
        batches: as for ``calibrate``, without labels; some hundred samples do. They are held in
            memory. Samples are drawn one by one where they can run side by side.
        iterations: for each block.
        batch_size: samples in each.
        lr: of the variables that decide on rounding (Adam).
        drop: probability with which an element of an activation is not rounded while weights learn,
            below 1. With 0.5 this is QDrop.
        learn_scales: learn the scales of activations too.
        learn_biases: learn biases too.
        scale_lr: of scales, relative to them.
        bias_lr: of biases, in units of the noise that rounding to nearest would give them.
        fisher: weigh errors by how much the outputs of the float model depend on each element.
        seed: of all that is drawn.
        memory: bytes that the activations between two blocks may take; where the samples need more,
            fewer of them teach.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: a number is out of its range, or the model is not prepared.
        InputError: there are no batches, or one does not fit.
        NotCalibratedError: the model is not calibrated.

    Source: Li et al., arXiv:2102.05426, section 3; Wei et al., arXiv:2203.05740, section 3.3.
    """
    choice = Choice(scales=learn_scales, biases=learn_biases, drop=drop)
    recipe = Recipe(
        iterations=iterations,
        batch_size=batch_size,
        lr=lr,
        scale_lr=scale_lr,
        bias_lr=bias_lr,
        choice=choice,
    )
    plan = Plan(
        algorithm="QDrop" if drop else "BRECQ",
        granularity="block",
        recipe=recipe,
        seed=seed,
        memory=memory,
        fisher=fisher,
        progress=progress,
    )
    return reconstruct(model, list(iterate(batches, model)), plan)
