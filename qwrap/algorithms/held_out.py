"""Held-out batches: they decide whether a change to a quantized model is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from qwrap.model.wrapped import WrappedModel


def float_model(model: WrappedModel) -> WrappedModel:
    """Return the float model that was prepared, without what algorithms did to it since."""
    device = next((tensor.device for tensor in model.parameters()), None)
    return WrappedModel(model.graph).eval().to(device)


class HeldOut:
    """Batches, and what the float model makes of them."""

    def __init__(self, model: WrappedModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self._model, self._batches = model, batches
        reference = float_model(model)
        self._wanted = [_outputs(reference, inputs) for inputs in batches]

    def error(self) -> float:
        """Return the squared error of all float outputs, each relative to its own power."""
        error: list[float] = []
        power: list[float] = []
        for inputs, targets in zip(self._batches, self._wanted, strict=True):
            for i, (output, target) in enumerate(
                zip(_outputs(self._model, inputs), targets, strict=True)
            ):
                if i == len(error):
                    error.append(0.0)
                    power.append(0.0)
                if output.is_floating_point():
                    error[i] += float((output - target).square().sum())
                    power[i] += float(target.square().sum())
        return sum(e / p for e, p in zip(error, power, strict=True) if p > 0)


def _outputs(model: WrappedModel, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    result = model(**inputs)
    return list(result) if isinstance(result, tuple) else [result]
