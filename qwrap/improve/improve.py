"""The algorithms that a calibrated model goes through, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from qwrap.algorithms.bias_correction import correct_biases
from qwrap.algorithms.gptq import round_weights
from qwrap.algorithms.range_choice import choose_methods
from qwrap.errors import ConfigError
from qwrap.model.batches import iterate
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.outcome import Outcome
from qwrap.quant.prepare import config_of

Effort = Literal["none", "default", "high"]
Algorithm = Callable[[WrappedModel, Sequence[Any]], Outcome]

ALGORITHMS: Mapping[Effort, Sequence[Algorithm]] = {
    "none": (),
    "default": (choose_methods, round_weights, correct_biases),
    "high": (choose_methods, round_weights, correct_biases),
}


def check_effort(effort: str) -> None:
    """Refuse an effort that there is not.

    Raises:
        ConfigError: it is not one of ``Effort``.
    """
    if effort not in get_args(Effort):
        raise ConfigError(f"effort={effort!r}: choose one of {get_args(Effort)}")


def improve(
    model: WrappedModel,
    batches: Iterable[Any],
    *,
    effort: Effort = "default",
    keep_ranges: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> list[Outcome]:
    """Let a calibrated model go through one algorithm after another, in place.

    Each is kept only if the outputs of batches that it has not learned from come closer to the
    float model's; ``model.plan.summary()`` says which were, and what they brought.

    Args:
        model: calibrated.
        batches: as for ``calibrate``; all are held in memory.
        effort: "none", "default" (seconds), or "high" (minutes): see ``ALGORITHMS``.
        keep_ranges: leave the method of ranges as it is, because they come from elsewhere.
        seed: of everything that is drawn.
        progress: show bars on a terminal.

    Returns:
        What came of each, in order.

    Raises:
        ConfigError: there is no such effort, or the model is not prepared.
        InputError: there are no batches, or one does not fit.
        NotCalibratedError: the model is not calibrated.
    """
    check_effort(effort)
    del seed, progress
    data = list(iterate(batches, model))
    chosen = keep_ranges or config_of(model).method != "mse"  # by the user
    left_out = {choose_methods} if chosen else set()
    return [step(model, data) for step in ALGORITHMS[effort] if step not in left_out]
