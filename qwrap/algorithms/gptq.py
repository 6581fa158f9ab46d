"""GPTQ: round the weights of a layer so that their errors cancel on its input."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.compensation import compensate
from qwrap.errors import ConfigError
from qwrap.model.attributes import attributes_of
from qwrap.model.points import UsePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import fake_quantize, spread
from qwrap.ops.traits import WEIGHTED
from qwrap.quant.constants import deployed
from qwrap.quant.outcome import Outcome
from qwrap.quant.prepare import plan_of
from qwrap.quant.row_moments import RowMoments
from qwrap.quant.stubs import Stub
from qwrap.quant.trial import attempt, split
from qwrap.quant.unfold import MATRIX_OPERATORS, Unfold

LARGEST_LAYER = 8192  # inputs per output; the matrices grow with the square
LEAST_GAIN = 0.05  # of the error; over some 15 samples, less may be chance


def round_weights(model: WrappedModel, batches: Iterable[Any], *, damping: float = 0.01) -> Outcome:
    """Choose the codes of all weights so that each layer's output stays near its float one.

    Weights are replaced in place, by values on the grid that calibration chose: quantizing them
    again gives these codes. The rounding error of one input is made good by the inputs after it,
    as far as they were correlated in the data; where a layer has a bias of its own, that takes
    the mean error. All layers learn in one pass, behind weights rounded to nearest.

    Half of the batches teach; the other half decide: if the squared error of their outputs does
    not fall by a twentieth, everything stays as it was. One batch does both. Weights that several
    nodes use, of more than two axes in a MatMul, or of more than 8192 inputs are left alone.

    Args:
        model: calibrated; biases not yet corrected.
        batches: as for ``calibrate``; some 30 samples do. They are held in memory.
        damping: what is added to each input's variance, relative to their mean.

    Returns:
        Whether the new weights were kept, and what came of it.

    Raises:
        ConfigError: ``damping`` is not above 0, or the model is not prepared.
        InputError: there are no batches, or one does not fit.
        NotCalibratedError: the model is not calibrated.

    Source: Frantar et al., arXiv:2210.17323.
    """
    if not damping > 0:
        raise ConfigError(f"damping={damping}: expected more than 0; 0.01 is usual")
    teaching, deciding = split(model, batches)

    @torch.no_grad()
    def round_all() -> list[str]:
        layers, moments = _layers(model)
        _learn(model, moments, teaching)
        for layer in layers:
            layer.round(damping)
        return [f"{len(layers)} of {len(plan_of(model).constants)} weights"]

    return attempt(model, "GPTQ rounding", deciding, round_all, least_gain=LEAST_GAIN, rounds=True)


Moments = dict[str, dict[Unfold, RowMoments]]  # of every input value, one for each way to cut it


class _Layer:
    """One quantized weight, with its bias if that is its own."""

    def __init__(
        self,
        moments: RowMoments,
        model: WrappedModel,
        weight: str,
        bias: Tensor | None,
        stub: Stub,
        node: ir.Node,
    ) -> None:
        self.moments, self.bias, self.stub = moments, bias, stub
        self.outputs_first = _output_axis(node) == 0
        self._model, self._weight = model, weight
        self._shape = _stored(model, weight).shape

    def round(self, damping: float) -> None:
        """Round the weight and let the bias take the mean error, in place."""
        if not self.moments.count:
            return
        mean, second = self.moments.mean, self.moments.covariance
        if self.bias is None:
            second += mean[:, :, None] * mean[:, None]
        weight = deployed(self._model, self._weight)
        original = self._matrix(weight)
        rounded = compensate(original, second, self._grid(), damping)
        if self.bias is not None:
            self.bias += ((original - rounded).mT @ mean[:, :, None]).flatten().to(self.bias.dtype)
        columns = rounded.mT.flatten(0, 1)  # [outputs, K]
        first = columns if self.outputs_first else columns.t()
        self._model.assign(self._weight, first.reshape(weight.shape))

    def _matrix(self, values: Tensor) -> Tensor:
        """Return the weight, or one value for each of its elements, as float64 ``[G, K, R]``."""
        values = values if self.outputs_first else values.t()
        groups = self.moments.unfold.groups
        matrix = values.double().reshape(groups, values.shape[0] // groups, -1)
        return matrix.mT.contiguous()

    def _grid(self) -> Callable[[Tensor, Tensor], Tensor]:
        qparams, shape = self.stub.qparams, self._shape
        spec = replace(self.stub.grid, axis=0, block_size=None)
        scale, zero_point = (
            self._matrix(spread(values, shape, qparams).expand(shape))
            for values in (qparams.scale, qparams.zero_point)
        )

        def round_to_grid(rest: Tensor, inputs: Tensor) -> Tensor:
            """Round what one input of each group contributes to every output, ``[G, R]``."""
            values = rest[:, 0]
            rows = inputs[:, None, None].expand(-1, 1, values.shape[1])
            rounded = fake_quantize(
                values.flatten().to(torch.float32),
                scale.gather(1, rows).flatten().to(torch.float32),
                zero_point.gather(1, rows).flatten().to(torch.int32),
                spec,
            )
            return rounded.reshape(values.shape).to(values.dtype)

        return round_to_grid


def _layers(model: WrappedModel) -> tuple[list[_Layer], Moments]:
    plan, graph = plan_of(model), model.graph
    moments: Moments = defaultdict(dict)
    layers = []
    for (key, index), constant in plan.constants.items():
        node, weight = graph.nodes[key], _own(model, constant.value)
        if weight is None or not _fits(node, index, weight):
            continue
        stub = model.tap(UsePoint(key, index))
        assert isinstance(stub, Stub)
        assert node.inputs[0] is not None
        unfold = Unfold.of(node, weight)
        shared = moments[graph.key(node.inputs[0])].setdefault(unfold, RowMoments(unfold))
        bias = plan.biases.get((key, 2))
        own_bias = None if bias is None else _own(model, bias.value)
        layers.append(_Layer(shared, model, constant.value, own_bias, stub, node))
    return layers, moments


def _stored(model: WrappedModel, value: str) -> Tensor:
    tensor = model.stored(value)
    assert tensor is not None
    return tensor


def _own(model: WrappedModel, value: str) -> Tensor | None:
    """Return the tensor of an initialiser that one node alone reads."""
    return model.stored(value) if len(model.graph.values[value].uses()) == 1 else None


def _fits(node: ir.Node, index: int, weight: Tensor) -> bool:
    if node.op_type not in MATRIX_OPERATORS or index != WEIGHTED[node.op_type].weight:
        return False
    if node.op_type != "Conv" and weight.dim() != 2:
        return False
    return weight.numel() <= LARGEST_LAYER * weight.shape[_output_axis(node)]


def _output_axis(node: ir.Node) -> int:
    return WEIGHTED[node.op_type].axis(attributes_of(node))


def _learn(model: WrappedModel, moments: Moments, batches: Sequence[Mapping[str, Tensor]]) -> None:
    def watch(found: Iterable[RowMoments], x: Tensor) -> None:
        for each in found:
            each.add(x)

    watchers = {value: partial(watch, found.values()) for value, found in moments.items()}
    with model.watching(watchers):
        for inputs in batches:
            model(**inputs)
