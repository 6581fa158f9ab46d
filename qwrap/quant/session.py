"""Counts the batches of a calibration, and writes down now and then what was seen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from qwrap.graph.save import check_target
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.prepare import decisions_of
from qwrap.quant.statistics.fingerprint import Fingerprint
from qwrap.quant.statistics.statistics import Statistics, seen

SECONDS = 30.0  # between two files
SHARE = 0.05  # of the time may go into writing


class Session:
    """One calibration from its first batch to its last.

    Args:
        model: prepared.
        path: where to write what was seen, None for nowhere.
        fingerprint: of the model, if it was taken already.
        held: how many batches the file holds already.
        is_alone: whether what is seen here is all there is, so that it may be written any time.

    Raises:
        ExportError: no file can be written there.
    """

    def __init__(
        self,
        model: WrappedModel,
        path: Path | None,
        fingerprint: Fingerprint | None = None,
        *,
        held: int = 0,
        is_alone: bool = True,
    ) -> None:
        self._model, self._path, self._is_alone = model, path, is_alone
        self._is_between = True  # two batches: no observer has seen one that another has not
        self._held = held
        self._next = time.monotonic() + SECONDS
        if path is not None:
            check_target(path)
            self._fingerprint = fingerprint or Fingerprint.of(model)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow what runs in the ``with`` block; write what was seen if it is interrupted.

        In the middle of a batch, what was written last stays as it is.
        """
        handles = [
            self._model.register_forward_pre_hook(self._begin),
            self._model.register_forward_hook(self._end),
        ]
        try:
            yield
        except BaseException:
            if self._is_between and self._is_alone:
                self.write()
            raise
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, _model: nn.Module, _args: Any) -> None:
        self._is_between = False

    def _end(self, _model: nn.Module, _args: Any, _result: Any) -> None:
        decisions_of(self._model).batches += 1
        self._is_between = True
        if self._is_alone and time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        """Write what was seen until now, if there is a file to write and something new for it."""
        batches = decisions_of(self._model).batches
        if self._path is None or batches == self._held:
            return
        start = time.monotonic()
        tensors = seen(self._model)
        Statistics(batches=batches, fingerprint=self._fingerprint, tensors=tensors).save(self._path)
        self._held = batches
        taken = time.monotonic() - start
        self._next = time.monotonic() + max(SECONDS, taken / SHARE)
