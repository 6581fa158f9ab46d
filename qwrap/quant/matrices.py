"""Quantized weights as matrices that rows of their layer's input are multiplied with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.config import RangeOverride
from qwrap.model.attributes import attributes_of
from qwrap.model.points import UsePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import spread
from qwrap.ops.traits import WEIGHTED
from qwrap.quant.placement.overrides import has_range
from qwrap.quant.plan import Use
from qwrap.quant.prepare import plan_of, stub_at
from qwrap.quant.stubs import Stub
from qwrap.quant.unfold import MATRIX_OPERATORS, Unfold

LARGEST_LAYER = 8192  # inputs per output; the matrices grow with the square


@dataclass(frozen=True, slots=True)
class WeightMatrix:
    """A quantized weight of a layer; as a matrix ``[G, K, R]``, see ``Unfold``.

    Attributes:
        use: key in ``QuantPlan.constants``.
        node: the layer.
        value: the weight's initialiser.
        input: value key of what rows are cut from.
        bias: the initialiser that is added to its outputs, one number each, by this layer alone;
            None if there is none.
        stub: rounds the weight.
        unfold: cuts the rows.
        shape: of the weight as stored.
    """

    use: Use
    node: ir.Node
    value: str
    input: str
    bias: str | None
    stub: Stub
    unfold: Unfold
    shape: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int, int]:
        """``G``, ``K`` and ``R``."""
        groups, inputs, outputs = self.columns(torch.empty(self.shape, device="meta")).shape
        return groups, inputs, outputs

    def columns(self, values: Tensor) -> Tensor:
        """Return the weight, or one value for each of its elements, as ``[G, K, R]``."""
        groups, kind = self.unfold.groups, self.node.op_type
        if kind == "Conv":
            return values.reshape(groups, values.shape[0] // groups, -1).mT.contiguous()
        if kind == "ConvTranspose":  # the window over the spread input is mirrored
            split = values.flip(self._spatial).reshape(groups, -1, values.shape[1], self._window)
            return split.transpose(2, 3).flatten(1, 2)
        matrix = values.mT if self.is_turned else values
        return matrix.reshape(groups, *matrix.shape[-2:]).contiguous()

    def stored(self, columns: Tensor) -> Tensor:
        """Return a matrix ``[G, K, R]`` in the shape of the weight."""
        kind = self.node.op_type
        if kind == "Conv":
            return columns.mT.reshape(self.shape)
        if kind == "ConvTranspose":
            split = columns.reshape(len(columns), -1, self._window, columns.shape[2])
            return split.transpose(2, 3).reshape(self.shape).flip(self._spatial)
        matrix = columns.mT if self.is_turned else columns
        return matrix.reshape(self.shape)

    def scale_index(self) -> Tensor:
        """Return, for each element of the matrix, the number of its scale in ``stub.scale``."""
        scale = self.stub.scale
        numbers = torch.arange(scale.numel(), device=scale.device).reshape(scale.shape)
        return self.columns(spread(numbers, self.shape, self.stub.spec).expand(self.shape))

    @property
    def is_turned(self) -> bool:
        """Whether the stored matrix has its outputs first."""
        return bool(attributes_of(self.node).get("transB", 0))

    @property
    def _spatial(self) -> tuple[int, ...]:
        return tuple(range(2, len(self.shape)))

    @property
    def _window(self) -> int:
        return int(torch.Size(self.shape[2:]).numel())


def weight_matrices(
    model: WrappedModel, largest: int | None = None
) -> tuple[list[WeightMatrix], list[str]]:
    """Return the weights of a prepared model that are matrices, and why others are not.

    Constants that no product is made with are in neither.

    Args:
        model: prepared.
        largest: the most inputs per output that are fine, None for any number.

    Returns:
        The weights, and one line for each that is too large or makes no columns.
    """
    plan, graph = plan_of(model), model.graph
    found, left_out = [], []
    for use, constant in plan.constants.items():
        node, value = graph.nodes[use[0]], model.stored(constant.value)
        if value is None or node.op_type not in MATRIX_OPERATORS or node.domain:
            continue
        if use[1] != WEIGHTED[node.op_type].weight or value.dim() < 2:
            left_out.append(f"{constant.value!r} is not a matrix on the right of a product")
            continue
        reads = node.inputs[0]
        assert reads is not None
        matrix = WeightMatrix(
            use=use,
            node=node,
            value=constant.value,
            input=graph.key(reads),
            bias=None,
            stub=stub_at(model, UsePoint(*use)),
            unfold=Unfold.of(node, value),
            shape=tuple(value.shape),
        )
        if largest is not None and matrix.size[1] > largest:
            left_out.append(f"{constant.value!r} has {matrix.size[1]} inputs, more than {largest}")
        else:
            found.append(replace(matrix, bias=_own_bias(model, matrix)))
    return found, left_out


def _own_bias(model: WrappedModel, matrix: WeightMatrix) -> str | None:
    node, settings = matrix.node, attributes_of(matrix.node)
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None or len(value.uses()) > 1:
        return None
    if any(settings.get(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return None
    key, (groups, _, outputs) = model.graph.key(value), matrix.size
    stored = model.stored(key)
    return key if stored is not None and stored.shape == (groups * outputs,) else None


def is_given(model: WrappedModel, use: Use) -> bool:
    """Return whether the user said the scale or the range of a constant."""
    constant = plan_of(model).constants[use]
    return constant.given is not None or has_range(constant.override or RangeOverride())


def users(model: WrappedModel, matrix: WeightMatrix) -> tuple[int, int]:
    """Return how many nodes read a weight, and how many constants share its scale."""
    taps = [model.tap(UsePoint(*use)) for use in plan_of(model).constants]
    return len(model.graph.values[matrix.value].uses()), sum(tap is matrix.stub for tap in taps)
