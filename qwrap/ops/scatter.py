"""Operators that write single elements or slices into a copy of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from qwrap.ops.limits import one_of
from qwrap.ops.registry import op
from qwrap.ops.select import non_negative

TORCH_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter(data: Tensor, axis: int, indices: Tensor, updates: Tensor, reduction: str) -> Tensor:
    """Write ``updates`` along ``axis`` of a copy of ``data``; all have the same rank.

    Where several updates meet in one element, ``"none"`` keeps one of them.
    """
    if reduction == "none":
        return data.scatter(axis, indices, updates)
    if data.dtype == torch.bool:  # or is max, and is min
        bits = _scatter(data.byte(), axis, indices, updates.byte(), reduction)
        return bits.bool()
    return data.scatter_reduce(axis, indices, updates, TORCH_REDUCTIONS[reduction])


REDUCTION = one_of("none", "add", "mul", "max", "min")


@op("ScatterElements", since=(16, 18), allowed={"reduction": REDUCTION})
def scatter_elements(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """Combine single elements along ``axis``, one for each index, with those of ``data``."""
    indices = non_negative(indices, data.shape[axis])
    return _scatter(data, axis, indices, updates, reduction)


@op("Scatter", since=(9, 11))
@op("ScatterElements", since=(11, 13))
def scatter_elements_11(data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0) -> Tensor:
    """Replace single elements along ``axis``, one for each index."""
    return scatter_elements(data, indices, updates, axis=axis)


@op("ScatterND", since=(16, 18), allowed={"reduction": REDUCTION})
def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none"
) -> Tensor:
    """Combine the slices of ``data`` that the last axis of ``indices`` addresses with updates."""
    depth = indices.shape[-1]
    row = indices.new_zeros(indices.shape[:-1], dtype=torch.int64)
    for axis, index in enumerate(indices.unbind(-1)):
        row = row * data.shape[axis] + non_negative(index, data.shape[axis])
    rows = data.reshape(*_rows_and_columns(data, depth))
    new = updates.reshape(row.numel(), rows.shape[1])
    if reduction in ("none", "add"):  # needs no index for every element of a slice
        written = rows.index_put((row.flatten(),), new, accumulate=reduction == "add")
    else:
        written = _scatter(rows, 0, row.reshape(-1, 1).expand_as(new), new, reduction)
    return written.reshape(data.shape)


def _rows_and_columns(data: Tensor, depth: int) -> tuple[int, int]:
    """Return how many slices the first ``depth`` axes address, and of how many elements."""
    rows = 1
    for n in data.shape[:depth]:
        rows *= n
    columns = 1
    for n in data.shape[depth:]:
        columns *= n
    return rows, columns


@op("ScatterND", since=(11, 13))
def scatter_nd_11(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Replace the slices of ``data`` that the last axis of ``indices`` addresses."""
    return scatter_nd(data, indices, updates)


@op("TensorScatter", since=(24,), allowed={"mode": one_of("linear", "circular")})
def tensor_scatter(
    past_cache: Tensor,
    update: Tensor,
    write_indices: Tensor | None = None,
    *,
    mode: str = "linear",
    axis: int = -2,
) -> Tensor:
    """Write ``update`` into a copy of a cache, each sample of the batch from its own position on.

    With ``mode="circular"`` what runs past the end of ``axis`` goes on at its beginning.
    """
    position = torch.arange(update.shape[axis], device=update.device)
    if write_indices is not None:
        position = write_indices.to(torch.int64).unsqueeze(1) + position
    if mode == "circular":
        position = position % past_cache.shape[axis]
    axis %= update.ndim
    across = [1] * update.ndim
    across[0], across[axis] = -1, update.shape[axis]
    index = position.reshape(across).expand_as(update)
    if past_cache.itemsize == 1:  # torch scatters no 8-bit floats
        bits = past_cache.view(torch.uint8).scatter(axis, index, update.view(torch.uint8))
        return bits.view(past_cache.dtype)
    return past_cache.scatter(axis, index, update)
