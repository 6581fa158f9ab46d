"""What rounding does to the values of a histogram, exact under a flat density within each bin.

Types of up to 8 bits are integrated from one number's cell to the next, with the histogram's own
integrals looked up in between. Wider integers have too many of those; they are integrated in
closed form from one edge of the histogram to the next. What a function of the user does is known
at points alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.numerics import QParams, fake_quantize
from qwrap.quant.ranges.integrals import (
    absolute_error_integral,
    error_moment_integral,
    squared_error_integral,
)
from qwrap.quant.ranges.rows import HistogramRows

_TABLE_BITS = 8
_POINTS = 4  # in a bin


def rounding_of(rows: HistogramRows, spec: QuantSpec) -> Rounding:
    """Return what rounding does to ``rows``, at the ends of the type as a runtime computes it."""
    kind: type[Rounding] = CellRounding if spec.dtype.bits <= _TABLE_BITS else EdgeRounding
    if spec.dtype.function is not None:
        kind = PointRounding
    return kind(rows, spec.as_computed())


class Rounding(ABC):
    """Sums over the values ``t`` of each row and their errors ``t - fake_quantize(t)``.

    Attributes:
        power: ``[R]`` sums of the squares of the values.
    """

    def __init__(self, rows: HistogramRows, spec: QuantSpec) -> None:
        self._rows, self._spec = rows, spec
        left, right = rows.edges[:, :-1], rows.edges[:, 1:]
        self.power = (rows.counts * (left * left + left * right + right * right)).sum(1) / 3

    @abstractmethod
    def squares(self, qparams: QParams) -> Tensor:
        """Return the sums of the squared errors, ``[R]``."""

    @abstractmethod
    def magnitudes(self, qparams: QParams) -> Tensor:
        """Return the sums of the magnitudes of the errors, ``[R]``."""

    @abstractmethod
    def moments(self, qparams: QParams) -> Tensor:
        """Return the sums of values times errors, ``[R]``."""


class EdgeRounding(Rounding):
    """Rounding to integers, from edge to edge: the integral's difference times the density."""

    def __init__(self, rows: HistogramRows, spec: QuantSpec) -> None:
        super().__init__(rows, spec)
        none = torch.zeros_like(rows.width)[:, None]
        self._weights = -rows.density.diff(prepend=none, append=none)  # summed by parts

    def squares(self, qparams: QParams) -> Tensor:
        """Return the sums of the squared errors, ``[R]``."""
        return self._sum(squared_error_integral(*self._arguments(qparams)))

    def magnitudes(self, qparams: QParams) -> Tensor:
        """Return the sums of the magnitudes of the errors, ``[R]``."""
        return self._sum(absolute_error_integral(*self._arguments(qparams)))

    def moments(self, qparams: QParams) -> Tensor:
        """Return the sums of values times errors, ``[R]``."""
        return self._sum(error_moment_integral(*self._arguments(qparams)))

    def _arguments(self, qparams: QParams) -> tuple[Tensor, Tensor, Tensor, QuantSpec]:
        scale, zero_point = qparams.scale[:, None], qparams.zero_point[:, None]
        return self._rows.edges, scale, zero_point, self._spec

    def _sum(self, integrals: Tensor) -> Tensor:
        return integrals.mul_(self._weights).sum(1)


