"""Operators that create a tensor from sizes and bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from onnx import TensorProto
from torch import Tensor

from qwrap.ops.norm import STASH, STASH_TYPES
from qwrap.ops.registry import op


@op("ConstantOfShape", since=(9, 20, 21, 23, 24, 25), host=(0,))
def constant_of_shape(
    input: Sequence[int], *, value: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """Return a tensor of shape ``input`` filled with ``value``, by default float32 zero."""
    if value is None:
        return torch.zeros(tuple(input), device=device)
    return value.to(device).reshape(()).expand(tuple(input)).contiguous()


@op("Range", since=(11, 27), host=(0, 1, 2), allowed={"stash_type": STASH})
def range_of(
    start: float,
    limit: float,
    delta: float,
    *,
    stash_type: int = TensorProto.FLOAT,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``start + i * delta`` up to before ``limit``, of half precision by ``stash_type``.

    Without ``dtype``, whole numbers give int64 and others float32.
    """
    # The function body of AffineGrid gives tensors of one element, as onnxruntime accepts.
    start, limit, delta = (n[0] if isinstance(n, list) else n for n in (start, limit, delta))
    if dtype is None or not dtype.is_floating_point:
        integers = all(not isinstance(n, float) for n in (start, limit, delta))
        dtype = dtype or (torch.int64 if integers else torch.float32)
    if not dtype.is_floating_point:
        count = max(-((start - limit) // delta), 0)
        return start + torch.arange(count, device=device, dtype=dtype) * delta
    count = max(math.ceil((limit - start) / delta), 0)
    wide = STASH_TYPES[stash_type] if dtype.itemsize == 2 else dtype
    steps = torch.arange(count, device=device, dtype=wide)
    return (start + steps * delta).to(dtype)
