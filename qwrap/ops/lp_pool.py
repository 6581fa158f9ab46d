"""Pooling by a norm, and the inverse of maximum pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.ops.limits import at_least
from qwrap.ops.pool import overhang
from qwrap.ops.precision import accumulator
from qwrap.ops.registry import op
from qwrap.ops.window import Window, torch_pads, window


@op("LpPool", since=(1, 2, 11, 18, 22), allowed={"p": at_least(1)})
def lp_pool(
    X: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    p: float = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Return the ``p``-norm of each window; padding counts as zeros."""
    place = window(X, kernel_shape, strides, dilations, pads, auto_pad, same_undilated=True)
    padded = F.pad(X, torch_pads(place.begin, overhang(X, place, ceil_mode)))
    return _norm(_windows(padded, place), p, len(place.kernel))


def _windows(x: Tensor, place: Window) -> Tensor:
    """Return the windows of an input that needs no padding, their elements on axes at the end."""
    sizes = zip(place.extents, place.strides, place.dilations, strict=True)
    for axis, (extent, stride, dilation) in enumerate(sizes, start=2):
        x = x.unfold(axis, extent, stride)[..., ::dilation]
    return x


def _norm(x: Tensor, p: float, axes: int, keepdim: bool = False) -> Tensor:
    """Return the norm over the last ``axes`` axes; its gradient at zero is zero, not NaN."""
    dims = list(range(-axes, 0))
    norm: Tensor = torch.linalg.vector_norm(x.to(accumulator(x)), p, dims, keepdim)
    return norm.to(x.dtype)


@op("GlobalLpPool", since=(1, 2, 22), allowed={"p": at_least(1)})
def global_lp_pool(X: Tensor, *, p: float = 2) -> Tensor:
    """Return the ``p``-norm over all spatial axes."""
    return _norm(X, p, X.ndim - 2, keepdim=True)


@op("MaxUnpool", since=(9, 11, 22), host=(2,))
def max_unpool(
    X: Tensor,
    I: Tensor,  # noqa: E741 - the name in the schema
    output_shape: Sequence[int] | None = None,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Put each value where its index in the flattened result says, and zeros elsewhere.

    Indices count in the shape of the result, as those that MaxPool returns do and as onnxruntime
    reads them. The reference implementation counts in the smallest shape that fits the attributes
    and then pads to ``output_shape``.
    """
    shape = output_shape or _unpooled(X, kernel_shape, pads, strides)
    flat = X.new_zeros(math.prod(shape))
    return flat.scatter(0, I.flatten(), X.flatten()).reshape(*shape)


def _unpooled(
    x: Tensor, kernel: Sequence[int], pads: Sequence[int] | None, strides: Sequence[int] | None
) -> list[int]:
    """Return the smallest shape that windows of ``kernel`` turn into that of ``x``."""
    place = window(x, kernel, strides, None, pads, "NOTSET")
    sizes = zip(x.shape[2:], kernel, place.strides, place.begin, place.end, strict=True)
    return [*x.shape[:2], *[(n - 1) * s + k - b - e for n, k, s, b, e in sizes]]
