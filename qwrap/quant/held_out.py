"""Held-out batches: they decide whether a change to a quantized model is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qwrap.model.wrapped import WrappedModel

Outputs = list[Tensor]


def float_model(model: WrappedModel) -> WrappedModel:
    """Return the float model that was prepared, without what algorithms did to it since."""
    device = next((tensor.device for tensor in model.parameters()), None)
    return WrappedModel(model.graph).eval().to(device)


class HeldOut:
    """Batches, and what the float model makes of them.

    Args:
        model: calibrated; its error is asked for.
        batches: graph input -> tensor.
        wanted: the float outputs for each batch; None asks the float model that was prepared.

    Attributes:
        power: squared float outputs, for every output that holds floats: float64 ``[M]`` on the
            CPU.
    """

    def __init__(
        self,
        model: WrappedModel,
        batches: Sequence[Mapping[str, Tensor]],
        wanted: Sequence[Outputs] | None = None,
    ) -> None:
        self._model, self._batches = model, batches
        if wanted is None:
            reference = float_model(model)
            wanted = [outputs_of(reference, inputs) for inputs in batches]
        self._wanted = wanted
        self.power = torch.zeros(len(model.output_names), dtype=torch.float64)
        for targets in wanted:
            for i, target in enumerate(targets):
                if isinstance(target, Tensor) and target.is_floating_point():
                    self.power[i] += float(target.square().sum())

    def errors(self, part: slice = slice(None)) -> Tensor:
        """Return the squared error of every float output, float64 ``[M]`` on the CPU.

        Args:
            part: which batches to run; all by default.
        """
        errors = torch.zeros_like(self.power)
        for inputs, targets in zip(self._batches[part], self._wanted[part], strict=True):
            pairs = zip(outputs_of(self._model, inputs), targets, strict=True)
            for i, (output, target) in enumerate(pairs):
                if isinstance(output, Tensor) and output.is_floating_point():
                    errors[i] += float((output - target).square().sum())
        return errors

    def error(self) -> float:
        """Return the squared error of all float outputs, each relative to its own power."""
        return relative(self.errors(), self.power)


def relative(errors: Tensor, power: Tensor) -> float:
    """Return the sum over outputs of error over power."""
    return float((errors / power)[power > 0].sum())


def outputs_of(model: WrappedModel, inputs: Mapping[str, Tensor]) -> Outputs:
    """Return the graph outputs as a list."""
    result = model(**inputs)
    return list(result) if isinstance(result, tuple) else [result]
