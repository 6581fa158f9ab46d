"""What rounding will add to the outputs of layers, as a function of how channels are scaled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwrap.graph.constants import Constants
from qwrap.graph.divisible import Divisible, Layer
from qwrap.graph.index import OnnxGraph
from qwrap.graph.kernel import integer
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.plan import QuantPlan
from qwrap.quant.sizes import FARTHEST, Sizes
from qwrap.quant.sources import source_of

SHARPNESS = 16  # of the smooth maximum: that of a thousand equal numbers is 1.5 times each
PATIENCE = 20  # steps without a gain after which the search is over
GAIN = 1e-3  # what counts as one, as a share
RATE = 0.1  # of the first step, in natural logarithms of factors
TINY = 1e-30


@dataclass(slots=True)
class _Activation:
    """A quantized tensor: largest absolute value of each class, ``[C + 1]``, and its codes."""

    largest: Tensor
    steps: float
    is_symmetric: bool
    has_negative: bool = False


@dataclass(slots=True)
class _Product:
    """A layer: its weight, how that is rounded, and what data showed of it.

    Attributes:
        sizes: of the weight.
        steps: between the ends of the weight's range, None where it stays float.
        per_channel: whether each output has a scale.
        power: of each input, mean square ``[G, I]``, summed over batches.
        output: power of all outputs together, the same.
        batches: that it has seen.
    """

    sizes: Sizes
    steps: float | None
    per_channel: bool
    power: Tensor
    output: float = 0.0
    batches: int = 0


class Noise:
    """The rounding noise of quantized tensors and weights, as it arrives at the layers' outputs.

    It is counted relative to the power of those outputs: the error of a tensor is that of its
    scale, the same for all of its channels, times the weights that it goes into; that of a weight
    is that of its scale times what it multiplies. Errors count as independent and uniform over a
    step, as in Widrow's model of quantization. What a layer adds to channels that go into others
    counts where those are read.

    Args:
        model: prepared; says what is quantized, and how.
        graph: float graph in which channels are divided; its values have the keys of the plan.
        divisible: what can be divided in it.
    """

    def __init__(self, model: WrappedModel, graph: OnnxGraph, divisible: Divisible) -> None:
        self._plan, self._graph, self._divisible = _plan(model), graph, divisible
        self._count = divisible.count
        self._activations = self._quantized()
        self._products = [
            (layer, self._product(Constants(graph.model), layer)) for layer in divisible.layers
        ]

    def _quantized(self) -> dict[str, tuple[Tensor, _Activation]]:
        found = {}
        for value, place in self._divisible.places.items():
            key = self._graph.key(value)
            tensor = self._plan.tensors.get(key)
            if tensor is None or tensor.source != key:
                continue
            classes = torch.from_numpy(np.where(place < 0, self._count, place))
            spec, largest = tensor.spec, torch.zeros(self._count + 1)
            steps = float(2**spec.dtype.bits - 1)
            found[key] = classes, _Activation(largest, steps, spec.symmetric)
        return found

    def _product(self, constants: Constants, layer: Layer) -> _Product:
        sizes = Sizes.of(constants, layer, self._count)
        planned = self._plan.constants.get((self._graph.node_key(layer.node), 1))
        steps = None if planned is None else float(2**planned.spec.dtype.bits - 1)
        per_channel = planned is not None and planned.spec.axis is not None
        return _Product(sizes, steps, per_channel, torch.zeros(sizes.inputs.shape))

    # --- observing -------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, batches: Iterable[Mapping[str, Any]], model: WrappedModel) -> None:
        """Take in what ``model``, which computes ``graph`` in float, makes of ``batches``."""
        watchers: dict[str, list[Callable[[Tensor], None]]] = defaultdict(list)
        for key, (classes, activation) in self._activations.items():
            watchers[key].append(partial(_see_range, activation, classes))
        for layer, product in self._products:
            value = layer.node.inputs[0]
            assert value is not None
            watchers[self._graph.key(value)].append(partial(_see_input, layer, product))
            output = self._graph.key(layer.node.outputs[0])
            watchers[output].append(partial(_see_output, layer, product))
        with model.watching({key: partial(_all, each) for key, each in watchers.items()}):
            for inputs in batches:
                model(**inputs)

    # --- the noise -------------------------------------------------------------------------------

    def least(
        self,
        start: Tensor,
        *,
        iterations: int,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return the factors with the least noise that gradient descent finds.

        It starts where that is least of all ones, ``start``, and the square roots of ``start``.

        Args:
            start: factors, float32, one for each class.
            iterations: steps of Adam at most.
            progress: called with 1 after each.

        Returns:
            Float32 on the CPU, one for each class.
        """
        cost = self.cost()
        with torch.no_grad():
            logs = min((start.log() * share for share in (0.0, 0.5, 1.0)), key=cost)
        logs.requires_grad_(True)
        optimizer = torch.optim.Adam([logs], lr=RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, iterations)
        best, since, found = float("inf"), 0, logs.detach().clone()
        for _ in range(iterations):
            optimizer.zero_grad()
            loss = cost(logs)
            if not loss.requires_grad:  # nothing that is rounded can be scaled
                return torch.ones_like(start)
            value = float(loss.detach())
            if value < (1 - GAIN) * best:
                best, since, found = value, 0, logs.detach().clone()
            elif (since := since + 1) >= PATIENCE:
                break
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(1)
        return found.exp().clamp(1 / FARTHEST, FARTHEST)

    def cost(self) -> Callable[[Tensor], Tensor]:
        """Return what maps logarithms of factors, ``[C]``, to the noise, a number."""
        return _Cost(self._seen(), [a for _, a in self._activations.values()], self._count)

    def reach(self) -> Tensor:
        """Return the largest absolute value of each class in what layers read, float32 ``[C]``.

        It is 0 where that is not quantized.
        """
        found = torch.zeros(self._count + 1)
        for layer, _ in self._products:
            value = layer.node.inputs[0]
            assert value is not None
            source = source_of(self._plan, self._graph, value)
            if source in self._activations:
                found = torch.maximum(found, self._activations[source][1].largest)
        return found[:-1]

    def _seen(self) -> list[_Product]:
        return [product for _, product in self._products if product.output > 0]


