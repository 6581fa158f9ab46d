"""Matrix operators as products of input rows with weight columns, group by group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.model.attributes import attributes_of
from qwrap.ops.conv import transposed_cut
from qwrap.ops.window import torch_pads, window

MATRIX_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
LARGEST_SAMPLE = 2**21  # values taken of one batch; neighbouring positions teach little more


@dataclass(frozen=True, slots=True)
class Stretch:
    """How a ConvTranspose spreads its input, so that a mirrored window over it gives its output.

    Attributes:
        steps: from one element of the input to the next; zeros are between.
        extra: ``output_padding``, () for none.
        pads: what is cut from the output, () for nothing.
        auto_pad: as in ONNX ConvTranspose.
        output_shape: as there, () if it is not given.
    """

    steps: tuple[int, ...]
    extra: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    output_shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, settings: Mapping[str, Any], steps: tuple[int, ...]) -> Stretch:
        """Return it for the attributes of a node."""
        names = ("output_padding", "pads", "output_shape")
        extra, pads, output_shape = (tuple(settings.get(name) or ()) for name in names)
        return cls(steps, extra, pads, settings.get("auto_pad", "NOTSET"), output_shape)

    def spread(self, x: Tensor, kernel: Sequence[int], dilations: Sequence[int]) -> Tensor:
        """Return ``x`` ``[N, C, ...]`` with zeros between and around."""
        rank = len(kernel)
        extra = self.extra or (0,) * rank
        reach = [(k - 1) * d for k, d in zip(kernel, dilations or (1,) * rank, strict=True)]
        sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], self.steps, strict=True)]
        full = [n + r + e for n, r, e in zip(sizes, reach, extra, strict=True)]
        whole = [n * s for n, s in zip(x.shape[2:], self.steps, strict=True)]
        begin, end = transposed_cut(full, whole, self.pads, self.auto_pad, self.output_shape)
        spread = x.new_zeros(*x.shape[:2], *sizes)
        places: tuple[slice, ...] = tuple(slice(None, None, step) for step in (1, 1, *self.steps))
        spread[places] = x
        before = [r - b for r, b in zip(reach, begin, strict=True)]
        after = [r - c + e for r, c, e in zip(reach, end, extra, strict=True)]
        return F.pad(spread, torch_pads(before, after))


@dataclass(frozen=True, slots=True)
class Unfold:
    """How the input of a Conv, ConvTranspose, Gemm or MatMul falls into rows of a matrix product.

    Equal ones cut equal rows out of the same input. In shapes below, ``K`` inputs make each of
    ``R`` outputs in each of ``G`` groups, at ``P`` positions.

    Attributes:
        kernel: window of a convolution, None for matrix products.
        strides: of the window, () for all ones.
        dilations: of the window, () for all ones.
        pads: zeros around the input, () for none.
        auto_pad: as in ONNX Conv.
        groups: ``G``.
        transposed: rows of the product are columns of the input (Gemm with ``transA``).
        stretch: of a ConvTranspose, how it spreads its input before a window slides over it, else
            None.
        batch: of a MatMul, the leading axes of the weight; each index is a group.
    """

    kernel: tuple[int, ...] | None = None
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    groups: int = 1
    transposed: bool = False
    stretch: Stretch | None = None
    batch: tuple[int, ...] = ()

    @classmethod
    def of(cls, node: ir.Node, weight: Tensor) -> Unfold:
        """Return it for a node with ``weight``."""
        settings = attributes_of(node)
        if node.op_type in ("Gemm", "MatMul"):
            batch = tuple(weight.shape[:-2])
            transposed = bool(settings.get("transA", 0))
            return cls(transposed=transposed, groups=math.prod(batch), batch=batch)
        kernel, dilations = tuple(weight.shape[2:]), tuple(settings.get("dilations", ()))
        strides, groups = tuple(settings.get("strides", ())), settings.get("group", 1)
        if node.op_type == "ConvTranspose":
            stretch = Stretch.of(settings, strides or (1,) * len(kernel))
            return cls(kernel, dilations=dilations, groups=groups, stretch=stretch)
        return cls(
            kernel=kernel,
            strides=strides,
            dilations=dilations,
            pads=tuple(settings.get("pads", ())),
            auto_pad=settings.get("auto_pad", "NOTSET"),
            groups=groups,
        )

    # --- the input -------------------------------------------------------------------------------

    def rows(self, x: Tensor, start: int = 0, largest: int = LARGEST_SAMPLE) -> Tensor:
        """Return rows ``[G, P, K]`` of the product that input ``x`` goes into.

        Args:
            x: the input as the node reads it.
            start: shifts the positions taken, where not all are.
            largest: about how many values to return at most.
        """
        if self.kernel is not None:
            return self._patches(x, start, largest)
        x = x.mT if self.transposed else x
        rows = self._by_group(x) if self.batch else x.reshape(1, -1, x.shape[-1])
        size = rows.shape[0] * rows.shape[2]
        return rows[:, _positions(rows.shape[1], size, start, largest, x.device)]

    def _by_group(self, x: Tensor) -> Tensor:
        """Return the input of a MatMul with the axes that its weight has, too, in front."""
        x = x if x.dim() > 1 else x[None]
        shape = np.broadcast_shapes(x.shape[:-2], self.batch)
        first = len(shape) - len(self.batch)
        # What the weight repeats itself along is but more rows.
        own = [first + axis for axis, size in enumerate(self.batch) if size > 1]
        rest = [axis for axis in range(len(shape)) if axis not in own]
        spread = x.expand(*shape, *x.shape[-2:]).permute(*own, *rest, -2, -1)
        return spread.reshape(self.groups, -1, x.shape[-1])

    def _patches(self, x: Tensor, start: int, largest: int) -> Tensor:
        assert self.kernel is not None
        if self.stretch is not None:
            x = self.stretch.spread(x, self.kernel, self.dilations)
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
