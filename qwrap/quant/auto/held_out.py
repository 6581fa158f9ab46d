"""Held-out batches: they decide whether a change to a quantized model is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qwrap.model.wrapped import WrappedModel

Outputs = list[Tensor]


def float_model(model: WrappedModel) -> WrappedModel:
    """Return the float model that was prepared, without what algorithms did to it since."""
    device = next((tensor.device for tensor in model.parameters()), None)
    return WrappedModel(model.graph, model.layout.settings).eval().to(device)


class HeldOut:
    """Batches, and what the float model makes of them.

    Args:
        model: calibrated; its error is asked for.
        batches: graph input -> tensor.
        wanted: the float outputs for each batch; None asks the float model that was prepared.
        sizes: samples in each batch, along the first axis of outputs; None takes each as one.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: WrappedModel,
        batches: Sequence[Mapping[str, Tensor]],
        wanted: Sequence[Outputs] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self._model, self._batches = model, batches
        if wanted is None:
            reference = float_model(model)
            wanted = [outputs_of(reference, inputs) for inputs in batches]
        self._wanted = wanted
        asked = sizes or [1] * len(batches)
        self._sizes = [_common_size(t, size) for t, size in zip(wanted, asked, strict=True)]
        pairs = zip(wanted, self._sizes, strict=True)
        self._powers = [_squares(targets, size) for targets, size in pairs]

    @torch.no_grad()
    def errors(self, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return squared error and power of every float output for each sample, ``[S, M]`` each.

        They are float64, on the CPU.

        Args:
            part: which batches to run; all by default.
        """
        empty = torch.zeros(0, len(self._model.output_names), dtype=torch.float64)
        errors, powers = [empty], [empty, *self._powers[part]]
        for inputs, targets, size in zip(
            self._batches[part], self._wanted[part], self._sizes[part], strict=True
        ):
            outputs = outputs_of(self._model, inputs)
            pairs = zip(outputs, targets, strict=True)
            errors.append(_squares([o - t if _is_float(t) else t for o, t in pairs], size))
        return torch.cat(errors), torch.cat(powers)

    def error(self) -> float:
        """Return the squared error of all float outputs, each relative to its own power."""
        errors, powers = (each.sum(0) for each in self.errors())
        return float((errors / powers)[powers > 0].sum())

    def sqnr(self) -> float:
        """Return the least ratio of signal to error of any float output, in dB."""
        errors, powers = (each.sum(0) for each in self.errors())
        worst = float((errors / powers)[powers > 0].amax()) if (powers > 0).any() else 0.0
        return -10 * math.log10(worst) if worst > 0 else math.inf


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _common_size(outputs: Outputs, size: int) -> int:
    """Return ``size`` if it is the first axis of all float outputs, else 1."""
    floats = [x for x in outputs if _is_float(x)]
    return size if all(x.dim() and len(x) == size for x in floats) else 1


def _squares(values: Outputs, size: int) -> Tensor:
    """Return the sum of squares of each float output in each sample, float64 ``[size, M]``."""
    nothing = torch.zeros(size, dtype=torch.float64)
    columns = [
        x.reshape(size, -1).square().sum(1, dtype=torch.float64).cpu() if _is_float(x) else nothing
        for x in values
    ]
    return torch.stack(columns, 1)


def outputs_of(model: WrappedModel, inputs: Mapping[str, Tensor]) -> Outputs:
    """Return the graph outputs as a list."""
    result = model(**inputs)
    return list(result) if isinstance(result, tuple) else [result]
