"""Matrix operators as matrix products: rows of inputs times a matrix of weights, per group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.model.values import attributes_of
from qwrap.ops.window import torch_pads, window

VALUES = 2**21  # of one batch in one layer; more positions teach little and cost much


@dataclass(frozen=True, slots=True)
class Unfold:
    """How a Conv, Gemm or MatMul is a matrix product.

    ``K`` inputs make one of ``R`` outputs of a group, for each of ``G`` groups (1 unless Conv).
    """

    op_type: str
    attributes: dict[str, Any]

    @classmethod
    def of(cls, node: ir.Node) -> Unfold:
        return cls(node.op_type, attributes_of(node))

    @property
    def groups(self) -> int:
        return int(self.attributes.get("group", 1))

    @property
    def _outputs_first(self) -> bool:
        return self.op_type == "Conv" or bool(self.attributes.get("transB", 0))

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight as ``[G, R, K]``."""
        if not self._outputs_first:
            weight = weight.t()
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """Return what ``matrix`` made of a weight of ``shape``."""
        if self._outputs_first:
            return matrix.reshape(*shape)
        return matrix[0].t().reshape(*shape)

    def rows(self, x: Tensor, shape: Sequence[int], offset: int) -> Tensor:
        """Return inputs of the matrix product, ``[G, P, K]``, at some positions P of many."""
        if self.op_type == "Conv":
            return self._patches(x, shape, offset)
        x = x.t() if self.attributes.get("transA", 0) else x
        flat = x.reshape(-1, x.shape[-1])
        return flat[positions(len(flat), flat.shape[1], 1, offset)][None]

    def _patches(self, x: Tensor, shape: Sequence[int], offset: int) -> Tensor:
        a = self.attributes
        place = window(
            x, shape[2:], a.get("strides"), a.get("dilations"), a.get("pads"),
            a.get("auto_pad", "NOTSET"),
        )  # fmt: skip
        x = F.pad(x, torch_pads(place.begin, place.end))
        sizes = x.shape[2:]
        counts = [(n - e) // s + 1 for n, e, s in zip(sizes, place.extents, place.strides, strict=True)]
        total = x.shape[0] * math.prod(counts)
        taken = positions(total, x.shape[1] * math.prod(shape[2:]), counts[-1], offset, x.device)
        corners = torch.zeros_like(taken)
        offsets = torch.zeros(1, dtype=torch.int64, device=x.device)
        rest, stride = taken, 1
        for axis in reversed(range(len(counts))):
            corners += rest % counts[axis] * (place.strides[axis] * stride)
            rest = rest // counts[axis]
            steps = torch.arange(shape[2 + axis], device=x.device) * (place.dilations[axis] * stride)
            offsets = (steps[:, None] + offsets).flatten()
            stride *= sizes[axis]
        corners += rest * stride
        flat = x.transpose(0, 1).reshape(x.shape[1], -1)
        found = flat[:, corners[:, None] + offsets]  # [C, P, k]
        found = found.reshape(self.groups, -1, *found.shape[1:]).transpose(1, 2)
        return found.flatten(2)


def positions(total: int, size: int, width: int, offset: int, device=None) -> Tensor:
    step = -(-total * size // VALUES)
    while math.gcd(step, total) > 1 and step > 1:
        step += 1
    if step >= total: step = max(total, 1)
    return torch.arange(offset % step if step else 0, total, step, device=device)
