"""The last step of a high effort: all weights and scales together, towards the float outputs."""

from __future__ import annotations

from collections.abc import Sequence

from qwrap.model.wrapped import WrappedModel
from qwrap.quant.outcome import Outcome
from qwrap.quant.prepare import plan_of
from qwrap.quant.trial import Inputs, attempt
from qwrap.train.finetune import finetune
from qwrap.train.rates import weight_rate

STEPS = 200
FASTER = 3.0  # than training that has thousands of steps for the same way
HELD = 8  # every so many batches one is held back


def tune(
    model: WrappedModel, batches: Sequence[Inputs], *, seed: int = 0, progress: bool = True
) -> Outcome:
    """Train a calibrated model briefly towards the float model's outputs, in place, if that helps.

    It is ``qwrap.finetune`` with settings for a few hundred samples; every eighth batch decides.

    Args:
        model: calibrated.
        batches: graph inputs.
        seed: of their order.
        progress: show a bar on a terminal.
    """
    deciding = list(batches[::HELD])
    teaching = [batch for i, batch in enumerate(batches) if i % HELD] or deciding
    rounded = any(outcome.rounds for outcome in plan_of(model).outcomes)

    def train() -> list[str]:
        report = finetune(
            model,
            teaching,
            steps=STEPS,
            lr=FASTER * weight_rate(model),
            weight_scale_lr=0.0 if rounded else 1e-4,
            held_out=deciding,
            seed=seed,
            progress=progress,
        )
        return report.lines()

    return attempt(model, "fine-tuning", deciding, train)