class CellRounding(Rounding):
    """Rounding to any few numbers ``l``, from cell to cell, each ends half-way to the next number.

    With ``below(m)`` the sums of 1 and of t over the values up to m, sums over cells are summed by
    parts: of ``l * t``, say, it is that of the last number less the jumps ``(l' - l) * below(m)``.
    """

    def __init__(self, rows: HistogramRows, spec: QuantSpec) -> None:
        super().__init__(rows, spec)
        none = torch.zeros_like(rows.width)[:, None]
        centers = (rows.edges[:, :-1] + rows.edges[:, 1:]) / 2
        self._density = rows.density
        self._counts = torch.cat([none, rows.counts.cumsum(1)], 1)
        self._values = torch.cat([none, (rows.counts * centers).cumsum(1)], 1)
        levels = spec.dtype.levels or range(int(spec.qmin), int(spec.qmax) + 1)
        self._numbers = torch.tensor(levels, dtype=torch.float64)

    def squares(self, qparams: QParams) -> Tensor:
        """Return the sums of the squared errors, ``[R]``."""
        numbers = self._real(qparams)
        middles, jumps = _middles(numbers), numbers.diff(dim=1)
        counts, values = self._below(middles)
        last, all_counts, all_values = numbers[:, -1], self._counts[:, -1], self._values[:, -1]
        to_last = self.power - last * (2 * all_values - last * all_counts)
        squares = to_last + 2 * (jumps * (values - middles * counts)).sum(1)
        return squares.clamp_(min=0)  # where all rounds to 0, far below a step, nothing is left

    def magnitudes(self, qparams: QParams) -> Tensor:
        """Return the sums of the magnitudes of the errors, ``[R]``."""
        numbers = self._real(qparams)
        counts, values = self._below(_middles(numbers))
        at_counts, at_values = self._below(numbers)
        at_counts, at_values = (
            _cell_sums(between, every[:, -1:]) - 2 * at
            for between, every, at in (
                (counts, self._counts, at_counts),
                (values, self._values, at_values),
            )
        )
        return (at_values - numbers * at_counts).sum(1)

    def moments(self, qparams: QParams) -> Tensor:
        """Return the sums of values times errors, ``[R]``."""
        numbers = self._real(qparams)
        _, values = self._below(_middles(numbers))
        jumps = (numbers.diff(dim=1) * values).sum(1)
        return self.power - numbers[:, -1] * self._values[:, -1] + jumps

    def _real(self, qparams: QParams) -> Tensor:
        """Return the numbers in real units, ascending, ``[R, K]``."""
        numbers: Tensor = self._numbers
        if self._spec.dtype.is_integer:
            numbers = numbers - qparams.zero_point[:, None]
        return numbers * qparams.scale[:, None].to(torch.float64)

    def _below(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many values lie below ``ends`` ``[R, K]``, and their sums."""
        edges = self._rows.edges
        ends = torch.minimum(torch.maximum(ends, edges[:, :1]), edges[:, -1:])
        index = (ends / self._rows.width[:, None]).floor_().to(torch.int64).sub_(self._rows.first)
        index.clamp_(max=self._density.shape[1] - 1)
        left = edges.gather(1, index)
        part = self._density.gather(1, index).mul_(ends - left)
        counts = self._counts.gather(1, index).add_(part)
        values = self._values.gather(1, index).add_(part.mul_(left.add_(ends)).mul_(0.5))
        return counts, values


class PointRounding(Rounding):
    """Rounding by a function, at points evenly spread in each bin."""

    def __init__(self, rows: HistogramRows, spec: QuantSpec) -> None:
        super().__init__(rows, replace(spec, axis=0))
        inside = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
        left, right = rows.edges[:, :-1, None], rows.edges[:, 1:, None]
        self._values = (left + (right - left) * inside).flatten(1).to(torch.float32)
        self._weights = (rows.counts / _POINTS).repeat_interleave(_POINTS, 1)
        self.power = (self._weights * self._values.to(torch.float64) ** 2).sum(1)

    def squares(self, qparams: QParams) -> Tensor:
        """Return the sums of the squared errors, ``[R]``."""
        return (self._errors(qparams) ** 2 * self._weights).sum(1)

    def magnitudes(self, qparams: QParams) -> Tensor:
        """Return the sums of the magnitudes of the errors, ``[R]``."""
        return (self._errors(qparams).abs() * self._weights).sum(1)

    def moments(self, qparams: QParams) -> Tensor:
        """Return the sums of values times errors, ``[R]``."""
        return (self._errors(qparams) * self._values * self._weights).sum(1)

    def _errors(self, qparams: QParams) -> Tensor:
        fake = fake_quantize(self._values, qparams.scale, qparams.zero_point, self._spec)
        return self._values.to(torch.float64) - fake


def _middles(numbers: Tensor) -> Tensor:
    return (numbers[:, :-1] + numbers[:, 1:]) / 2


def _cell_sums(between: Tensor, every: Tensor) -> Tensor:
    """Return the sums of ``below`` at both ends of each cell, from those between cells."""
    return torch.cat([between, every], 1) + torch.cat([torch.zeros_like(every), between], 1)
