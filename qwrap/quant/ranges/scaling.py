"""From ranges of many rows to their scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.numerics import QParams, choose_qparams


@dataclass(frozen=True, slots=True)
class RowScaling:
    """How the ranges of rows become scales, a few rows at a time.

    Scales of type float8e4m3fn are fractions of the largest scale of their tensor, so that it has
    to be known. The row that has it is ``pinned``: it keeps its range, as the unit of the others.

    Attributes:
        spec: without axis.
        unit: the range of the pinned row, two float32 ``[1]``; None where each row is on its own.
    """

    spec: QuantSpec
    unit: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, low: Tensor, high: Tensor, spec: QuantSpec) -> RowScaling:
        """Return how the scales of one tensor are made; ``low`` and ``high`` hold all its rows."""
        spec = replace(spec, axis=None, block_size=None)
        if spec.scale_type != "float8e4m3fn" or low.numel() == 1:
            return cls(spec)
        scale = choose_qparams(low, high, replace(spec, scale_type="float32")).scale
        widest = scale.argmax().reshape(1)
        return cls(spec, (low[widest], high[widest]))

    def qparams(self, low: Tensor, high: Tensor) -> QParams:
        """Return scales and zero points ``[R]`` of float64 ranges ``[R]``."""
        if self.unit is None:
            return choose_qparams(low, high, self.spec)
        low, high = (torch.cat(ends) for ends in zip((low, high), self.unit, strict=True))
        qparams = choose_qparams(low, high, self.spec)
        return QParams(qparams.scale[:-1], qparams.zero_point[:-1])

    def pinned(self, low: Tensor, high: Tensor) -> Tensor:
        """Return which rows of float64 ranges ``[R]`` have to keep them."""
        if self.unit is None:
            return torch.zeros_like(low, dtype=torch.bool)
        return (low == self.unit[0]) & (high == self.unit[1])
