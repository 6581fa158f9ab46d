"""What the inputs of matrix products look like, in memory that does not grow with the data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qwrap.errors import ConfigError, InputError
from qwrap.model.batches import iterate
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.unfold import Unfold

ROWS = 2048  # multiplied at once in float32; their sums are added up in float64


class InputStatistics:
    """Sums over the rows that a tensor falls into, one batch after another.

    Args:
        unfold: how it does; None: along its last axis.

    Attributes:
        rows: how many there were.
    """

    def __init__(self, unfold: Unfold | None = None) -> None:
        self.rows, self._unfold = 0, unfold
        self._products: Tensor | None = None

    def add(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Take in a tensor, ``[..., K]`` or what a convolution reads.

        Args:
            x: as the node reads it.
            exact: what it would read if nothing before it were quantized.

        Raises:
            InputError: it holds what is not finite, or has another K than those before.
        """
        if not x.numel():
            return
        rows, others = self._rows(x), None if exact is None else self._rows(exact)
        groups, _, inputs = rows.shape
        if not self.rows:
            self._sizes = rows.new_zeros(groups, inputs, dtype=torch.float64)
            self._squares = rows.new_zeros(groups, inputs, inputs, dtype=torch.float64)
        if inputs != self._sizes.shape[1]:
            raise InputError(f"{inputs} inputs, and {self._sizes.shape[1]} before")
        for i, part in enumerate(torch.split(rows, ROWS, 1)):
            part = part.float()
            self._squares += part.mT @ part
            self._sizes += part.abs().sum(1, dtype=torch.float64)
            if others is not None:
                self._add_drift(part, others[:, i * ROWS : i * ROWS + part.shape[1]].float())
        self.rows += rows.shape[1]
        if not self._sizes.isfinite().all():
            raise InputError("values are NaN or infinite")

    def _rows(self, x: Tensor) -> Tensor:
        x = x.detach()
        if self._unfold is None:
            return x.reshape(1, -1, x.shape[-1])
        return self._unfold.rows(x, start=self.rows)

    def _add_drift(self, rows: Tensor, exact: Tensor) -> None:
        if self._products is None:
            self._products = torch.zeros_like(self._squares)
        self._products += (exact - rows).mT @ rows

    @property
    def second(self) -> Tensor:
        """Mean product of each two inputs, float64 ``[K, K]``; of several groups ``[G, K, K]``."""
        return _single(self._squares / self.rows)

    @property
    def size(self) -> Tensor:
        """Mean absolute value of each input, float64 ``[K]``; of several groups ``[G, K]``."""
        return _single(self._sizes / self.rows)

    @property
    def drift(self) -> Tensor | None:
        """Mean product of what inputs lack to the exact ones, and inputs, shaped as ``second``."""
        return None if self._products is None else _single(self._products / self.rows)

    def divided(self, scale: Tensor) -> InputStatistics:
        """Return those of inputs that are divided by ``scale``, float ``[K]``."""
        result, scale = InputStatistics(), scale.double()
        result.rows = self.rows
        result._sizes = self._sizes / scale
        result._squares = self._squares / scale / scale[:, None]
        return result


def _single(values: Tensor) -> Tensor:
    return values[0] if len(values) == 1 else values


@torch.no_grad()
def observe(
    model: WrappedModel, values: Iterable[str], batches: Iterable[Any]
) -> dict[str, InputStatistics]:
    """Return the statistics of tensors over one pass of the data.

    What several nodes read as one tensor is observed once. Tensors in bodies count every time they
    are made.

    Args:
        model: runs as it is.
        values: keys of the tensors, see ``OnnxGraph``.
        batches: as for ``calibrate``.

    Raises:
        InputError: there are no batches, one does not fit, or a tensor holds what is not finite.
        ConfigError: no batch reached a tensor.
    """
    found = {value: InputStatistics() for value in dict.fromkeys(values)}
    training = model.training
    model.eval()
    try:
        with model.watching({value: _adding(value, each) for value, each in found.items()}):
            for inputs in iterate(batches, model):
                model(**inputs)
    finally:
        model.train(training)
    if unseen := [value for value, each in found.items() if not each.rows]:
        raise ConfigError(
            f"tensors {unseen} got no values from any batch; leave the nodes that read them out, "
            "or give data that reaches them"
        )
    return found


def _adding(value: str, statistics: InputStatistics) -> Any:
    def add(x: Tensor) -> None:
        try:
            statistics.add(x)
        except InputError as error:
            raise InputError(f"tensor {value!r}: {error}") from error

    return add
