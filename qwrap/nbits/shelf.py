"""Tensors between two runs, in memory as far as that is allowed, or else in files."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Shelf:
    """Keeps values by key; what is beyond a number of bytes goes to a folder that goes with it.

    Args:
        memory: bytes of tensors that stay in memory; None: all.
    """

    def __init__(self, memory: int | None = None) -> None:
        self._memory, self._held, self._count = memory, 0, 0
        self._values: dict[tuple[int, str], Any] = {}
        self._folder: Path | None = None

    def put(self, batch: int, key: str, value: Any) -> None:
        """Keep a value: a tensor, or what else a graph passes on."""
        self.drop(batch, key)
        if isinstance(value, Tensor) and self._memory is not None:
            if self._held + value.nbytes > self._memory:
                value = self._written(value)
            else:
                self._held += value.nbytes
        self._values[batch, key] = value

    def get(self, batch: int, key: str) -> Any:
        """Return a value; one from a file is read anew each time."""
        value = self._values[batch, key]
        return torch.load(value, weights_only=True) if isinstance(value, Path) else value

    def drop(self, batch: int, key: str) -> None:
        """Forget a value, if there is one."""
        value = self._values.pop((batch, key), None)
        if isinstance(value, Path):
            value.unlink()
        elif isinstance(value, Tensor) and self._memory is not None:
            self._held -= value.nbytes

    def _written(self, value: Tensor) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="qwrap-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._count += 1
        path = self._folder / str(self._count)
        torch.save(value.contiguous().clone() if value.storage_offset() else value, path)
        return path
