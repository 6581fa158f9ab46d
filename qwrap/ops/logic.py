"""Comparisons, Boolean operators and selection by a condition."""

from __future__ import annotations

import torch
from torch import Tensor

from qwrap.ops.math import with_legacy_broadcast
from qwrap.ops.registry import op

op("Not", since=(1,))(torch.logical_not)
op("And", since=(7,))(torch.logical_and)
op("Or", since=(7,))(torch.logical_or)
op("Xor", since=(7,))(torch.logical_xor)
op("Equal", since=(7, 11, 13, 19))(torch.eq)
op("Greater", since=(7, 9, 13))(torch.gt)
op("GreaterOrEqual", since=(12, 16))(torch.ge)
op("Less", since=(7, 9, 13))(torch.lt)
op("LessOrEqual", since=(12, 16))(torch.le)

op("And", since=(1,))(with_legacy_broadcast(torch.logical_and))
op("Or", since=(1,))(with_legacy_broadcast(torch.logical_or))
op("Xor", since=(1,))(with_legacy_broadcast(torch.logical_xor))
op("Equal", since=(1,))(with_legacy_broadcast(torch.eq))
op("Greater", since=(1,))(with_legacy_broadcast(torch.gt))
op("Less", since=(1,))(with_legacy_broadcast(torch.lt))


@op("Where", since=(9, 16))
def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Take ``x`` where ``condition`` holds, else ``y``."""
    return torch.where(condition, x, y)


@op("IsNaN", since=(9, 13, 20))
def is_nan(x: Tensor) -> Tensor:
    """Return whether an element is not a number."""
    return torch.isnan(x.float() if x.itemsize == 1 else x)


@op("IsInf", since=(10, 20))
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Return whether an element is one of the infinities to detect."""
    x = x.float() if x.itemsize == 1 else x  # torch compares no 8-bit floats
    if detect_negative and detect_positive:
        return torch.isinf(x)
    if not (detect_negative or detect_positive):
        return torch.zeros_like(x, dtype=torch.bool)
    return torch.isposinf(x) if detect_positive else torch.isneginf(x)
