"""High-bias absorption: what a Relu lets through of every value, moved into the next bias."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.errors import ConfigError
from qwrap.graph.index import OnnxGraph
from qwrap.graph.shifts import Shift, find_shifts, shift
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.held_out import float_model
from qwrap.quant.edit import fixed_values
from qwrap.quant.equivalent import change_equivalently
from qwrap.quant.outcome import Outcome
from qwrap.quant.prepare import plan_of
from qwrap.quant.trial import Inputs, split

NAME = "high-bias absorption"


def absorb_biases(
    model: WrappedModel, batches: Iterable[Any], *, deviations: float = 3.0
) -> Outcome:
    """Take from each channel what all of its values exceed, in place, if that helps.

    What a Relu gets is made smaller by ``c``, which no value was seen below, and the bias of the
    layers behind it larger by what they make of ``c``: the same function for all data that stays
    above, and a smaller range to round. It is done where that is exact: from a Conv, ConvTranspose
    or Gemm with a bias, through a Relu or LeakyRelu, moves and pools that pass a shift on, into
    Gemms and into Convs without padding, each with a bias, and nothing else may read the tensor.

    ``c`` is the smallest value in the data, or the mean less ``deviations`` standard deviations if
    that is less, and not below 0. The float graph of the model gets the new biases too. A
    calibrated model is calibrated again, with ``batches``, and the change is kept only if the
    outputs for half of them come closer to the float ones.

    Args:
        model: prepared; calibrated or not.
        batches: as for ``calibrate``; held in memory.
        deviations: below the mean, 0 or more.

    Returns:
        Whether it was kept, and what was left out.

    Raises:
        ConfigError: the model is not prepared, or ``deviations`` is below 0.
        InputError: there are no batches, or one does not fit.

    Source: Nagel et al., arXiv:1906.04721, section 4.1.3.
    """
    if not deviations >= 0:
        raise ConfigError(f"deviations={deviations}: give 0 or more; 3 is usual")
    plan_of(model)
    teaching, deciding = split(model, batches)
    data = teaching if deciding is teaching else [*teaching, *deciding]
    shifts, left = find_shifts(model.graph, fixed_values(model))
    amounts = {key: c for key, c in _exceeded(model, shifts, data, deviations).items() if c.any()}
    lines = [f"{len(amounts)} of {len(shifts)} layers with a Relu that some channels always exceed"]
    lines += left

    def edit(draft: ir.Model) -> None:
        graph = OnnxGraph(draft)
        for each in find_shifts(graph, fixed_values(model))[0]:
            if each.key in amounts:
                shift(graph, each, amounts[each.key].double().numpy())

    return change_equivalently(model, NAME, data, deciding, edit if amounts else None, lines)


@dataclass(slots=True)
class _Seen:
    """Smallest value, sum, sum of squares and number of values of each channel."""

    low: Tensor
    total: Tensor
    squares: Tensor
    count: int = 0

    def add(self, axis: int, x: Tensor) -> None:
        """Take in a tensor."""
        rows = x.detach().movedim(axis, 0).flatten(1).double()
        if not rows.numel():
            return
        self.low = torch.minimum(self.low, rows.amin(1).cpu())
        self.total += rows.sum(1).cpu()
        self.squares += rows.square().sum(1).cpu()
        self.count += rows.shape[1]

    def exceeded(self, deviations: float) -> Tensor:
        """Return what all values exceed, float64, at least 0."""
        if not self.count:
            return torch.zeros_like(self.low)
        mean = self.total / self.count
        spread = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        return torch.minimum(self.low, mean - deviations * spread).clamp(min=0)


def _exceeded(
    model: WrappedModel, shifts: Sequence[Shift], data: Sequence[Inputs], deviations: float
) -> Mapping[str, Tensor]:
    """Return for each layer what its channels always exceed, by the key of its node."""
    seen = {}
    for each in shifts:
        nothing = torch.zeros(each.channels, dtype=torch.float64)
        seen[each.key] = _Seen(torch.full_like(nothing, float("inf")), nothing.clone(), nothing)
    watchers = {each.value: partial(seen[each.key].add, each.axis) for each in shifts}
    reference = float_model(model)
    with torch.no_grad(), reference.watching(watchers):
        for inputs in data:
            reference(**inputs)
    return {key: found.exceeded(deviations) for key, found in seen.items()}
