"""Convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import ModelError, UnsupportedOpError
from qwrap.ops.limits import at_least
from qwrap.ops.registry import op
from qwrap.ops.window import split_padding, torch_pads, window

CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
TRANSPOSED: tuple[Callable[..., Tensor], ...] = (
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
)


def _for_rank(functions: tuple[Callable[..., Tensor], ...], rank: int) -> Callable[..., Tensor]:
    if not 1 <= rank <= len(functions):
        raise UnsupportedOpError(f"convolution over {rank} spatial axes; torch has 1 to 3")
    return functions[rank - 1]


def check_padding(
    *, auto_pad: str = "NOTSET", pads: Sequence[int] | None = None, **others: object
) -> None:
    """Refuse paddings that another attribute says to ignore."""
    del others
    if auto_pad not in ("", "NOTSET") and pads and any(pads):
        raise ModelError(f"auto_pad={auto_pad!r} with pads={list(pads)}; only one can be followed")


@op("Conv", since=(1, 11, 22), ignored=("kernel_shape",), check=check_padding)
def conv(
    X: Tensor,
    W: Tensor,
    B: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolve ``X`` ``[N, C, ...]`` with ``W`` ``[M, C / group, ...]``."""
    rank = W.ndim - 2
    function = _for_rank(CONVOLUTIONS, rank)
    step, dilation = strides or 1, dilations or 1
    if auto_pad == "NOTSET":
        if not pads:
            return function(X, W, B, step, 0, dilation, group)
        if pads[:rank] == pads[rank:] and min(pads) >= 0:
            return function(X, W, B, step, pads[:rank], dilation, group)
    place = window(X, W.shape[2:], strides, dilations, pads, auto_pad)
    if place.symmetric:
        return function(X, W, B, step, place.begin, dilation, group)
    padded = F.pad(X, torch_pads(place.begin, place.end))
    return function(padded, W, B, step, 0, dilation, group)


@op(
    "ConvTranspose",
    since=(1, 11, 22),
    ignored=("kernel_shape",),
    allowed={"output_shape": at_least(1)},
    check=check_padding,
)
def conv_transpose(
    X: Tensor,
    W: Tensor,
    B: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Transpose of the convolution with ``W`` ``[C, M / group, ...]``, applied to ``X``."""
    rank = W.ndim - 2
    function = _for_rank(TRANSPOSED, rank)
    step = tuple(strides) if strides else (1,) * rank
    dilation = tuple(dilations) if dilations else (1,) * rank
    extra = tuple(output_padding) if output_padding else (0,) * rank
    full = [
        (n - 1) * s + p + (k - 1) * d + 1
        for n, s, p, k, d in zip(X.shape[2:], step, extra, W.shape[2:], dilation, strict=True)
    ]
    whole = [n * s for n, s in zip(X.shape[2:], step, strict=True)]
    begin, end = transposed_cut(full, whole, pads, auto_pad, output_shape)
    if begin == end and min(begin) >= 0:
        return function(X, W, B, step, begin, extra, group, dilation)
    y = function(X, W, None, step, 0, extra, group, dilation)
    y = F.pad(y, torch_pads([-p for p in begin], [-p for p in end]))
    return y if B is None else y + B.reshape(-1, *[1] * rank)


def transposed_cut(
    full: Sequence[int],
    whole: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
    output_shape: Sequence[int] | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how much a ConvTranspose cuts from both ends of all that it computes.

    Args:
        full: size of each spatial axis before.
        whole: size of the input times the stride, which SAME_UPPER and SAME_LOWER want.
        pads: as the attribute.
        auto_pad: as the attribute.
        output_shape: as the attribute.
    """
    rank = len(full)
    if output_shape or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        return _cut(full, (output_shape or whole)[-rank:], auto_pad, bool(output_shape))
    return (tuple(pads[:rank]), tuple(pads[rank:])) if pads else ((0,) * rank, (0,) * rank)


def _cut(
    full: Sequence[int], wanted: Sequence[int], auto_pad: str, exactly: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how much to cut from both ends of ``full``.

    Where less than ``wanted`` is there, nothing is cut, as in onnxruntime; what is missing is
    added at the end if ``wanted`` was asked for ``exactly``.
    """
    totals = [max(f - w, 0) for f, w in zip(full, wanted, strict=True)]
    # Unlike in Conv, without SAME_UPPER the odd element goes before.
    begin, end = split_padding(totals, "SAME_UPPER" if auto_pad == "SAME_UPPER" else "SAME_LOWER")
    if exactly:
        end = tuple(f - w - b for f, w, b in zip(full, wanted, begin, strict=True))
    return begin, end
