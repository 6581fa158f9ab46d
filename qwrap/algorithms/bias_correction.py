"""Bias correction: take the mean error that quantization adds to each channel out of its bias."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwrap.model.operators import function_of_node
from qwrap.model.points import Program
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.held_out import float_model
from qwrap.quant.outcome import Outcome
from qwrap.quant.prepare import plan_of
from qwrap.quant.trial import attempt, split


def correct_biases(model: WrappedModel, batches: Iterable[Any]) -> Outcome:
    """Shift the biases of quantized layers so that each channel keeps its float mean, in place.

    Every layer is corrected behind already corrected ones, all of them in one pass: while a batch
    runs, each layer adds the mean shift it has seen so far, this batch's included. Half of the
    batches teach; the other half decide: if their outputs do not come closer to the float
    model's, everything stays as it was. One batch does both.

    Args:
        model: calibrated.
        batches: as for ``calibrate``; some 30 samples do. They are held in memory.

    Returns:
        Whether the correction was kept, and what came of it.

    Raises:
        InputError: there are no batches, or one does not fit.
        NotCalibratedError: the model is not calibrated.

    Source: Nagel et al., arXiv:1906.04721, section 4.2 (empirical bias correction).
    """
    teaching, deciding = split(model, batches)

    @torch.no_grad()
    def correct() -> list[str]:
        layers = _layers(model)
        _learn(model, layers, teaching)
        for layer in layers.values():
            layer.bias.add_(layer.shift)
        return [f"{len(layers)} biases"]

    return attempt(model, "bias correction", deciding, correct)


class _Layer:
    """One layer with a quantized bias: computes its output and learns its mean shift."""

    def __init__(self, function: Callable[..., Tensor], bias: Tensor) -> None:
        self.function, self.bias = function, bias
        self.targets: list[Tensor] = []
        self.shift = torch.zeros_like(bias)
        self.seen = 0

    def watch(self, output: Tensor) -> None:
        """Note the channel means of a float batch."""
        self.targets.append(_channel_means(output))

    def __call__(self, *inputs: Tensor) -> Tensor:
        output = self.function(*inputs)
        shift = self.targets[self.seen] - _channel_means(output)
        self.seen += 1
        self.shift += (shift - self.shift) / self.seen
        return output + self.shift.reshape(1, -1, *[1] * (output.dim() - 2))


def _layers(model: WrappedModel) -> dict[str, _Layer]:
    layers = {}
    users: dict[str, int] = {}
    biases = plan_of(model).biases
    for plan in biases.values():
        users[plan.value] = users.get(plan.value, 0) + 1
    for (key, _), plan in biases.items():
        bias = model.stored(plan.value)
        layer = model.graph.nodes[key].op_type in ("Conv", "Gemm")
        # A shared bias has no shift of its own.
        if layer and bias is not None and users[plan.value] == 1:
            function = function_of_node(model, key)
            assert function is not None
            layers[key] = _Layer(function, bias)
    return layers


def _learn(
    model: WrappedModel, layers: Mapping[str, _Layer], batches: Sequence[Mapping[str, Tensor]]
) -> None:
    graph = model.graph
    watchers = {graph.key(graph.nodes[key].outputs[0]): la.watch for key, la in layers.items()}
    taps = model.program.taps
    reference = float_model(model)
    with reference.watching(watchers):
        for inputs in batches:
            reference(**inputs)
    with model.running(Program(taps=taps, kernels=layers)):
        for inputs in batches:
            model(**inputs)


def _channel_means(output: Tensor) -> Tensor:
    return output.mean([axis for axis in range(output.dim()) if axis != 1])
