"""What the operators of ai.onnx.ml share: their domain, their rows, tables on each device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwrap.errors import InputError, ModelError

DOMAIN = "ai.onnx.ml"

Text = npt.NDArray[Any]
Table = TypeVar("Table")


@dataclass(frozen=True)
class Tables(Generic[Table]):
    """A dataclass of tensors, and a copy of it on each device that asked.

    Attributes:
        host: the one on the CPU.
        copies: those on other devices.
    """

    host: Table
    copies: dict[str, Table] = field(default_factory=dict)

    def on(self, device: torch.device) -> Table:
        """Return the tables with their tensors on ``device``."""
        if device.type == "cpu":
            return self.host
        if str(device) not in self.copies:
            host: Any = self.host
            tensors = {f.name: getattr(host, f.name) for f in fields(host)}
            moved = {n: t.to(device) for n, t in tensors.items() if isinstance(t, Tensor)}
            self.copies[str(device)] = replace(host, **moved)
        return self.copies[str(device)]


def rows(X: Tensor) -> Tensor:
    """Return ``X`` as floats ``[rows, features]``; one axis is one row, as in onnxruntime.

    Raises:
        InputError: ``X`` has more than two axes.
    """
    if X.ndim > 2:
        raise InputError(f"shape {list(X.shape)} is neither [features] nor [rows, features]")
    floats = X if X.is_floating_point() else X.float()
    return floats.reshape(1, -1) if X.ndim < 2 else floats


def class_labels(ints: Sequence[int] | None, strings: Sequence[str] | None) -> Tensor | Text:
    """Return the labels of all classes.

    Raises:
        ModelError: neither kind of labels is there.
    """
    if strings:
        return np.array(list(strings), dtype=object)
    if not ints:
        raise ModelError("no class labels")
    return torch.tensor(ints, dtype=torch.int64)


def pick(labels: Tensor | Text, index: Tensor) -> Any:
    """Return the label of each index."""
    if isinstance(labels, Tensor):
        return labels.to(index.device)[index]
    return labels[index.cpu().numpy()]
