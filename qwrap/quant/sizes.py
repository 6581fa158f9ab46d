"""The largest weights of a layer by its channels, and factors that make them equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwrap.graph.constants import Constants
from qwrap.graph.divisible import Divisible, Layer

DEAD = 1e-9  # of the largest range of a layer: the others are of channels that nothing comes from
FARTHEST = 2.0**24  # what no factor exceeds, nor its inverse


@dataclass(frozen=True, slots=True)
class Sizes:
    """The weight of a layer by output and input, and the classes of both.

    Attributes:
        largest: largest absolute value, float32 ``[G, O, I]``.
        squares: sum of squares over the positions of a kernel, float32 ``[G, O, I]``.
        inputs: class of each input, ``[G, I]``; the number of classes for none.
        outputs: class of each output, ``[G, O]``.
        positions: of the kernel.
    """

    largest: Tensor
    squares: Tensor
    inputs: Tensor
    outputs: Tensor
    positions: int

    @classmethod
    def of(cls, constants: Constants, layer: Layer, count: int) -> Sizes:
        """Return them for a layer among ``count`` classes."""
        weight, groups = constants.array(layer.node.inputs[1]), layer.kernel.groups
        assert weight is not None
        inputs, outputs = (
            torch.from_numpy(np.where(classes < 0, count, classes)).reshape(groups, -1)
            for classes in (layer.inputs, layer.outputs)
        )
        largest = torch.from_numpy(layer.kernel.sizes(weight)).float()
        squares = torch.from_numpy(layer.kernel.squares(weight)).float()
        return cls(largest, squares, inputs, outputs, layer.kernel.positions)

    def made(self, factors: Tensor) -> Tensor:
        """Return the largest weight of each output, ``[G, O]``, channels divided by ``factors``."""
        rows = (self.largest * factors[self.inputs].unsqueeze(1)).amax(2)
        return rows / factors[self.outputs]

    def taken(self, factors: Tensor) -> Tensor:
        """Return the largest weight of each input, ``[G, I]``, channels divided by ``factors``."""
        columns = (self.largest / factors[self.outputs].unsqueeze(2)).amax(1)
        return columns * factors[self.inputs]


def sizes_of(constants: Constants, divisible: Divisible) -> list[Sizes]:
    """Return the sizes of all layers of which some channel can be divided."""
    return [
        Sizes.of(constants, layer, divisible.count)
        for layer in divisible.layers
        if (layer.inputs >= 0).any() or (layer.outputs >= 0).any()
    ]


def equal_ranges(
    layers: Sequence[Sizes], divisible: Divisible, *, iterations: int, tolerance: float
) -> Tensor:
    """Return factors with which each channel is made by weights as large as those that take it.

    Of several layers that make or take a channel, the largest weight counts. A channel that only
    zeros make or take stays as it is.

    Args:
        layers: as ``sizes_of`` returns them.
        divisible: what can be divided.
        iterations: over all layers, in the order of the graph, at most.
        tolerance: largest change of a factor, as a share of it, with which to stop.

    Returns:
        Float32, one for each class.

    Source: Nagel et al., arXiv:1906.04721, section 4.1 and appendix A.
    """
    count = divisible.count
    factors = torch.ones(count + 1)  # the last one: of what stays
    groups = groups_of(layers, divisible)
    for _ in range(iterations):
        worst = 0.0
        for classes, makers, takers in groups:
            made, taken = torch.zeros(count + 1), torch.zeros(count + 1)
            for layer in makers:
                _raise(made, layer.outputs, layer.made(factors))
            for layer in takers:
                _raise(taken, layer.inputs, layer.taken(factors))
            step = (made[classes] / taken[classes]).sqrt()
            step = torch.where(step.isfinite() & (step > 0), step, torch.ones_like(step))
            factors[classes] *= step
            worst = max(worst, float(step.log().abs().max()))
        if worst < tolerance:
            break
    return factors[:-1].clamp(1 / FARTHEST, FARTHEST)


def groups_of(
    layers: Sequence[Sizes], divisible: Divisible
) -> list[tuple[Tensor, list[Sizes], list[Sizes]]]:
    """Return classes that are made together, each once, with the layers on both sides."""
    taken = np.zeros(divisible.count + 1, bool)
    taken[-1] = True
    found = []
    for run in divisible.runs:
        classes = np.unique(run)
        classes = classes[~taken[classes]]
        taken[classes] = True
        if classes.size:
            mask = torch.zeros(divisible.count + 1, dtype=torch.bool)
            mask[classes] = True
            makers = [layer for layer in layers if mask[layer.outputs].any()]
            takers = [layer for layer in layers if mask[layer.inputs].any()]
            found.append((torch.from_numpy(classes), makers, takers))
    return found


def _raise(largest: Tensor, classes: Tensor, values: Tensor) -> None:
    largest.scatter_reduce_(0, classes.reshape(-1), values.reshape(-1), "amax")


def range_ratio(layers: Sequence[Sizes], factors: Tensor) -> float:
    """Return largest over median range of a layer's outputs, in the geometric mean over layers.

    Args:
        layers: as ``sizes_of`` returns them.
        factors: one for each class, float32.
    """
    by, ratios = torch.cat([factors, torch.ones(1)]), [torch.zeros(())]
    for layer in layers:
        ranges = layer.made(by).reshape(-1)
        median = ranges.median()
        if median > DEAD * ranges.max():
            ratios.append((ranges.max() / median).log())
    return float(torch.stack(ratios[1:] or ratios).mean().exp())
