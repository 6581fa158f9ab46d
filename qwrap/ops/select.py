"""Operators that pick elements: by index, by range, by rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwrap.ops.registry import op


def _non_negative(indices: Tensor, size: int) -> Tensor:
    """Count negative indices from the end, as int64."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


@op("Gather", since=(1, 11, 13), literal=(1,))
def gather(data: Tensor, indices: Tensor | int, *, axis: int = 0) -> Tensor:
    """Take slices of ``axis``; a single index drops the axis."""
    if not isinstance(indices, Tensor):
        return data.select(axis, indices)
    axis %= data.ndim
    flat = _non_negative(indices, data.shape[axis]).flatten()
    picked = data.index_select(axis, flat)
    return picked.reshape(*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])


@op("GatherElements", since=(11, 13))
def gather_elements(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Take single elements along ``axis``, one for each index."""
    return torch.gather(data, axis, _non_negative(indices, data.shape[axis]))


@op("GatherND", since=(11,))
def gather_nd_11(data: Tensor, indices: Tensor) -> Tensor:
    """Take the slices of ``data`` that the last axis of ``indices`` addresses."""
    return data[tuple(indices.to(torch.int64).unbind(-1))]


@op("GatherND", since=(12, 13))
def gather_nd(data: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Take the slices that the last axis of ``indices`` addresses, after shared batch axes."""
    address = indices.to(torch.int64).unbind(-1)
    batch = []
    for axis in range(batch_dims):
        along = [1] * (indices.ndim - 1)
        along[axis] = -1
        batch.append(torch.arange(data.shape[axis], device=data.device).reshape(along))
    return data[tuple(batch) + address]


@op("Slice", since=(10, 11, 13), host=(1, 2, 3, 4))
def slice_axes(
    data: Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """Cut a range out of each of ``axes``, forwards or backwards; ends past the axis are cut."""
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            n = data.shape[axis]
            data = data.flip(axis)
            start, end, step = _mirrored(start, n), _mirrored(end, n), -step
        index[axis] = slice(start, end, step)
    return data[tuple(index)]


def _mirrored(position: int, n: int) -> int:
    """Return the position in the reversed axis of an element, or of just before the first."""
    position = position + n if position < 0 else position
    return n - 1 - min(max(position, -1), n - 1)


@op("Slice", since=(1,))
def slice_attributes(
    data: Tensor,
    *,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int] | None = None,
) -> Tensor:
    """Cut a range out of each of ``axes``."""
    return slice_axes(data, starts, ends, axes)


@op("TopK", since=(11, 24), host=(1,), ignored=("sorted",))
def topk(
    X: Tensor, K: int | Sequence[int], *, axis: int = -1, largest: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the ``K`` largest (or smallest) values along ``axis``, sorted, and their indices.

    Of equal values the first comes first, which ``torch.topk`` does not promise. The order of
    unsorted results is undefined, so sorted ones serve.
    """
    (k,) = K if isinstance(K, Sequence) else (K,)
    values, indices = torch.sort(X, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, k), indices.narrow(axis, 0, k)


@op("TopK", since=(10,), host=(1,))
def topk_largest(X: Tensor, K: int | Sequence[int], *, axis: int = -1) -> tuple[Tensor, Tensor]:
    """Return the ``K`` largest values along ``axis`` and their indices."""
    return topk(X, K, axis=axis)


@op("TopK", since=(1,))
def topk_attribute(X: Tensor, *, k: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest values along ``axis`` and their indices."""
    return topk(X, k, axis=axis)
