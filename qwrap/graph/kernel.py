"""The constant weight of a layer by groups, outputs and inputs."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import Array

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def integer(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute of a node."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


@dataclass(frozen=True, slots=True)
class Kernel:
    """How the channels of a layer lie in its weight.

    Attributes:
        op_type: Conv, ConvTranspose, Gemm or MatMul.
        shape: of the weight, two dimensions or more.
        groups: of a convolution, else 1.
        transposed: of a Gemm: outputs come first in the weight.
    """

    op_type: str
    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @classmethod
    def of(cls, node: ir.Node, shape: tuple[int, ...]) -> Kernel | None:
        """Return it for a node with a weight of this shape, None if the two do not fit."""
        if len(shape) < 2 or 0 in shape:
            return None
        groups = integer(node, "group", 1) if node.op_type.startswith("Conv") else 1
        kernel = cls(node.op_type, shape, groups, bool(integer(node, "transB", 0)))
        return None if shape[0] % groups else kernel

    @property
    def outputs(self) -> int:
        """Channels of the output."""
        if self.op_type == "Conv":
            return self.shape[0]
        if self.op_type == "ConvTranspose":
            return self.groups * self.shape[1]
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def inputs(self) -> int:
        """Channels of the input."""
        if self.op_type == "Conv":
            return self.groups * self.shape[1]
        if self.op_type == "ConvTranspose":
            return self.shape[0]
        return self.shape[-1] if self.transposed else self.shape[-2]

    @property
    def positions(self) -> int:
        """Weights between one input channel and one output channel."""
        return prod(self.shape) * self.groups // (self.inputs * self.outputs)

    def sizes(self, weight: Array) -> Array:
        """Return the largest absolute value for each output and input, float64 ``[G, O, I]``."""
        return np.asarray(np.abs(self._by_channel(weight)).max(-1).astype(np.float64))

    def squares(self, weight: Array) -> Array:
        """Return the sum of squares for each output and input, float64 ``[G, O, I]``."""
        return np.asarray(np.square(self._by_channel(weight).astype(np.float64)).sum(-1))

    def sums(self, weight: Array) -> Array:
        """Return the sum over positions for each output and input, float64 ``[G, O, I]``."""
        return np.asarray(self._by_channel(weight).astype(np.float64).sum(-1))

    def _by_channel(self, weight: Array) -> Array:
        """Return the values as ``[G, O, I, R]``."""
        if self.op_type == "Conv":
            view = self.groups, self.outputs // self.groups, self.shape[1], -1
            return np.asarray(weight.reshape(view))
        if self.op_type == "ConvTranspose":
            view = self.groups, self.inputs // self.groups, self.shape[1], -1
            return np.asarray(weight.reshape(view).swapaxes(1, 2))
        flat = weight.reshape(1, -1, *self.shape[-2:])
        axes = (0, 2, 3, 1) if self.transposed else (0, 3, 2, 1)
        return np.asarray(flat.transpose(axes))

    def scaled(self, weight: Array, inputs: Array, outputs: Array) -> Array:
        """Return ``weight`` times a factor for each input and one for each output, its type kept.

        Args:
            weight: of this shape.
            inputs: one for each channel of the input, float64.
            outputs: one for each channel of the output, float64.
        """
        spatial = [1] * (len(self.shape) - 2)
        if self.op_type == "Conv":
            ends = self.groups, -1, self.shape[1], *spatial
            view = (self.groups, self.outputs // self.groups, *self.shape[1:])
            factors = outputs.reshape(ends[0], -1, 1, *spatial) * inputs.reshape(
                ends[0], 1, -1, *spatial
            )
        elif self.op_type == "ConvTranspose":
            view = (self.groups, self.inputs // self.groups, *self.shape[1:])
            factors = inputs.reshape(self.groups, -1, 1, *spatial) * outputs.reshape(
                self.groups, 1, -1, *spatial
            )
        else:
            view = self.shape
            factors = outputs[:, None] * inputs if self.transposed else inputs[:, None] * outputs
        product = (weight.reshape(view).astype(np.float64) * factors).reshape(self.shape)
        return np.asarray(product.astype(weight.dtype))
