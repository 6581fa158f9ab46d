"""The real models and data that the benchmarks run on: a folder ``shared`` beside the checkout."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Inputs = Mapping[str, np.ndarray]
Run = Callable[[Inputs], Sequence[np.ndarray]]

_CHECKOUT = Path(__file__).resolve().parents[1]


def default_folder() -> Path:
    """``$QWRAP_SHARED``, else the folder ``shared`` beside the checkout."""
    return Path(os.environ.get("QWRAP_SHARED", _CHECKOUT.parent / "shared"))


class SharedModels:
    """Models, samples and task metrics by model name.

    Args:
        folder: holds ``models/*.onnx`` and ``data`` with the modules ``load`` and ``check``.
    """

    def __init__(self, folder: Path) -> None:
        data = folder / "data"
        if not (data / "load.py").is_file():
            raise SystemExit(
                f"no shared models at {folder}: data/load.py is missing there; "
                "name the folder with --shared or QWRAP_SHARED"
            )
        sys.path.insert(0, str(data))
        self._load = importlib.import_module("load")
        self._check = importlib.import_module("check")

    @property
    def names(self) -> list[str]:
        """Names of all models."""
        return list(self._load.NAMES)

    def path(self, name: str) -> Path:
        """The float file."""
        return Path(self._load.model_path(name))

    def calibration(self, name: str, count: int) -> list[Inputs]:
        """The first ``count`` calibration samples, batch 1; fewer where there are fewer."""
        return list(self.stream_calibration(name, count))

    def stream_calibration(self, name: str, count: int) -> Iterator[Inputs]:
        """The same one at a time, read when asked for."""
        return (inputs for inputs, _ in self._load.calib(name, count))

    def validation(self, name: str, count: int) -> list[Inputs]:
        """The first ``count`` validation samples, batch 1."""
        return [inputs for inputs, _ in self._load.val(name, count)]

    def cifar10(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Images ``[N, 3, 32, 32]`` as resnet20_cifar10 wants them, and classes ``[N]``.

        Args:
            split: "train" (4000) or "test" (600).
        """
        images, classes = self._load.cifar10(split)
        return self._load.resnet20_input(images), classes

    def evaluate(self, name: str, run: Run) -> dict[str, Any]:
        """The task metric over all validation samples; its first entry is the one that counts."""
        return dict(self._check.evaluate(name, run))
