"""The algorithms that a calibrated model goes through, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from qwrap.algorithms.batch_norm import restore_channels
from qwrap.algorithms.bias_correction import correct_biases
from qwrap.algorithms.brecq import brecq
from qwrap.algorithms.equalization import equalize
from qwrap.algorithms.gptq import round_weights
from qwrap.algorithms.range_choice import choose_methods
from qwrap.algorithms.sequential_mse import sequential_mse
from qwrap.errors import ConfigError
from qwrap.model.batches import iterate
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.held_out import float_model
from qwrap.quant.calibrate import calibrate
from qwrap.quant.live import live_layers
from qwrap.quant.outcome import Outcome
from qwrap.quant.prepare import config_of, plan_of, stubs
from qwrap.quant.trial import Inputs
from qwrap.reconstruct.samples import Samples

Effort = Literal["none", "default", "high"]
Step = Callable[[WrappedModel, Sequence[Inputs], int, bool], object]
"""Called with the model, the batches, the seed, and whether to show bars."""


def _round_in_turn(model: WrappedModel, data: Sequence[Inputs], bar: bool) -> None:
    """Round layer by layer behind rounded ones; where that has too little data, all at once."""
    if not round_weights(model, data, sequential=True, progress=bar):
        round_weights(model, data, progress=bar)


STEPS: Mapping[str, Step] = {
    "equalize": lambda m, data, _, bar: equalize(m, data, progress=bar),
    "equalize_ranges": lambda m, data, _, bar: equalize(m, data, balance="ranges", progress=bar),
    "choose_methods": lambda m, data, _seed, _bar: choose_methods(m, data),
    "sequential_mse": lambda m, data, _, bar: sequential_mse(m, data, progress=bar),
    "round_weights": lambda m, data, _, bar: round_weights(m, data, progress=bar),
    "round_in_turn": lambda m, data, _, bar: _round_in_turn(m, data, bar),
    "brecq": lambda m, data, seed, bar: brecq(m, data, drop=0.5, seed=seed, progress=bar),
    "restore_channels": lambda m, data, _, bar: restore_channels(m, data, progress=bar),
    "correct_biases": lambda m, data, _seed, _bar: correct_biases(m, data),
}
EFFORTS: Mapping[Effort, Sequence[str]] = {
    "none": (),
    "default": (
        "equalize",
        "choose_methods",
        "sequential_mse",
        "round_weights",
        "restore_channels",
        "correct_biases",
    ),
    "high": (
        "equalize",
        "equalize_ranges",  # starts over, so that the better one stays
        "choose_methods",
        "sequential_mse",
        "round_in_turn",
        "brecq",
        "restore_channels",
        "correct_biases",
    ),
}
OF_RANGES = ("equalize", "equalize_ranges", "choose_methods")  # they observe or choose anew
AFTER_EQUALIZING = "choose_methods"
MOST = {"brecq": 1024, "round_in_turn": 512}  # samples that are worth their time
ENOUGH = 128  # for all others
SIDE_BY_SIDE = 16  # samples in a batch
FEWEST = 8  # batches to divide between learning and deciding


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
    calibration: Iterable[Any] | None = None,
    keep_ranges: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> list[Outcome]:
    """Let a calibrated model go through one algorithm after another, in place.

    Each is kept only if the outputs of batches that it has not learned from come closer to the
    float model's; ``model.plan.summary()`` says which were, and what they brought. Samples that can
    run side by side do, whatever the batches.

    Args:
        model: calibrated.
        batches: as for ``calibrate``; all are held in memory.
        effort: "none"; "default", seconds: layers are equalized, each activation gets the range
            method and each weight the range that serve the outputs best, weights are rounded so
            that errors cancel (GPTQ), mean and variance of channels restored; or "high", minutes:
            weights are rounded layer after layer, then their rounding is learned block by block
            (BRECQ with QDrop).
        calibration: more data than ``batches``, to observe again what equalizing has changed; None
            takes ``batches`` for that.
        keep_ranges: leave ranges of activations as they are, because they come from elsewhere.
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
    asked = config_of(model)
    data = list(iterate(batches, model))
    if not EFFORTS[effort] or not any(True for _ in stubs(model)):
        return []
    left_out: set[str] = set(OF_RANGES) if keep_ranges else set()
    if asked.method != "mse":  # the user chose one
        left_out.add("choose_methods")
    if any(True for _ in live_layers(model)):  # their own statistics are there for that
        left_out.add("restore_channels")
    total, joined = _side_by_side(model, data)
    known = len(plan_of(model).outcomes)

    def outcomes() -> list[Outcome]:
        return plan_of(model).outcomes[known:]

    for name in EFFORTS[effort]:
        if name == AFTER_EQUALIZING and calibration is not None and any(outcomes()):
            calibrate(model, calibration, progress=progress)
        if name not in left_out:
            stride = max(total // MOST.get(name, ENOUGH), 1)
            STEPS[name](model, joined[::stride], seed, progress)
    return outcomes()


def _side_by_side(model: WrappedModel, batches: Sequence[Inputs]) -> tuple[int, Sequence[Inputs]]:
    """Return how many samples there are, and batches of up to 16 of them, if the model allows that.

    Larger batches are divided, so that there are several: some learn, and others decide.
    """
    outputs = [model.graph.key(value) for value in model.graph.outputs]
    samples = Samples(float_model(model), batches, outputs)
    total = len(samples.rows)
    size = max(min(SIDE_BY_SIDE, total // FEWEST), 1)
    return total, [samples.batch(ids) for ids in samples.groups(range(total), {}, size)]
