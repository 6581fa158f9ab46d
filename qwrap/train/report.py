"""What a fine-tuning did, step by step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

End = Literal["done", "patience", "data"]

ENDS: dict[End, str] = {
    "done": "all steps were done",
    "patience": "the held-out loss had stopped falling",
    "data": "the data ended, which can be read once",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One look at the training.

    Attributes:
        step: optimizer steps done.
        loss: mean loss on the batches trained on since the last look, inner tensors included; NaN
            before the first step.
        outputs: the same without inner tensors.
        held_out: loss of the outputs on what was held out, NaN if nothing was.
        lr: learning rate of weights in the last step.
    """

    step: int
    loss: float
    outputs: float
    held_out: float
    lr: float


@dataclass(slots=True)
class FinetuneReport:
    """How the distance from the float model went down, and which state was kept.

    ``print(report)`` shows it.

    Attributes:
        history: from before the first step to after the last one.
        best_step: the step whose state the model has now; 0: it is exactly as it was before.
        end: why training ended.
        batches: batches trained on in each epoch, None where the data ended first.
        held_out_batches: batches held out.
        lowest: held-out loss of the state kept, NaN if nothing was held out.
        seconds: how long it took.
    """

    history: list[Record] = field(default_factory=list)
    best_step: int = 0
    end: End = "done"
    batches: int | None = None
    held_out_batches: int = 0
    lowest: float = math.nan
    seconds: float = 0.0

    @property
    def before(self) -> float:
        """Held-out loss before training, NaN if nothing was held out."""
        return self.history[0].held_out if self.history else math.nan

    @property
    def improved(self) -> bool:
        """Whether the model is another one than before."""
        return self.best_step > 0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON or a logger."""
        derived = {"before": self.before, "improved": self.improved}
        return {**asdict(self), **derived}

    def summary(self) -> str:
        """Return in two lines what came of it."""
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Return what ``summary`` says, line by line."""
        done = self.history[-1].step if self.history else 0
        lines = [f"fine-tuned for {done} steps in {self.seconds:.0f} s: {ENDS[self.end]}"]
        if not self.held_out_batches:
            lines.append("nothing was held out: the state after the last step was kept, unchecked")
        elif not self.improved:
            lines.append(
                f"held-out loss {self.before:.3g}: no state had a lower one, so the model is "
                "exactly as it was"
            )
        else:
            less = 1 - self.lowest / self.before
            lines.append(
                f"held-out loss {self.before:.3g} -> {self.lowest:.3g} ({less:.0%} less), kept "
                f"from step {self.best_step}; {self.held_out_batches} batches held out"
            )
        return lines

    def __str__(self) -> str:
        lines = [f"{'step':>6} {'training':>10} {'outputs':>10} {'held out':>10}  learning rate"]
        for r in self.history:
            mark = "  <- kept" if r.step == self.best_step else ""
            numbers = " ".join(f"{_number(x):>10}" for x in (r.loss, r.outputs, r.held_out))
            lines.append(f"{r.step:>6} {numbers}  {r.lr:.2e}{mark}")
        return "\n".join([self.summary(), *lines])


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.4g}"
