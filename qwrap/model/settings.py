"""How a graph becomes a module, as ``load`` was asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """What ``qwrap.load`` takes besides the model.

    Attributes:
        dtype: what float32 tensors of the graph are computed in. None: float32.
        libraries: paths of shared libraries with operators for onnxruntime.
        parameters: names of what is trained, or patterns of them; None: see ``Layout``.
    """

    dtype: torch.dtype | None = None
    libraries: tuple[str, ...] = ()
    parameters: tuple[str, ...] | None = None
