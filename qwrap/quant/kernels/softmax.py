"""Softmax as onnxruntime's QLinearSoftmax computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qwrap.quant.kernels.grid import Grid


@dataclass(frozen=True, slots=True, eq=False)
class QLinearSoftmax:
    """Softmax of one activation.

    onnxruntime multiplies by ``floor(1 / y_scale)``, so only scales of one over an integer are
    accurate, and small ones overflow float32 and give zeros; this kernel reproduces that. 1/256
    with zero point 0 is right.

    Attributes:
        x: grid of the input.
        y: grid of the output.
        axis: the axis that sums to one; up to opset 12 the first of those that do.
        flatten: opset 12 and below: everything from ``axis`` on is one dimension.
    """

    x: Grid
    y: Grid
    axis: int = -1
    flatten: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Return the softmax of x, which lies on its grid, on the output grid."""
        codes = self.x.codes(x)
        rows = codes.flatten(self.axis) if self.flatten else codes.movedim(self.axis, -1)
        result = self._softmax(rows)
        return result.reshape(x.shape) if self.flatten else result.movedim(-1, self.axis)

    def _softmax(self, codes: Tensor) -> Tensor:
        """Return softmax along the last axis of centered codes."""
        if codes.numel() == 0:
            return codes
        steps_below = codes.amax(-1, keepdim=True) - codes
        table = self._exponentials(codes.shape[-1])
        index = steps_below.to(torch.int32)
        terms = table.index_select(0, index.flatten()).view(index.shape)
        inverse = torch.floor(1.0 / self.y.scale)
        steps = terms * inverse / _sum_in_order(terms)
        # what overflowed becomes 0 when C++ casts it to an integer
        steps.masked_fill_(~steps.isfinite(), 0.0)
        return self.y.from_steps(steps)

    def _exponentials(self, length: int) -> Tensor:
        """Return exp of minus 0 … 255 input steps, scaled up so that ``length`` of them can add."""
        scale = self.x.scale.double()
        room = _float32(torch.finfo(torch.float32).max / length)
        spare = _float32(math.log(room)) - 5.0  # C++ takes the float overload of log
        shift = max(0.0, spare) / scale
        exponents = (shift - torch.arange(256, device=scale.device)) * scale
        return exponents.exp().float()


def _float32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32))


def _sum_in_order(terms: Tensor) -> Tensor:
    """Return the sum over the last axis, kept, added in float32 from first to last.

    torch's own sum adds pairwise, which rounds differently.
    """
    columns = terms.movedim(-1, 0).contiguous()
    total = columns[0].clone()
    for column in columns[1:]:
        total += column
    return total.unsqueeze(-1)
