"""Batches kept on disk, to run them a second time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch

Batch = Mapping[str, Any]

_NUMBERS = "biufc"  # kinds of numpy types that a file holds as they are


class Spool:
    """A file without a name that takes batches and gives them back; gone when it is closed.

    Arrays of numbers go to the file. What else a batch holds, such as text, stays in memory.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="qwrap-batches-")  # noqa: SIM115  # closed with the spool
        self._batches: list[tuple[list[str], dict[str, Any]]] = []

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def passing(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield ``batches`` one by one, each when it has been written."""
        for batch in batches:
            self._write(batch)
            yield batch

    def _write(self, batch: Batch) -> None:
        written, kept = [], {}
        for name, value in batch.items():
            array = _array(value)
            if array is None:
                kept[name] = value
            else:
                written.append(name)
                np.save(self._file, array, allow_pickle=False)
        self._batches.append((written, kept))

    def batches(self) -> Iterator[Batch]:
        """Yield what was written, from the first batch on."""
        self._file.seek(0)
        for names, kept in self._batches:
            yield {name: np.load(self._file, allow_pickle=False) for name in names} | kept


def _array(value: Any) -> np.ndarray[Any, np.dtype[Any]] | None:
    """Return ``value`` as an array of numbers, None if it is none."""
    if isinstance(value, torch.Tensor) and value.dtype != torch.bfloat16:
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in _NUMBERS:
        return np.asarray(value)
    return None
