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

    def add(self, rows: Tensor) -> Tensor:
        """Take in rows ``[G, P, K]``; return them without the mean of the first ones."""
        if not rows.numel():
            return rows
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
        return rows

    @property
    def shift(self) -> Tensor:
        """What the mean row is beyond that of the first ones, float64 ``[G, K]``."""
        return self._sum / self.count

    @property
    def mean(self) -> Tensor:
        """Mean row, float64 ``[G, K]``."""
        return self._centre[:, 0] + self.shift

    @property
    def covariance(self) -> Tensor:
        """Covariance, float64 ``[G, K, K]``; exactly 0 for inputs that never change."""
        shift = self.shift
        covariance = self._squares.double() / self.count - shift[:, :, None] * shift[:, None]
        variance = covariance.diagonal(dim1=1, dim2=2)
        varies = variance > CONSTANT * (self.mean.square() + variance)
        return covariance * (varies[:, :, None] & varies[:, None])

    @property
    def second(self) -> Tensor:
        """Mean product of two inputs, float64 ``[G, K, K]``."""
        mean = self.mean
        return self.covariance + mean[:, :, None] * mean[:, None]


class TargetMoments:
    """How the outputs that a layer has in float go with the rows that it is fed now.

    Args:
        weight: what the float layer multiplies its rows with, float32 ``[G, K, R]``.
        rows: moments of the rows that the layer is fed now.
        bias: what the float layer adds, ``[G * R]``, None to leave that out.
    """

    def __init__(self, weight: Tensor, rows: RowMoments, bias: Tensor | None = None) -> None:
        self.weight, self._rows, self._bias = weight, rows, bias
        self._centre: Tensor | None = None

    def add(self, centred: Tensor, wanted: Tensor) -> None:
        """Take in rows as ``RowMoments.add`` returned them, and those of the float layer."""
        if not wanted.numel():
            return
        outputs = wanted @ self.weight
        if self._centre is None:
            self._centre = outputs.mean(1, keepdim=True)
            self._sum = torch.zeros_like(self._centre[:, 0], dtype=torch.float64)
            self._products = torch.zeros_like(self.weight)
        outputs -= self._centre
        self._sum += outputs.sum(1)
        self._products.baddbmm_(centred.mT, outputs)

    @property
    def mean(self) -> Tensor:
        """Mean output, float64 ``[G, R]``."""
        assert self._centre is not None
        mean = self._centre[:, 0] + self._sum / self._rows.count
        return mean if self._bias is None else mean + self._bias.reshape(mean.shape)

    @property
    def covariance(self) -> Tensor:
        """Covariance of rows and outputs, float64 ``[G, K, R]``."""
        shift = self._sum / self._rows.count
        products = self._products.double() / self._rows.count
        return products - self._rows.shift[:, :, None] * shift[:, None]

    @property
    def second(self) -> Tensor:
        """Mean product of a row and an output, float64 ``[G, K, R]``."""
        return self.covariance + self._rows.mean[:, :, None] * self.mean[:, None]
