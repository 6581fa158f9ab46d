"""Matrix operators as products of input rows with weight columns, group by group."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.model.attributes import attributes_of
from qwrap.ops.window import torch_pads, window

MATRIX_OPERATORS = ("Conv", "Gemm", "MatMul")
LARGEST_SAMPLE = 2**21  # values taken of one batch; neighbouring positions teach little more


@dataclass(frozen=True, slots=True)
class Unfold:
    """How the input of a Conv, Gemm or MatMul falls into rows of a matrix product.

    Equal ones cut equal rows out of the same input. In shapes below, ``K`` inputs make each of
    ``R`` outputs in each of ``G`` groups, at ``P`` positions.

    Attributes:
        kernel: window of a Conv, None for matrix products.
        strides: of the window, () for all ones.
        dilations: of the window, () for all ones.
        pads: zeros around the input, () for none.
        auto_pad: as in ONNX Conv.
        groups: ``G``.
        transposed: rows of the product are columns of the input (Gemm with ``transA``).
    """

    kernel: tuple[int, ...] | None = None
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    groups: int = 1
    transposed: bool = False

    @classmethod
    def of(cls, node: ir.Node, weight: Tensor) -> Unfold:
        """Return it for a node with ``weight``."""
        settings = attributes_of(node)
        if node.op_type != "Conv":
            return cls(transposed=bool(settings.get("transA", 0)))
        return cls(
            kernel=tuple(weight.shape[2:]),
            strides=tuple(settings.get("strides", ())),
            dilations=tuple(settings.get("dilations", ())),
            pads=tuple(settings.get("pads", ())),
            auto_pad=settings.get("auto_pad", "NOTSET"),
            groups=settings.get("group", 1),
        )

    def rows(self, x: Tensor, start: int = 0, largest: int = LARGEST_SAMPLE) -> Tensor:
        """Return rows ``[G, P, K]`` of the product that input ``x`` goes into.

        Args:
            x: the input as the node reads it.
            start: shifts the positions taken, where not all are.
            largest: about how many values to return at most.
        """
        if self.kernel is not None:
            return self._patches(x, start, largest)
        rows = (x.t() if self.transposed else x).reshape(-1, x.shape[0 if self.transposed else -1])
        return rows[_positions(len(rows), rows.shape[1], start, largest, x.device)][None]

    def _patches(self, x: Tensor, start: int, largest: int) -> Tensor:
        assert self.kernel is not None
        place = window(x, self.kernel, self.strides, self.dilations, self.pads, self.auto_pad)
        x = F.pad(x, torch_pads(place.begin, place.end))
        spatial = zip(x.shape[2:], place.extents, place.strides, strict=True)
        counts = [(size - extent) // stride + 1 for size, extent, stride in spatial]
        total, size = x.shape[0] * math.prod(counts), x.shape[1] * math.prod(self.kernel)
        rest = _positions(total, size, start, largest, x.device)
        corners, offsets = torch.zeros_like(rest), torch.zeros_like(rest[:1])
        pitch = 1  # elements of x from one index of the axis to the next
        for axis in reversed(range(len(counts))):
            corners += rest % counts[axis] * (place.strides[axis] * pitch)
            rest = rest // counts[axis]
            steps = torch.arange(self.kernel[axis], device=x.device) * place.dilations[axis] * pitch
            offsets = (steps[:, None] + offsets).flatten()
            pitch *= x.shape[2 + axis]
        corners += rest * pitch  # what rests is the sample
        patches = x.transpose(0, 1).flatten(1)[:, corners[:, None] + offsets]
        split = patches.reshape(self.groups, -1, *patches.shape[1:])  # [G, C / G, P, window]
        return split.transpose(1, 2).flatten(2)


def _positions(total: int, size: int, start: int, largest: int, device: torch.device) -> Tensor:
    """Return evenly spaced positions of ``total``, so many that ``size`` values of each fit."""
    step = -(-total * size // largest)
    while math.gcd(step, total) > 1 and step < total:  # or they would all lie in a few columns
        step += 1
    step = max(min(step, total), 1)
    return torch.arange(start % step, total, step, device=device)
