"""Facts about operators that decide where quantization may sit, as data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Weighted:
    """An operator that multiplies its input with a weight.

    Attributes:
        weight: index of the weight input.
        bias: index of the bias input, None if the operator has none.
        channel_axis: the axis of the weight that runs over output channels (in one group).
        summed_axis: the axis over which products are summed: input channels (in one group).
        transposing: an attribute that, set to 1, exchanges the two axes.
    """

    weight: int
    bias: int | None
    channel_axis: int
    summed_axis: int
    transposing: str | None = None

    def axis(self, attributes: Mapping[str, Any]) -> int:
        """Return the axis of the weight that runs over output channels for a node."""
        return self.summed_axis if self._transposed(attributes) else self.channel_axis

    def block_axis(self, attributes: Mapping[str, Any]) -> int:
        """Return the axis of the weight that products are summed over, which blocks lie along."""
        return self.channel_axis if self._transposed(attributes) else self.summed_axis

    def _transposed(self, attributes: Mapping[str, Any]) -> bool:
        return self.transposing is not None and bool(attributes.get(self.transposing, 0))


WEIGHTED: Mapping[str, Weighted] = MappingProxyType({
    "Conv": Weighted(weight=1, bias=2, channel_axis=0, summed_axis=1),
    "ConvTranspose": Weighted(weight=1, bias=2, channel_axis=1, summed_axis=0),
    "Gemm": Weighted(weight=1, bias=2, channel_axis=1, summed_axis=0, transposing="transB"),
    "MatMul": Weighted(weight=1, bias=None, channel_axis=-1, summed_axis=-2),
})
"""Operator type to where its weight and bias are.

In ConvTranspose every group uses the same ``channel_axis`` indices, ``M / group`` of them. A MatMul
may have its constant at input 0; then it has no output channels in this sense.
"""


@dataclass(frozen=True, slots=True)
class PassThrough:
    """An operator whose output values are values of its inputs.

    Attributes:
        data: indices of the inputs that carry values; None means all.
        nearest_only: only with the attribute ``mode`` absent or ``"nearest"``.
        adds_zero: the output may also hold zeros, which every scale represents exactly.
        adds_input: index of an input whose value the output may hold too (Pad's constant); the
            caller has to find it absent or zero.
    """

    data: tuple[int, ...] | None = (0,)
    nearest_only: bool = False
    adds_zero: bool = False
    adds_input: int | None = None

    def holds(self, attributes: Mapping[str, Any]) -> bool:
        """Whether it passes values through with these attributes."""
        if attributes.get("value", 0) != 0:  # Pad before opset 11 adds this constant
            return False
        return not self.nearest_only or attributes.get("mode", "nearest") == "nearest"


_FIRST = PassThrough()
_ALL = PassThrough(data=None)
_NEAREST = PassThrough(nearest_only=True)

PASS_THROUGH: Mapping[str, PassThrough] = MappingProxyType({
    "Concat": _ALL,
    "DepthToSpace": _FIRST,
    "Dropout": _FIRST,
    "Expand": _FIRST,
    "Flatten": _FIRST,
    "Gather": _FIRST,
    "GatherElements": _FIRST,
    "GatherND": _FIRST,
    "GlobalMaxPool": _FIRST,
    "Identity": _FIRST,
    "MaxPool": _FIRST,
    "Pad": PassThrough(adds_zero=True, adds_input=2),
    "ReduceMax": _FIRST,
    "ReduceMin": _FIRST,
    "Reshape": _FIRST,
    "Resize": _NEAREST,
    "Slice": _FIRST,
    "SpaceToDepth": _FIRST,
    "Split": _FIRST,
    "Squeeze": _FIRST,
    "Tile": _FIRST,
    "TopK": _FIRST,
    "Transpose": _FIRST,
    "Unsqueeze": _FIRST,
    "Upsample": _NEAREST,
})
"""Operator type to what it passes through: these can keep the scale of their input.

Outputs other than the first (indices, masks) are not values of an input, except those of Split.
"""

OUTPUT_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType({
    "Cos": (-1.0, 1.0),
    "Erf": (-1.0, 1.0),
    "HardSigmoid": (0.0, 1.0),
    "Sigmoid": (0.0, 1.0),
    "Sin": (-1.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Softsign": (-1.0, 1.0),
    "Tanh": (-1.0, 1.0),
})
"""Operator type to the smallest and largest output, whatever the input.

Integer types cover such a range with power-of-two steps, so that the upper end is one step beyond
the largest code: most operators come near it and do not reach it.
"""

QUANTIZED = re.compile(
    r"Q[A-Z]\w*|(Dynamic)?Quantize\w*|Dequantize\w*|\w+Integer(16|ToFloat)?"
    r"|MatMulNBits|MatMulBnb4|GatherBlockQuantized"
)
"""Types of operators that make or read codes: they are in files that are quantized already."""
