"""Operators that pick elements: by index, by range, by rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwrap.ops.limits import at_least
from qwrap.ops.registry import op


def non_negative(indices: Tensor, size: int) -> Tensor:
    """Count negative indices from the end, as int64."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


@op("Gather", since=(1, 11, 13), literal=(1,))
def gather(data: Tensor, indices: Tensor | int, *, axis: int = 0) -> Tensor:
    """Take slices of ``axis``; a single index drops the axis."""
    if not isinstance(indices, Tensor):
        return data.select(axis, indices)
    axis %= data.ndim
    flat = non_negative(indices, data.shape[axis]).flatten()
    picked = data.index_select(axis, flat)
    return picked.reshape(*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])


@op("GatherElements", since=(11, 13))
def gather_elements(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Take single elements along ``axis``, one for each index."""
    return torch.gather(data, axis, non_negative(indices, data.shape[axis]))


@op("GatherND", since=(11,))
def gather_nd_11(data: Tensor, indices: Tensor) -> Tensor:
    """Take the slices of ``data`` that the last axis of ``indices`` addresses."""
    return data[tuple(indices.to(torch.int64).unbind(-1))]


@op("GatherND", since=(12, 13), allowed={"batch_dims": at_least(0)})
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
            start, end, step = _mirrored(start, n, 0), _mirrored(end, n, -1), -step
        index[axis] = slice(start, end, step)
    return data[tuple(index)]


def _mirrored(position: int, n: int, lowest: int) -> int:
    """Return a position of an axis as one of the reversed axis; none is before ``lowest``.

    A cut starts at the first element at the earliest, and ends just before it.
    """
    position = position + n if position < 0 else position
    return n - 1 - min(max(position, lowest), n - 1)


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

    Of equal values the first comes first, which ``torch.topk`` does not promise: it gets keys that
    differ by the index, or where value and index do not fit into one number, all is sorted. The
    order of unsorted results is undefined, so sorted ones serve.
    """
    (k,) = K if isinstance(K, Sequence) else (K,)
    rank = _rank(X.detach())
    if rank is None:
        values, indices = torch.sort(X, dim=axis, descending=bool(largest), stable=True)
        return values.narrow(axis, 0, k), indices.narrow(axis, 0, k)
    index = torch.arange(X.shape[axis], device=X.device)
    index = index.reshape([-1] + [1] * (X.ndim - 1 - axis % X.ndim))
    key = (rank.to(torch.int64) << 32) | (index ^ INDEX_BITS if largest else index)
    key = torch.topk(key, k, axis, largest=bool(largest)).values & INDEX_BITS
    indices = key ^ INDEX_BITS if largest else key
    return X.gather(axis, indices), indices


INDEX_BITS = 0xFFFFFFFF


def _rank(x: Tensor) -> Tensor | None:
    """Return integers of at most 32 bits in the order of ``x``, None for 64-bit types."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if x.dtype == torch.float32:
        bits = (x + 0.0).view(torch.int32)  # plus zero, because -0.0 equals 0.0
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats grow with falling bits
    return x if x.itemsize < 8 and not x.dtype.is_floating_point else None


@op("TopK", since=(10,), host=(1,))
def topk_largest(X: Tensor, K: int | Sequence[int], *, axis: int = -1) -> tuple[Tensor, Tensor]:
    """Return the ``K`` largest values along ``axis`` and their indices."""
    return topk(X, K, axis=axis)


@op("TopK", since=(1,))
def topk_attribute(X: Tensor, *, k: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest values along ``axis`` and their indices."""
    return topk(X, k, axis=axis)


@op("Compress", since=(9, 11, 28))
def compress(input: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """Take the slices of ``axis``, or of the flattened input, where ``condition`` holds."""
    data = input.flatten() if axis is None else input
    return data.index_select(axis or 0, condition.nonzero().flatten())


@op("NonZero", since=(9, 13))
def non_zero(x: Tensor) -> Tensor:
    """Return the indices of what is not zero, one row per axis; a scalar counts as one axis."""
    rows = (x if x.ndim else x.reshape(1)).nonzero()
    return rows.t().contiguous()


@op("OneHot", since=(9, 11, 28), host=(1,))
def one_hot(
    indices: Tensor, depth: float | Sequence[float], values: Tensor, *, axis: int = -1
) -> Tensor:
    """Insert an axis of size ``depth`` with ``values[1]`` at the index, ``values[0]`` elsewhere.

    Indices outside of ``[-depth, depth - 1]`` give nothing but ``values[0]``.
    """
    (size,) = depth if isinstance(depth, Sequence) else (depth,)
    count = int(size) if isinstance(size, float) else size
    axis %= indices.ndim + 1
    classes = torch.arange(count, device=indices.device)
    classes = classes.reshape([-1] + [1] * (indices.ndim - axis))
    hot = non_negative(indices, count).unsqueeze(axis) == classes
    return torch.where(hot, values[1], values[0])


@op("ReverseSequence", since=(10, 28))
def reverse_sequence(
    input: Tensor, sequence_lens: Tensor, *, batch_axis: int = 1, time_axis: int = 0
) -> Tensor:
    """Reverse the first ``sequence_lens[b]`` steps of sample ``b`` and keep the others."""
    step = torch.arange(input.shape[time_axis], device=input.device).unsqueeze(1)
    lengths = sequence_lens.to(torch.int64)
    index = torch.where(step < lengths, lengths - 1 - step, step)  # [time, batch]
    index = index if time_axis < batch_axis else index.t()
    index = index.reshape(*index.shape, *[1] * (input.ndim - 2)).expand(input.shape)
    return input.gather(time_axis, index)


@op("Unique", since=(11, 28))
def unique(
    X: Tensor, *, axis: int | None = None, sorted: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what is unique in ``X``, where it is first, which one each is, and how often.

    With ``axis`` slices are compared. Without ``sorted`` what comes first is first.
    """
    data, dim = (X.flatten(), 0) if axis is None else (X, axis)
    rows = data.detach().movedim(dim, 0).unsqueeze(-1).flatten(1)
    kinds, inverse, counts = torch.unique(rows, return_inverse=True, return_counts=True, dim=0)
    position = torch.arange(len(rows), device=X.device)
    last = torch.full((len(kinds),), len(rows), device=X.device)
    first = last.scatter_reduce(0, inverse, position, "amin")
    if not sorted:
        first, order = first.sort()
        inverse, counts = order.argsort()[inverse], counts[order]
    return data.index_select(dim, first), first, inverse, counts
