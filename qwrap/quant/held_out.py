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

    def sums(self) -> Tensor:
        """Return squared error and power of every output, for each batch: float64 ``[N, 2, M]``.

        They are on the CPU; outputs that are not floats have zeros.
        """
        count = len(self._model.output_names)
        sums = torch.zeros(len(self._batches), 2, count, dtype=torch.float64)
        for row, inputs, targets in zip(sums, self._batches, self._wanted, strict=True):
            pairs = zip(outputs_of(self._model, inputs), targets, strict=True)
            for i, (output, target) in enumerate(pairs):
                if isinstance(output, Tensor) and output.is_floating_point():
                    row[0, i] = float((output - target).square().sum())
                    row[1, i] = float(target.square().sum())
        return sums

    def error(self) -> float:
        """Return the squared error of all float outputs, each relative to its own power."""
        return relative_error(self.sums().sum(0))


def relative_error(sums: Tensor) -> float:
    """Return the sum over outputs of error over power, from ``[2, M]`` of both."""
    error, power = sums
    return float((error / power)[power > 0].sum())


def outputs_of(model: WrappedModel, inputs: Mapping[str, Tensor]) -> Outputs:
    """Return the graph outputs as a list."""
    result = model(**inputs)
    return list(result) if isinstance(result, tuple) else [result]
