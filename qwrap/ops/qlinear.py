"""Operators on codes: products of integers, accumulated in int32 and quantized again.

Sums of products of 8-bit integers are exact in float32 up to 2^24 and in float64 up to 2^53, where
torch has fast kernels on every device; the result then wraps as int32 does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwrap.dtypes import UINT8
from qwrap.numerics import QParams, quantize
from qwrap.ops.cast import data_type_of
from qwrap.ops.conv import conv
from qwrap.ops.quant import TYPES, dequantize_linear, quantize_as
from qwrap.ops.registry import op

LARGEST_PRODUCT = 255 * 255  # of two differences of 8-bit codes and zero points


def _work_type(terms: int) -> torch.dtype:
    """Return the float type in which a sum of ``terms`` products is exact."""
    return torch.float32 if terms * LARGEST_PRODUCT <= 2**24 else torch.float64


def _centred(codes: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``codes - zero_point``; the zero point broadcasts."""
    return codes.to(dtype) if zero_point is None else codes.to(dtype) - zero_point.to(dtype)


def _of_rows(values: Tensor | None) -> Tensor | None:
    """Return values per row so that they broadcast: ``[M]`` becomes ``[M, 1]``."""
    return values.unsqueeze(-1) if values is not None and values.ndim == 1 else values


def _to_int32(sums: Tensor) -> Tensor:
    return sums.round().to(torch.int64).to(torch.int32)


@op("MatMulInteger", since=(10,))
def matmul_integer(
    A: Tensor, B: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    """Return ``(A - a_zero_point) @ (B - b_zero_point)`` as int32."""
    work = _work_type(A.shape[-1])
    a = _centred(A, _of_rows(a_zero_point) if A.ndim > 1 else a_zero_point, work)
    return _to_int32(torch.matmul(a, _centred(B, b_zero_point, work)))


@op("ConvInteger", since=(10,), ignored=("kernel_shape",))
def conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolve ``x - x_zero_point`` with ``w - w_zero_point`` to int32; padding means zero."""
    # Off the CPU a float32 convolution may run as Winograd's or by FFT, whose sums are not exact.
    work = _work_type(w[0].numel()) if x.device.type == "cpu" else torch.float64
    if w_zero_point is not None and w_zero_point.ndim == 1:
        w_zero_point = w_zero_point.reshape(-1, *[1] * (w.ndim - 1))
    sums = conv(
        _centred(x, x_zero_point, work),
        _centred(w, w_zero_point, work),
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    )
    return _to_int32(sums)


def _requantized(sums: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return int32 ``sums`` times ``scale`` as codes of the type of the zero point.

    The product is rounded to float32 first, as in onnxruntime.
    """
    steps = sums.to(torch.float32) * scale.to(torch.float32)
    qparams = QParams(torch.ones(1, device=sums.device), zero_point.reshape(1).to(torch.int32))
    return quantize(steps, qparams, TYPES[data_type_of(zero_point)])


@op("QLinearConv", since=(10,), ignored=("kernel_shape",))
def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    B: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolve codes; the int32 bias ``B`` has scale ``x_scale * w_scale`` and zero point 0."""
    sums = conv_integer(
        x,
        w,
        x_zero_point,
        w_zero_point,
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    )
    per_channel = (-1, *[1] * (x.ndim - 2))
    if B is not None:
        sums = sums + B.reshape(per_channel)
    scale = x_scale * w_scale / y_scale
    scale = scale.reshape(per_channel) if scale.numel() > 1 else scale.reshape(())
    return _requantized(sums, scale, y_zero_point)


@op("QLinearMatMul", since=(10, 21))
def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
) -> Tensor:
    """Multiply matrices of codes; ``a`` may have a scale per row and ``b`` one per column."""
    if a.dtype.is_floating_point:  # 8-bit floats
        product = torch.matmul(_real(a, a_scale, a.ndim - 2), _real(b, b_scale, b.ndim - 1))
        return quantize_as(product, y_scale, None, data_type_of(y_zero_point))
    sums = matmul_integer(a, b, a_zero_point, b_zero_point)
    rows = _of_rows(a_scale.float()) if a.ndim > 1 else a_scale.float()
    assert rows is not None
    return _requantized(sums, rows * b_scale.float() / y_scale.float(), y_zero_point)


def _real(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    return dequantize_linear(codes, scale.float(), axis=axis)


@op("DynamicQuantizeLinear", since=(11,))
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 codes spread over the range of ``x`` and 0, their scale and zero point."""
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = (high - low) / torch.full_like(high, UINT8.qmax)
    scale = torch.where(high == low, torch.ones_like(scale), scale)
    zero_point = (-low / scale).detach().clamp(UINT8.qmin, UINT8.qmax).round()
    qparams = QParams(scale.detach().reshape(1), zero_point.reshape(1).to(torch.int32))
    return (
        quantize(x.detach(), qparams, TYPES[UINT8.onnx_type]),
        scale,
        zero_point.to(torch.uint8),
    )