class _Cost:
    """Sums up the noise."""

    def __init__(
        self, products: Sequence[_Product], activations: Sequence[_Activation], count: int
    ) -> None:
        gains = torch.zeros(count + 1)
        for each in products:
            gain = each.sizes.squares.sum(1) * (each.batches / each.output)
            gains.index_add_(0, each.sizes.inputs.reshape(-1), gain.reshape(-1))
        self._gains = gains
        self._tensors = [_held(each, gains) for each in activations if each.largest[:-1].any()]
        self._weights = [
            (each, _weighed(each, gains, count)) for each in products if each.steps is not None
        ]

    def __call__(self, logs: Tensor) -> Tensor:
        factors = torch.cat([logs, logs.new_zeros(1)]).exp()
        total = logs.new_zeros(())
        for classes, largest, steps, gains in self._tensors:
            by = factors[classes]
            step = _largest(largest / by, 0) / steps
            total = total + (step.square() * by.square() * gains).sum()
        for product, gains in self._weights:
            total = total + self._weight_noise(product, gains, factors)
        return total / 12

    def _weight_noise(self, product: _Product, gains: Tensor, factors: Tensor) -> Tensor:
        sizes = product.sizes
        inputs, outputs = factors[sizes.inputs], factors[sizes.outputs]
        scaled = sizes.largest * inputs.unsqueeze(1)
        if product.per_channel:  # the scale of an output goes with its factor
            step = _largest(scaled, 2).squeeze(2)
        else:
            step = _largest((scaled / outputs.unsqueeze(2)).reshape(-1), 0) * outputs
        power = (product.power / product.batches / inputs.square()).sum(1, keepdim=True)
        assert product.steps is not None
        noise = (2 * step / product.steps).square() * power * sizes.positions
        return (noise * gains).sum()


def _held(each: _Activation, gains: Tensor) -> tuple[Tensor, Tensor, float, Tensor]:
    """Return the classes in a tensor, and for each its range, and what its noise is times."""
    classes = each.largest.nonzero().squeeze(1)
    is_wide = each.is_symmetric or each.has_negative
    stays = classes == len(gains) - 1
    counts = gains[classes]
    # What stays counts as much as what does not; what it goes into is not known by class.
    counts = torch.where(stays, counts[~stays].mean(), counts)
    return classes, each.largest[classes], each.steps / (2 if is_wide else 1), counts


def _weighed(each: _Product, gains: Tensor, count: int) -> Tensor:
    """Return what the noise of each output counts for, ``[G, O]``."""
    own = each.batches / each.output
    of_output = gains[each.sizes.outputs]
    stays = (each.sizes.outputs == count) | (of_output == 0)
    return torch.where(stays, torch.full_like(of_output, own), of_output)


def _largest(values: Tensor, axis: int) -> Tensor:
    """Return a smooth maximum of numbers from 0 up."""
    top = values.detach().amax(axis, keepdim=True).clamp(min=TINY)
    powers = (values / top).pow(SHARPNESS).sum(axis, keepdim=True)
    return top * powers.clamp(min=TINY).pow(1 / SHARPNESS)


def _all(watchers: Sequence[Callable[[Tensor], None]], x: Tensor) -> None:
    for watcher in watchers:
        watcher(x)


def _see_range(activation: _Activation, classes: Tensor, x: Tensor) -> None:
    if not x.numel():
        return
    axes = [axis for axis, size in enumerate(classes.shape) if size == 1]
    size = x.detach().float().abs()
    size = (size.amax(axes, keepdim=True) if axes else size).cpu()
    found = classes.expand(size.shape).reshape(-1)
    activation.largest.scatter_reduce_(0, found, size.reshape(-1), "amax")
    activation.has_negative |= bool((x < 0).any())


def _see_input(layer: Layer, product: _Product, x: Tensor) -> None:
    axis = 1 if layer.node.op_type.startswith("Conv") else -1
    if layer.node.op_type == "Gemm" and integer(layer.node, "transA", 0):
        axis = 0
    power = x.detach().float().square().movedim(axis, 0).flatten(1).mean(1)
    product.power += power.reshape(product.power.shape).cpu()
    product.batches += 1


def _see_output(layer: Layer, product: _Product, x: Tensor) -> None:
    product.output += float(x.detach().float().square().mean()) * layer.kernel.outputs


def _plan(model: WrappedModel) -> QuantPlan:
    assert isinstance(model.plan, QuantPlan)
    return model.plan
