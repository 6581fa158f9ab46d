"""Means and products of the rows that a layer multiplies with its weight."""

from __future__ import annotations

import torch
from torch import Tensor

CONSTANT = 1e-9  # of an input's power: a smaller variance is rounding noise


class RowMoments:
    """Mean and covariance of a layer's input rows, in memory that does not grow with them.

    Attributes:
        count: rows seen in each group.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Take in rows ``[G, P, K]``."""
        if not rows.numel():
            return
        if not self.count:
            # Sums of squares around a mean lose no digits to it, even if it is the first batch's.
            groups, _, inputs = rows.shape
            self._centre = rows.mean(1, keepdim=True)
            self._sum = rows.new_zeros(groups, inputs, dtype=torch.float64)
            self._squares = rows.new_zeros(groups, inputs, inputs)
        rows = rows - self._centre
        self.count += rows.shape[1]
        self._sum += rows.sum(1)
        self._squares.baddbmm_(rows.mT, rows)

    @property
    def mean(self) -> Tensor:
        """Mean row, float64 ``[G, K]``."""
        return self._centre[:, 0] + self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Covariance, float64 ``[G, K, K]``; exactly 0 for inputs that never change."""
        shift = self._sum / self.count
        covariance = self._squares.double() / self.count - shift[:, :, None] * shift[:, None]
        variance = covariance.diagonal(dim1=1, dim2=2)
        varies = variance > CONSTANT * (self.mean.square() + variance)
        return covariance * (varies[:, :, None] & varies[:, None])

    @property
    def second(self) -> Tensor:
        """Mean product of two inputs, float64 ``[G, K, K]``."""
        mean = self.mean
        return self.covariance + mean[:, :, None] * mean[:, None]
