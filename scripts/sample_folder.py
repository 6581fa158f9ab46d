"""Samples in a folder, one .npz file each, for processes that read them one at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np


class SampleFolder:
    """Samples of a model, input name -> array, in the order in which they were written.

    Args:
        folder: where :meth:`write` put them. Nothing is read before a sample is asked for.
    """

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.glob("*.npz"))

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for file in self._files:
            with np.load(file) as arrays:
                yield dict(arrays)

    @classmethod
    def write(cls, folder: Path, samples: Iterable[dict[str, np.ndarray]]) -> SampleFolder:
        """Write the samples, unless the folder is there from before; it appears when complete."""
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                made = Path(scratch) / "samples"
                made.mkdir()
                for index, sample in enumerate(samples):
                    np.savez(made / f"{index:06d}.npz", **sample)
                made.rename(folder)
        return cls(folder)
