"""Operators that move elements, most of them older forms of what ai.onnx has."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.limits import at_least, one_of
from qwrap.ops.pad import pad


@microsoft("SampleOp")
def sample_op(X: Tensor) -> Tensor:
    """Return the input: onnxruntime's example of an operator."""
    return X


@microsoft("ExpandDims", host=(1,))
def expand_dims(X: Tensor, axis: int | Sequence[int]) -> Tensor:
    """Insert an axis of size 1."""
    return X.unsqueeze(axis[0] if isinstance(axis, Sequence) else axis)


@microsoft("Trilu", host=(1,))
def trilu(X: Tensor, k: int | Sequence[int] | None = None, *, upper: int = 1) -> Tensor:
    """Keep what is on and above (or below) a diagonal of the last two axes, zero elsewhere."""
    diagonal = (k[0] if isinstance(k, Sequence) else k) or 0
    return torch.triu(X, diagonal) if upper else torch.tril(X, diagonal)


@microsoft("GatherND")
def gather_nd(data: Tensor, indices: Tensor) -> Tensor:
    """Return the slices of ``data`` that the rows of ``indices`` point at."""
    return data[indices.long().unbind(-1)]


@microsoft("Unique")
def unique(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what occurs in ``x`` in order of first occurrence, where each went, and counts."""
    values, where, counts = torch.unique(x, return_inverse=True, return_counts=True)
    positions = torch.arange(len(x), device=x.device)
    first = torch.full_like(counts, len(x)).scatter_reduce(0, where, positions, "amin")
    order = first.argsort()
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device))
    return values[order], rank[where], counts[order]


@microsoft("Pad", host=(1, 2), allowed={"mode": one_of("constant", "reflect", "edge", "wrap")})
def padded(
    data: Tensor,
    pads: Sequence[int] | Sequence[Sequence[int]],
    value: float | Sequence[float] | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    """Add to or cut from both ends of all axes; ``pads`` may have a leading axis of 1."""
    flat = pads[0] if isinstance(pads[0], Sequence) else pads
    return pad(data, flat, value, mode=mode)  # type: ignore[arg-type]  # a list of int by now


@microsoft("Range")
def range_of(start: Tensor, limit: Tensor, delta: Tensor | None = None) -> Tensor:
    """Return ``start + i * delta`` up to before ``limit``, in the type of ``start``."""
    first, end = start.reshape(()).item(), limit.reshape(()).item()
    step = 1 if delta is None else delta.reshape(()).item()
    count = max(math.ceil((end - first) / step), 0)
    steps = torch.arange(count, device=start.device, dtype=start.dtype)
    return start.reshape(()) + steps * step


@microsoft("UnfoldTensor", allowed={"size": at_least(1), "step": at_least(1)})
def unfold_tensor(input: Tensor, *, size: int, dim: int = -1, step: int = 1) -> Tensor:
    """Return all windows of ``size`` along ``dim``, one every ``step``, as a new last axis."""
    return input.unfold(dim, size, step).contiguous()


@microsoft(
    "GridSample",
    allowed={
        "mode": one_of("bilinear", "nearest", "bicubic"),
        "padding_mode": one_of("zeros", "border", "reflection"),
    },
)
def grid_sample(
    X: Tensor,
    Grid: Tensor,
    *,
    align_corners: int = 0,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
) -> Tensor:
    """Sample ``X`` ``[N, C, H, W]`` at ``Grid`` ``[N, h, w, 2]``, whose corners are -1 and 1."""
    return F.grid_sample(X, Grid, mode, padding_mode, bool(align_corners))


@microsoft("CropAndResize", host=(3,), allowed={"mode": one_of("bilinear", "nearest")})
def crop_and_resize(
    X: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    crop_size: Sequence[int],
    *,
    extrapolation_value: float = 0.0,
    mode: str = "bilinear",
) -> Tensor:
    """Resize boxes of images to one size; the corners of box and crop coincide.

    Args:
        X: ``[N, C, H, W]``.
        rois: ``[boxes, 4]`` of ``y1, x1, y2, x2`` as shares of the last index.
        batch_indices: ``[boxes]``: the image of each box.
        crop_size: height and width of the crops.
        extrapolation_value: what lies outside of the image.
        mode: ``"bilinear"`` or ``"nearest"``.
    """
    y, x = (
        _sample_positions(rois[:, i], rois[:, i + 2], X.shape[2 + i], crop_size[i]) for i in (0, 1)
    )
    inside = ((y >= 0) & (y <= X.shape[2] - 1)).unsqueeze(2)
    inside = inside & ((x >= 0) & (x <= X.shape[3] - 1)).unsqueeze(1)
    images = batch_indices.long()
    if mode == "nearest":
        crop = _pixels(X, images, _away(y), _away(x))
    else:
        top, left = y.floor(), x.floor()
        down, right = ((v - low)[:, None] for v, low in ((y, top), (x, left)))
        above, below = (
            torch.lerp(
                _pixels(X, images, row, left), _pixels(X, images, row, x.ceil()), right[:, :, None]
            )
            for row in (top, y.ceil())
        )
        crop = torch.lerp(above, below, down[..., None])
    return torch.where(inside.unsqueeze(1), crop, extrapolation_value)


def _away(x: Tensor) -> Tensor:
    """Round half away from zero, as C's ``round`` does."""
    return (x.abs() + 0.5).floor() * x.sign()


def _sample_positions(start: Tensor, end: Tensor, size: int, count: int) -> Tensor:
    """Return ``[boxes, count]`` positions in an axis of ``size``; a single one is the middle."""
    start, end = start * (size - 1), end * (size - 1)
    if count == 1:
        return (0.5 * (start + end)).unsqueeze(1)
    steps = torch.arange(count, device=start.device, dtype=start.dtype)
    return start.unsqueeze(1) + steps * ((end - start) / (count - 1)).unsqueeze(1)


def _pixels(X: Tensor, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return ``[boxes, C, h, w]``: the pixels of each box's image, clamped to it."""
    r = rows.long().clamp(0, X.shape[2] - 1)[:, :, None]
    c = columns.long().clamp(0, X.shape[3] - 1)[:, None, :]
    return X[images[:, None, None], :, r, c].movedim(-1, 1)
