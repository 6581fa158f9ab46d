"""How a graph becomes a module, as ``load`` was asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from qwrap.errors import ConfigError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Expand = Literal["auto", "never", "always"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """What ``qwrap.load`` takes besides the model, where it is explained.

    Attributes:
        expand: which operators run as the function body of their schema.
        dtype: what float32 tensors of the graph are computed in. None: float32.
        libraries: paths of shared libraries with operators for onnxruntime.
        parameters: names or patterns of what is to be trained. None: by the rule of ``Layout``.
    """

    expand: Expand = "auto"
    dtype: torch.dtype | None = None
    libraries: tuple[str, ...] = ()
    parameters: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.expand not in get_args(Expand):
            raise ConfigError(
                f"expand={self.expand!r}; choose one of {', '.join(get_args(Expand))}"
            )
        if self.dtype is not None and self.dtype not in FLOATS:
            known = ", ".join(map(str, FLOATS))
            raise ConfigError(f"dtype={self.dtype}; choose one of {known}")
