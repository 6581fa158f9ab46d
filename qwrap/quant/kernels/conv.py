"""Conv as onnxruntime's QLinearConv computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.quant.kernels.accumulate import (
    Requantize,
    cut,
    largest_partial_sum,
    multiplier,
    parts_needed,
    split_bias,
)
from qwrap.quant.kernels.grid import Grid

AutoPad = Literal["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def same_pads(size: int, kernel: int, stride: int, dilation: int, upper: bool) -> tuple[int, int]:
    """Return begin and end padding of one axis for ``auto_pad`` SAME_UPPER or SAME_LOWER."""
    total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    small, large = total // 2, total - total // 2
    return (small, large) if upper else (large, small)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvGeometry:
    """The attributes of an ONNX Conv, with every default filled in."""

    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    group: int
    auto_pad: AutoPad
    kernel_shape: tuple[int, ...]

    def torch_pads(self, size: Sequence[int]) -> list[tuple[int, int]]:
        """Return (begin, end) padding for each axis of an image of this ``size``."""
        rank = len(self.strides)
        if self.auto_pad == "VALID":
            return [(0, 0)] * rank
        if self.auto_pad == "NOTSET":
            return list(zip(self.pads[:rank], self.pads[rank:], strict=True))
        upper = self.auto_pad == "SAME_UPPER"
        axes = zip(size, self.kernel_shape, self.strides, self.dilations, strict=True)
        return [same_pads(*axis, upper) for axis in axes]


@dataclass(frozen=True, slots=True, eq=False)
class QLinearConv:
    """Conv, with a following Relu or Clip that the output grid makes redundant.

    Make it with ``qlinear_conv``; call it with the node's inputs, of which only x is read.
    """

    x: Grid
    weights: tuple[Tensor, ...]
    inner_bias: Tensor | None
    geometry: ConvGeometry
    requantize: Requantize

    def __call__(self, x: Tensor, *_: Tensor) -> Tensor:
        """Return y on the output grid for x [N, C, ...] on the input grid."""
        geometry = self.geometry
        codes, padding = self._pad(self.x.codes(x).to(self.weights[0].dtype))
        convolve = _CONVOLUTIONS[len(geometry.strides)]
        chunks = cut(codes, self.weights[0].shape[1], 1) if len(self.weights) > 1 else (codes,)
        settings = (geometry.strides, padding, geometry.dilations, geometry.group)
        return self.requantize([
            convolve(c, w, self.inner_bias, *settings)
            for c, w in zip(chunks, self.weights, strict=True)
        ])

    def _pad(self, codes: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return ``codes``, padded if torch cannot do it in the convolution, and what it can."""
        pads = self.geometry.torch_pads(codes.shape[2:])
        if all(begin == end for begin, end in pads):
            return codes, tuple(begin for begin, _ in pads)
        flat = [p for pair in reversed(pads) for p in pair]
        return F.pad(codes, flat), (0,) * len(pads)


def qlinear_conv(
    x: Grid,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    y: Grid,
    *,
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    auto_pad: AutoPad = "NOTSET",
) -> QLinearConv:
    """Return Conv as onnxruntime's QLinearConv computes it.

    Args:
        x: grid of the input.
        weight: integer codes minus their zero point [C_out, C_in / group, ...], any dtype.
        weight_scale: float32 [1] or [C_out].
        bias: int32 codes [C_out] at scale ``x.scale * weight_scale``.
        y: grid of the output.
        strides: ONNX attribute, as are the following.
        pads: all begins, then all ends.
        dilations: one per spatial axis.
        group: number of groups.
        auto_pad: how pads are found where they are not given.
    """
    rank = weight.dim() - 2
    geometry = ConvGeometry(
        strides=tuple(strides or (1,) * rank),
        pads=tuple(pads or (0,) * (2 * rank)),
        dilations=tuple(dilations or (1,) * rank),
        group=group,
        auto_pad=auto_pad,
        kernel_shape=tuple(weight.shape[2:]),
    )
    parts = parts_needed(weight, x)
    wide = parts == 0 or (parts > 1 and group > 1)  # channels of groups cannot be cut
    codes = weight.to(torch.float64 if wide else torch.float32)
    chunks = (codes,) if wide else cut(codes, -(-codes.shape[1] // parts), 1)
    bias64, inside = split_bias(bias, largest_partial_sum(weight, x), parts)
    column = (-1, *(1,) * rank)
    outer = None if bias64 is None or inside else bias64.reshape(column)
    scale = multiplier(x, weight_scale, y).reshape(column)
    return QLinearConv(
        x=x,
        weights=tuple(chunks),
        inner_bias=bias64.float() if bias64 is not None and inside else None,
        geometry=geometry,
        requantize=Requantize(scale, outer, y),
    )
