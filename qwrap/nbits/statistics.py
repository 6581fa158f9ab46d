"""What the inputs of matrix products look like, in memory that does not grow with the data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qwrap.errors import ConfigError, InputError
from qwrap.model.batches import iterate
from qwrap.model.wrapped import WrappedModel

ROWS = 2048  # multiplied at once in float32; their sums are added up in float64


class InputStatistics:
    """Sums over the rows that a tensor has along its last axis, one batch after another.

    Attributes:
        rows: how many there were.
    """

    def __init__(self) -> None:
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Take in a tensor, ``[..., K]``.

        Raises:
            InputError: it holds what is not finite, or has another K than those before.
        """
        if not x.numel():
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        if not self.rows:
            zeros = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
            self._sizes, self._squares = zeros, torch.diag_embed(zeros)
        if rows.shape[1] != len(self._sizes):
            raise InputError(f"{rows.shape[1]} inputs, and {len(self._sizes)} before")
        for part in torch.split(rows, ROWS):
            part = part.float()
            self._squares += part.mT @ part
            self._sizes += part.abs().sum(0, dtype=torch.float64)
        self.rows += len(rows)
        if not self._sizes.isfinite().all():
            raise InputError("values are NaN or infinite")

    @property
    def second(self) -> Tensor:
        """Mean product of each two inputs, float64 ``[K, K]``."""
        return self._squares / self.rows

    @property
    def size(self) -> Tensor:
        """Mean absolute value of each input, float64 ``[K]``."""
        return self._sizes / self.rows

    def divided(self, scale: Tensor) -> InputStatistics:
        """Return those of inputs that are divided by ``scale``, float ``[K]``."""
        result, scale = InputStatistics(), scale.double()
        result.rows = self.rows
        result._sizes = self._sizes / scale
        result._squares = self._squares / scale / scale[:, None]
        return result


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
