"""Pooling of regions of interest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwrap.ops.limits import at_least, one_of
from qwrap.ops.precision import accumulator
from qwrap.ops.registry import op

MODE = one_of("avg", "max")


@op(
    "RoiAlign",
    since=(16, 22),
    allowed={
        "mode": MODE,
        "coordinate_transformation_mode": one_of("half_pixel", "output_half_pixel"),
        "output_height": at_least(1),
        "output_width": at_least(1),
        "sampling_ratio": at_least(0),
    },
)
def roi_align(
    X: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Divide each region into bins and average (or take the maximum of) samples in each.

    Samples are interpolated linearly. The maximum is that of the four *weighted* neighbours, as
    in the reference implementation and onnxruntime. Without ``sampling_ratio`` a bin of ``n``
    pixels has ``ceil(n)`` samples along an axis, so their number depends on the data.
    """
    wide = accumulator(X)
    half_pixel = coordinate_transformation_mode == "half_pixel"
    corners = rois.to(wide) * spatial_scale - (0.5 if half_pixel else 0.0)
    start, end = corners[:, :2], corners[:, 2:]
    extent = end - start
    if not half_pixel:
        extent = extent.clamp(min=1.0)  # malformed regions are of one pixel
    rows = _samples(start[:, 1], extent[:, 1], output_height, sampling_ratio, X.shape[2])
    columns = _samples(start[:, 0], extent[:, 0], output_width, sampling_ratio, X.shape[3])
    image = X.to(wide).permute(0, 2, 3, 1)
    if mode == "avg":
        return _average(image, batch_indices, rows, columns).to(X.dtype)
    return _largest(image, batch_indices, rows, columns).to(X.dtype)


@op("RoiAlign", since=(10,))
def roi_align_10(
    X: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Align with the corners of regions not moved by half a pixel."""
    return roi_align(
        X,
        rois,
        batch_indices,
        coordinate_transformation_mode="output_half_pixel",
        mode=mode,
        output_height=output_height,
        output_width=output_width,
        sampling_ratio=sampling_ratio,
        spatial_scale=spatial_scale,
    )


@dataclass(frozen=True, slots=True)
class _Samples:
    """The sampling positions along one axis, ``[regions, bins, samples]`` each.

    Attributes:
        low: the neighbour before.
        high: the neighbour after.
        weight: that of the neighbour after; the other's is the rest to one.
        inside: 0 where a position lies outside the image, or the region has fewer samples.
        used: whether the region has that sample.
    """

    low: Tensor
    high: Tensor
    weight: Tensor
    inside: Tensor
    used: Tensor

    @property
    def count(self) -> Tensor:
        """How many samples each region has along this axis in a bin."""
        return self.used.sum(-1).amax(1)


def _samples(start: Tensor, extent: Tensor, bins: int, ratio: int, size: int) -> _Samples:
    size_of_bin = extent / bins
    if ratio > 0:
        count, most = torch.full_like(extent, ratio), ratio
    else:
        count = size_of_bin.ceil().clamp(min=0)
        most = int(count.amax()) if len(count) else 0
    device = start.device
    sample = torch.arange(most, device=device).reshape(1, 1, -1)
    first = start.unsqueeze(1) + torch.arange(bins, device=device) * size_of_bin.unsqueeze(1)
    step = (size_of_bin / count).reshape(-1, 1, 1)
    x = first.unsqueeze(2) + (sample + 0.5) * step
    used = (sample < count.reshape(-1, 1, 1)).expand_as(x)
    inside = used & (x >= -1.0) & (x <= size)
    x = torch.where(inside, x, 0.0).clamp(min=0.0, max=size - 1)
    low = x.detach().floor().long()
    high = (low + 1).clamp(max=size - 1)
    return _Samples(low, high, x - low, inside.to(x.dtype), used)


def _average(image: Tensor, batch: Tensor, rows: _Samples, columns: _Samples) -> Tensor:
    total = torch.zeros((), dtype=image.dtype, device=image.device)
    for part in _neighbours(image, batch, rows, columns):
        total = total + part
    count = (rows.count * columns.count).clamp(min=1).reshape(-1, 1, 1, 1)
    return (total.sum((2, 4)) / count).permute(0, 3, 1, 2)


def _largest(image: Tensor, batch: Tensor, rows: _Samples, columns: _Samples) -> Tensor:
    parts = torch.stack(list(_neighbours(image, batch, rows, columns))).amax(0)
    used = rows.used[:, :, :, None, None, None] & columns.used[:, None, None, :, :, None]
    if not used.numel():
        return parts.sum((2, 4)).permute(0, 3, 1, 2)
    largest = torch.where(used, parts, -torch.inf).amax((2, 4))
    some = used.any(4).any(2)
    return torch.where(some, largest, 0.0).permute(0, 3, 1, 2)


def _neighbours(
    image: Tensor, batch: Tensor, rows: _Samples, columns: _Samples
) -> Sequence[Tensor]:
    """Return the four weighted neighbours, ``[regions, rows, samples, columns, samples, C]``."""
    where = batch.reshape(-1, 1, 1, 1, 1)
    parts = []
    for y, row_weight in ((rows.low, 1 - rows.weight), (rows.high, rows.weight)):
        for x, weight in ((columns.low, 1 - columns.weight), (columns.high, columns.weight)):
            picked = image[where, y[:, :, :, None, None], x[:, None, None, :, :]]
            vertical = (row_weight * rows.inside)[:, :, :, None, None, None]
            horizontal = (weight * columns.inside)[:, None, None, :, :, None]
            parts.append(picked * vertical * horizontal)
    return parts


@op("MaxRoiPool", since=(1, 22))
def max_roi_pool(
    X: Tensor, rois: Tensor, *, pooled_shape: Sequence[int], spatial_scale: float = 1.0
) -> Tensor:
    """Divide each region, rounded to whole pixels, into bins and return the maximum of each.

    A region is ``(index in the batch, x1, y1, x2, y2)``; an empty bin gives 0.
    """
    corners = (rois[:, 1:].to(accumulator(rois)) * spatial_scale + 0.5).floor()
    rows = _bins(corners[:, 1], corners[:, 3], pooled_shape[0], X.shape[2])
    columns = _bins(corners[:, 0], corners[:, 2], pooled_shape[1], X.shape[3])
    image = X[rois[:, 0].long()]
    y = torch.stack([_largest_of(image, mask[:, None, None, :]) for mask in columns], -1)
    y = torch.stack([_largest_of(y.mT, mask[:, None, None, :]) for mask in rows], 2)
    return torch.where(y > -torch.inf, y, 0.0)


def _bins(start: Tensor, end: Tensor, bins: int, size: int) -> list[Tensor]:
    """Return which elements of an axis are in each bin, a mask ``[regions, size]`` each."""
    width = (end - start + 1).clamp(min=1) / bins
    at = torch.arange(size, device=start.device)
    masks = []
    for i in range(bins):
        low, high = (i * width).floor() + start, ((i + 1) * width).ceil() + start
        masks.append((at >= low.unsqueeze(1)) & (at < high.unsqueeze(1)))
    return masks


def _largest_of(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, -torch.inf).amax(-1)
