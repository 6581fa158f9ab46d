"""Convolution at positions that the data moves, and the sum of overlapping blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qwrap.errors import InputError, UnsupportedOpError
from qwrap.ops.precision import accumulator
from qwrap.ops.registry import op
from qwrap.ops.window import window


@op("DeformConv", since=(19, 22), ignored=("kernel_shape",))
def deform_conv(
    X: Tensor,
    W: Tensor,
    offset: Tensor,
    B: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    offset_group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolve ``X`` at positions moved by ``offset``, each weighed by ``mask``.

    Args:
        X: ``[N, C, ...]``; interpolated linearly, zero outside.
        W: ``[M, C / group, ...]``.
        offset: ``[N, offset_group * elements of the kernel * axes, ...]``, in pixels.
        mask: ``[N, offset_group * elements of the kernel, ...]``.

    Source: Zhu et al., arXiv:1811.11168 (deformable convolution, version 2).
    """
    wide = accumulator(X)
    kernel, out = W.shape[2:], offset.shape[2:]
    rank, taps = len(kernel), math.prod(kernel)
    if X.shape[1] % offset_group:
        raise UnsupportedOpError(
            f"DeformConv of {X.shape[1]} channels in {offset_group} groups of offsets"
        )
    place = window(X, kernel, strides, dilations, pads, "NOTSET")
    sizes = zip(X.shape[2:], place.extents, place.strides, place.begin, place.end, strict=True)
    wanted = [(n + b + e - extent) // stride + 1 for n, extent, stride, b, e in sizes]
    if list(out) != wanted:
        raise InputError(f"DeformConv: offsets for {list(out)} places, but there are {wanted}")
    begin = place.begin
    at = _taps(kernel, out, strides or [1] * rank, dilations or [1] * rank, begin, offset.device)
    moved = offset.to(wide).reshape(-1, offset_group, taps, rank, math.prod(out))
    positions = [x + a.to(wide) for x, a in zip(moved.unbind(3), at, strict=True)]
    image = X.to(wide).reshape(X.shape[0], offset_group, -1, *X.shape[2:])
    columns = _interpolated(image, positions)
    if mask is not None:
        columns = columns * mask.to(wide).reshape(-1, offset_group, 1, taps, math.prod(out))
    columns = columns.reshape(X.shape[0], group, -1, math.prod(out))
    weight = W.to(wide).reshape(group, W.shape[0] // group, -1)
    y = (weight @ columns).reshape(X.shape[0], W.shape[0], *out)
    if B is not None:
        y = y + B.to(wide).reshape(-1, *[1] * rank)
    return y.to(X.dtype)


def _taps(
    kernel: Sequence[int],
    out: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    begin: Sequence[int],
    device: torch.device,
) -> list[Tensor]:
    """Return where each element of a kernel lies along each axis, ``[taps, positions]``."""
    axes = []
    rank = len(kernel)
    sizes = zip(kernel, out, strides, dilations, begin, strict=True)
    for axis, (k, n, stride, dilation, before) in enumerate(sizes):
        tap = torch.arange(k, device=device) * dilation - before
        place = torch.arange(n, device=device) * stride
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = k, n
        along = (tap.unsqueeze(1) + place).reshape(shape)
        axes.append(along.expand(*kernel, *out).reshape(math.prod(kernel), -1))
    return axes


def _interpolated(image: Tensor, positions: Sequence[Tensor]) -> Tensor:
    """Return the image at ``positions``, zero outside.

    Args:
        image: ``[N, groups, C, ...]``.
        positions: ``[N, groups, taps, places]`` for each axis.

    Returns:
        ``[N, groups, C, taps, places]``.
    """
    flat = image.flatten(3)
    low = [x.detach().floor() for x in positions]
    total: Tensor | None = None
    for corner in itertools.product((0, 1), repeat=len(low)):
        at = [x + step for x, step in zip(low, corner, strict=True)]
        index, weight = _flat_index(at, image.shape[3:])
        for x, a in zip(positions, at, strict=True):
            weight = weight * (1 - (x - a).abs())
        picked = flat.gather(3, index.flatten(2).unsqueeze(2).expand(*flat.shape[:3], -1))
        term = picked.reshape(*flat.shape[:3], *index.shape[2:]) * weight.unsqueeze(2)
        total = term if total is None else total + term
    assert total is not None
    return total


def _flat_index(at: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return indices into the flattened axes, and whether the positions exist."""
    index = torch.zeros_like(at[0], dtype=torch.int64)
    inside = torch.ones_like(index, dtype=torch.bool)
    for along, n in zip(at, sizes, strict=True):
        inside = inside & (along >= 0) & (along <= n - 1)
        index = index * n + along.clamp(0, n - 1).long()
    return index, inside


@op("Col2Im", since=(18,), host=(1, 2))
def col2im(
    input: Tensor,
    image_shape: Sequence[int],
    block_shape: Sequence[int],
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Add up blocks, ``[N, C * elements of a block, blocks]``, where they overlap in the image.

    onnxruntime's sums are wrong for dilated blocks of other than two axes; these are right.
    """
    rank = len(image_shape)
    begin, end = ([0] * rank,) * 2 if not pads else (list(pads[:rank]), list(pads[rank:]))
    step, spread = strides or [1] * rank, dilations or [1] * rank
    padded = [n + b + e for n, b, e in zip(image_shape, begin, end, strict=True)]
    sizes = zip(padded, block_shape, step, spread, strict=True)
    counts = [(n - (k - 1) * d - 1) // s + 1 for n, k, s, d in sizes]
    if input.shape[2] != math.prod(counts):
        raise InputError(f"Col2Im: {input.shape[2]} blocks, but there is room for {counts}")
    at = _taps(block_shape, counts, step, spread, begin, input.device)
    index, inside = _flat_index(at, image_shape)
    blocks = input.reshape(input.shape[0], -1, *index.shape)
    blocks = torch.where(inside, blocks, 0).flatten(2)
    image = blocks.new_zeros(*blocks.shape[:2], math.prod(image_shape))
    return image.index_add(2, index.flatten(), blocks).reshape(*blocks.shape[:2], *image_shape)
