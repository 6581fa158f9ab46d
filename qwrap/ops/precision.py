"""In which type sums are formed."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(x: Tensor) -> torch.dtype:
    """Return the type that a sum of many elements of ``x`` is formed in: float32 or wider.

    Half precision has neither the range for a sum of squares nor the bits for a long sum;
    onnxruntime accumulates in float32, too.
    """
    return torch.promote_types(x.dtype, torch.float32)
