"""What became of an attempt to make a quantized model better: a plain value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an algorithm came to; true if its change was kept.

    Attributes:
        algorithm: its name, in words.
        kept: whether the model has the change; else it is bit for bit what it was.
        before: squared error of the float outputs on held-back batches, relative to their power and
            summed over the outputs.
        after: the same with the change, whether it was kept or not.
        details: what was done and what was left out, one line each.
        rounds: whether, since then, weights lie on the grid of their codes.
    """

    algorithm: str
    kept: bool
    before: float
    after: float
    details: tuple[str, ...] = ()
    rounds: bool = False

    def __bool__(self) -> bool:
        return self.kept

    def line(self) -> str:
        """Return one line of text without saying whether it was kept."""
        change = f"held-back error {self.before:.3g} to {self.after:.3g}"
        return "; ".join([f"{self.algorithm}, {change}", *self.details])
