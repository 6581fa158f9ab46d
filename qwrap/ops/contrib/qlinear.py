"""Quantized operators that work element by element, and pools: codes in, codes out.

Each does the float32 arithmetic of onnxruntime's kernel, in its order, so that codes are equal bit
for bit on processors with fused multiply-add (x86-64 since 2013). Scales are per tensor; a missing
zero point is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.numerics import multiply_add, round_to_codes
from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.pool import AVERAGE_POOLS, average_pool
from qwrap.ops.window import Window, torch_pads, window


def dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return the float32 values of codes with one scale."""
    offset = codes.to(torch.int32)
    offset = offset if zero_point is None else offset - zero_point.to(torch.int32).reshape(())
    return offset.float() * scale.reshape(())


def quantized(
    values: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the codes of values with one scale."""
    return round_to_codes(values / scale.reshape(()), _zero(zero_point, scale), dtype)


def _zero(zero_point: Tensor | None, like: Tensor) -> Tensor:
    """Return a zero point as a float32 number, in which all codes of 8 bits are exact."""
    if zero_point is None:
        return torch.zeros((), device=like.device)
    return zero_point.reshape(()).float()


@microsoft("QLinearAdd")
def qlinear_add(
    A: Tensor,
    A_scale: Tensor,
    A_zero_point: Tensor | None,
    B: Tensor,
    B_scale: Tensor,
    B_zero_point: Tensor | None,
    C_scale: Tensor,
    C_zero_point: Tensor | None = None,
) -> Tensor:
    """Add; the zero points go into one constant, as in onnxruntime's ``MlasQLinearAdd``."""
    ratio_a, ratio_b = ((s / C_scale).reshape(()) for s in (A_scale, B_scale))
    moved = multiply_add(
        ratio_a, _zero(A_zero_point, A_scale), ratio_b * _zero(B_zero_point, A_scale)
    )
    moved = _zero(C_zero_point, A_scale) - moved
    steps = multiply_add(A, ratio_a, multiply_add(B, ratio_b, moved))
    return round_to_codes(steps, torch.zeros_like(moved), A.dtype)


@microsoft("QLinearMul")
def qlinear_mul(
    A: Tensor,
    A_scale: Tensor,
    A_zero_point: Tensor | None,
    B: Tensor,
    B_scale: Tensor,
    B_zero_point: Tensor | None,
    C_scale: Tensor,
    C_zero_point: Tensor | None = None,
) -> Tensor:
    """Multiply; the product of integers is scaled once, as in onnxruntime's ``MlasQLinearMul``."""
    product = (A.float() - _zero(A_zero_point, A_scale)) * (
        B.float() - _zero(B_zero_point, B_scale)
    )
    ratio = (A_scale * B_scale / C_scale).reshape(())
    steps = multiply_add(product, ratio, _zero(C_zero_point, C_scale))
    return round_to_codes(steps, torch.zeros_like(ratio), A.dtype)


@microsoft("QLinearLeakyRelu")
def qlinear_leaky_relu(
    X: Tensor,
    X_scale: Tensor,
    X_zero_point: Tensor | None,
    Y_scale: Tensor,
    Y_zero_point: Tensor | None = None,
    *,
    alpha: float = 0.009999999776482582,
) -> Tensor:
    """Multiply negative values by ``alpha``."""
    values = F.leaky_relu(dequantized(X, X_scale, X_zero_point), alpha)
    return quantized(values, Y_scale, Y_zero_point, X.dtype)


@microsoft("QLinearSigmoid")
def qlinear_sigmoid(
    X: Tensor,
    X_scale: Tensor,
    X_zero_point: Tensor | None,
    Y_scale: Tensor,
    Y_zero_point: Tensor | None = None,
) -> Tensor:
    """Return the sigmoid."""
    values = torch.sigmoid(dequantized(X, X_scale, X_zero_point))
    return quantized(values, Y_scale, Y_zero_point, X.dtype)


@microsoft("QLinearWhere")
def qlinear_where(
    condition: Tensor,
    X: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    Y: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor | None,
    z_scale: Tensor,
    z_zero_point: Tensor | None = None,
) -> Tensor:
    """Choose elements of two tensors, brought to one scale."""
    pairs = ((X, x_scale, x_zero_point), (Y, y_scale, y_zero_point))
    x, y = (quantized(dequantized(*p), z_scale, z_zero_point, X.dtype) for p in pairs)
    return torch.where(condition, x, y)


@microsoft("QLinearConcat")
def qlinear_concat(Y_scale: Tensor, Y_zero_point: Tensor, *inputs: Tensor, axis: int) -> Tensor:
    """Join tensors, brought to one scale; ``inputs`` are codes, scale, zero point of each."""
    parts = zip(inputs[::3], inputs[1::3], inputs[2::3], strict=True)
    codes = [quantized(dequantized(*p), Y_scale, Y_zero_point, Y_zero_point.dtype) for p in parts]
    return torch.cat(codes, axis)


@microsoft("QLinearSoftmax")
def qlinear_softmax(
    X: Tensor,
    X_scale: Tensor,
    x_zero_point: Tensor | None,
    y_scale: Tensor,
    y_zero_point: Tensor,
    *,
    opset: int,
    axis: int = -1,
) -> Tensor:
    """Return the softmax along ``axis``, or up to opset 12 over all dimensions from it on.

    Exponentials come from a table of float32 numbers, the largest input scaled to what the sum can
    hold; one over the output's scale is rounded down to a whole number.
    """
    del x_zero_point  # a softmax does not see it
    flat = X.flatten(axis) if opset < 13 else X.movedim(axis, -1)
    steps = flat.to(torch.int32) - flat.to(torch.int32).amax(-1, keepdim=True)
    scale = X_scale.double().reshape(())
    largest = torch.log(torch.full_like(scale, torch.finfo(torch.float32).max) / flat.shape[-1])
    shift = (largest - 5.0).clamp(min=0.0) / scale
    exponentials = torch.exp((steps + shift) * scale).float()
    total = exponentials.double().sum(-1, keepdim=True).float()
    share = exponentials * torch.floor(1.0 / y_scale.reshape(())) / total
    codes = round_to_codes(share, _zero(y_zero_point, scale), X.dtype)
    return codes.reshape(X.shape) if opset < 13 else codes.movedim(-1, axis)


@microsoft("QLinearReduceMean")
def qlinear_reduce_mean(
    data: Tensor,
    data_scale: Tensor,
    data_zero_point: Tensor | None,
    reduced_scale: Tensor,
    reduced_zero_point: Tensor | None = None,
    *,
    axes: Sequence[int],
    keepdims: int,
) -> Tensor:
    """Average over axes."""
    values = dequantized(data, data_scale, data_zero_point).mean(list(axes), bool(keepdims))
    return quantized(values, reduced_scale, reduced_zero_point, data.dtype)


def _channels_first(function: Callable[[Tensor], Tensor], x: Tensor, channels_last: int) -> Tensor:
    return function(x.movedim(-1, 1)).movedim(1, -1) if channels_last else function(x)


@microsoft("QLinearGlobalAveragePool")
def qlinear_global_average_pool(
    X: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    *,
    channels_last: int = 0,
) -> Tensor:
    """Average over all spatial axes: an integer sum, scaled once."""

    def pooled(x: Tensor) -> Tensor:
        offset = x.to(torch.int32) - x_zero_point.to(torch.int32).reshape(())
        total = offset.flatten(2).sum(2, dtype=torch.int32).float()
        count = offset[0, 0].numel()
        steps = total * (x_scale / (y_scale * count)).reshape(())
        codes = round_to_codes(steps, _zero(y_zero_point, steps), X.dtype)
        return codes.reshape(*x.shape[:2], *[1] * (x.ndim - 2))

    return _channels_first(pooled, X, channels_last)


def _average_of_whole_windows(x: Tensor, place: Window, ceil_mode: int) -> Tensor:
    """Average windows with all that they cover of padding, also past it where sizes round up."""
    ends = [e + (s - 1 if ceil_mode else 0) for e, s in zip(place.end, place.strides, strict=True)]
    padded = F.pad(x, torch_pads(place.begin, ends))
    y = AVERAGE_POOLS[len(ends) - 1](padded, place.kernel, place.strides)
    sizes = zip(x.shape[2:], place.begin, place.strides, strict=True)
    for axis, (n, before, stride) in enumerate(sizes, 2):  # none starts past the last element
        y = y.narrow(axis, 0, min(y.shape[axis], -(-(n + before) // stride)))
    return y


@microsoft("QLinearAveragePool")
def qlinear_average_pool(
    X: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    channels_last: int = 0,
    count_include_pad: int = 0,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Average each window of the real values, or divide by its size (``count_include_pad``)."""

    def pooled(x: Tensor) -> Tensor:
        values = dequantized(x, x_scale, x_zero_point)
        if count_include_pad:
            place = window(values, kernel_shape, strides, None, pads, auto_pad)
            y = _average_of_whole_windows(values, place, ceil_mode)
        else:
            y = average_pool(
                values,
                kernel_shape=kernel_shape,
                auto_pad=auto_pad,
                ceil_mode=ceil_mode,
                pads=pads,
                strides=strides,
            )
        # Unlike elsewhere the zero point is added before rounding.
        steps = y / y_scale.reshape(()) + _zero(y_zero_point, y_scale)
        return round_to_codes(steps, torch.zeros_like(y_scale).reshape(()), X.dtype)

    return _channels_first(pooled, X, channels_last)
