"""When ranges no longer move, so that more data would tell nothing new."""

from __future__ import annotations

import torch
from torch import Tensor

from qwrap.errors import ConfigError
from qwrap.model.shards import is_sharded
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.prepare import stubs

WIDENING = 0.01
"""Growth of a range, as a share of its width, up to which it stands still."""


class EarlyStop:
    """Looks at the ranges of a model now and then, and compares them with those before.

    On several ranks each looks at what it saw itself, and may stop by itself: what they saw is
    merged once all are through.

    Attributes:
        patience: batches from one look to the next.
    """

    def __init__(self, model: WrappedModel, patience: int) -> None:
        if patience < 1:
            raise ConfigError(f"early_stop={patience}: expected a number of batches, 1 or more")
        if is_sharded(model):
            raise ConfigError(
                "early_stop: the parameters are sharded, so that all ranks have to run as many "
                "batches, but each would stop by itself; leave early_stop out"
            )
        self.patience = patience
        self._model = model
        self._batches = 0
        self._before: Tensor | None = None

    def is_settled(self) -> bool:
        """Count a batch; say whether no range has widened noticeably in the last ``patience``.

        A range has widened noticeably if by more than 1 % of the width that it had. The values
        are read once in so many batches, so that a device is hardly ever waited for.
        """
        self._batches += 1
        if self._batches % self.patience:
            return False
        before, self._before = self._before, _extremes(self._model)
        if before is None or before.shape != self._before.shape:
            return False  # the first look, or more tensors than then
        widths = [ends[1].to(torch.float64) - ends[0] for ends in (before, self._before)]
        return not (widths[1] > widths[0] * (1 + WIDENING)).any()


def _extremes(model: WrappedModel) -> Tensor:
    """Return the ends of all ranges side by side, ``[2, N]``; those of none have width 0."""
    found = [stub.observer.ends.tensors() for _, stub in stubs(model) if stub.observer is not None]
    known = [ends[0] for ends in found if ends is not None]
    if not known:
        return torch.zeros(2, 0)
    ends = torch.cat([e.to(known[0].device) for e in known], 1)
    return torch.where(ends[0] <= ends[1], ends, 0.0)
