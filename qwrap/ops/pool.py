"""Pooling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import UnsupportedOpError
from qwrap.ops.limits import FLAG
from qwrap.ops.registry import op
from qwrap.ops.window import Window, torch_pads, window

MAX_POOLS: tuple[Callable[..., Tensor], ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
INDEXED: tuple[Callable[..., tuple[Tensor, Tensor]], ...] = (
    F.max_pool1d_with_indices,
    F.max_pool2d_with_indices,
    F.max_pool3d_with_indices,
)
AVERAGE_POOLS: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
UNPADDED = ("NOTSET", "VALID")


def _rank(x: Tensor) -> int:
    rank = x.ndim - 2
    if not 1 <= rank <= 3:
        raise UnsupportedOpError(f"pooling over {rank} spatial axes; torch has 1 to 3")
    return rank


def overhang(x: Tensor, place: Window, ceil_mode: int) -> tuple[int, ...]:
    """Return the padding after each axis with which whole windows fill the axis.

    Rounding up the number of windows, one that would start past the last element is dropped.
    Negative where the last elements are in no window.
    """
    ends = []
    sizes = zip(x.shape[2:], place.extents, place.strides, place.begin, place.end, strict=True)
    for n, extent, stride, begin, end in sizes:
        room = n + begin + end - extent
        count = (-(-room // stride) if ceil_mode else room // stride) + 1
        if ceil_mode and (count - 1) * stride >= n + begin:
            count -= 1
        ends.append((count - 1) * stride + extent - n - begin)
    return tuple(ends)


@op("MaxPool", since=(1,))
def max_pool(
    X: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Return the largest value in each window; padding never wins."""
    rank = _rank(X)
    if not (ceil_mode or (pads and any(pads))) and auto_pad in UNPADDED and X.is_floating_point():
        return MAX_POOLS[rank - 1](X, kernel_shape, strides or 1, 0, dilations or 1)
    place = window(X, kernel_shape, strides, dilations, pads, auto_pad, same_undilated=True)
    values = X if X.dtype.is_floating_point else X.float()  # exact: integers have 8 bits here
    pool = MAX_POOLS[rank - 1]
    padding = place.begin
    if ceil_mode or not _torch_can_pad(place):
        values = F.pad(values, torch_pads(padding, overhang(X, place, ceil_mode)), value=-math.inf)
        padding = (0,) * rank
    y = pool(values, place.kernel, place.strides, padding, place.dilations)
    return y.to(X.dtype)


def _torch_can_pad(place: Window) -> bool:
    """Whether torch's pooling accepts the padding: symmetric, at most half a kernel."""
    return place.symmetric and all(
        2 * p <= k for p, k in zip(place.begin, place.kernel, strict=True)
    )


@op("MaxPool", since=(8, 10, 11, 12, 22), allowed={"storage_order": FLAG})
def max_pool_with_indices(
    X: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Return the largest values and, if wanted, where in the flattened ``X`` they were."""
    if output_count == 1:
        y = max_pool(
            X,
            kernel_shape=kernel_shape,
            auto_pad=auto_pad,
            ceil_mode=ceil_mode,
            dilations=dilations,
            pads=pads,
            strides=strides,
        )
        return (y,)
    place = window(X, kernel_shape, strides, dilations, pads, auto_pad, same_undilated=True)
    values = X if X.dtype.is_floating_point else X.float()
    padded = F.pad(values, torch_pads(place.begin, overhang(X, place, ceil_mode)), value=-math.inf)
    pool = INDEXED[_rank(X) - 1]
    y, index = pool(padded, place.kernel, place.strides, 0, place.dilations)
    where = _index_in_input(index, padded.shape[2:], X.shape, place.begin, storage_order)
    return y.to(X.dtype), where


def _index_in_input(
    index: Tensor,
    padded: Sequence[int],
    shape: Sequence[int],
    begin: Sequence[int],
    storage_order: int,
) -> Tensor:
    """Turn flat positions in a padded plane into flat positions in the whole input."""
    coordinates = []
    for n, first in zip(reversed(padded), reversed(begin), strict=True):
        coordinates.append(index % n - first)
        index = index // n
    coordinates.reverse()
    axes = range(len(coordinates))
    position = torch.zeros_like(index)
    for axis in reversed(axes) if storage_order else axes:
        position = position * shape[2 + axis] + coordinates[axis]
    planes = torch.arange(shape[0] * shape[1], device=index.device)
    planes = planes.reshape(shape[0], shape[1], *[1] * len(axes))
    return planes * math.prod(shape[2:]) + position


@op("AveragePool", since=(1, 7, 10, 11, 19, 22))
def average_pool(
    X: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Average each window over its real elements, or over padding too (``count_include_pad``).

    What a window covers past the padding (``ceil_mode``) never counts.
    """
    rank = _rank(X)
    if not (ceil_mode or dilations or (pads and any(pads))) and auto_pad in UNPADDED:
        return AVERAGE_POOLS[rank - 1](X, kernel_shape, strides or 1)
    place = window(X, kernel_shape, strides, dilations, pads, auto_pad, same_undilated=True)
    if not ceil_mode and _torch_can_pad(place) and set(place.dilations) == {1}:
        pool = AVERAGE_POOLS[rank - 1]
        return pool(X, place.kernel, place.strides, place.begin, False, bool(count_include_pad))
    ends = overhang(X, place, ceil_mode)
    counted = torch.ones_like(X[:1, :1])
    if count_include_pad:
        counted = F.pad(counted, torch_pads(place.begin, place.end), value=1.0)
        rest = [e - p for e, p in zip(ends, place.end, strict=True)]
        counted = F.pad(counted, torch_pads([0] * rank, rest))
    else:
        counted = F.pad(counted, torch_pads(place.begin, ends))
    padded = F.pad(X, torch_pads(place.begin, ends))
    return _window_sums(padded, place) / _window_sums(counted, place)


def _window_sums(x: Tensor, place: Window) -> Tensor:
    """Add up each window of an input that needs no padding."""
    ones = x.new_ones(1, 1, *place.kernel)
    planes = x.reshape(-1, 1, *x.shape[2:])
    convolve = CONVOLUTIONS[len(place.kernel) - 1]
    sums = convolve(planes, ones, None, place.strides, 0, place.dilations)
    return sums.reshape(x.shape[0], x.shape[1], *sums.shape[2:])


@op("GlobalAveragePool", since=(1, 22))
def global_average_pool(x: Tensor) -> Tensor:
    """Average over all spatial axes."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


@op("GlobalMaxPool", since=(1, 22))
def global_max_pool(x: Tensor) -> Tensor:
    """Return the largest value over all spatial axes."""
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)
