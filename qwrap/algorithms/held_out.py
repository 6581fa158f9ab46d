"""Held-out batches: they decide whether a change to a quantized model is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from qwrap.model.points import Program
from qwrap.model.wrapped import WrappedModel


class HeldOut:
    """Batches with the outputs of the float model, to be made before its parameters change."""

    def __init__(self, model: WrappedModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self._model, self._batches = model, batches
        with model.running(Program()):
            self._wanted = [self._outputs(inputs) for inputs in batches]

    def error(self) -> float:
        """Return the squared error of all float outputs, each relative to its own power."""
        error: list[float] = []
        power: list[float] = []
        for inputs, targets in zip(self._batches, self._wanted, strict=True):
            for i, (output, target) in enumerate(zip(self._outputs(inputs), targets, strict=True)):
                if i == len(error):
                    error.append(0.0)
                    power.append(0.0)
                if output.is_floating_point():
                    error[i] += float((output - target).square().sum())
                    power[i] += float(target.square().sum())
        return sum(e / p for e, p in zip(error, power, strict=True) if p > 0)

    def _outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        result = self._model(**inputs)
        return list(result) if isinstance(result, tuple) else [result]
