"""Products of quantized matrices and convolutions, added up exactly and scaled once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwrap.numerics import round_to_codes
from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.qlinear import dynamic_quantize_linear, matmul_integer, qlinear_conv


@microsoft("MatMulInteger16")
def matmul_integer_16(A: Tensor, B: Tensor) -> Tensor:
    """Multiply matrices of 16-bit integers; products of unsigned ones are uint32."""
    unsigned = A.dtype == B.dtype == torch.uint16
    product = torch.matmul(A.double(), B.double()).to(torch.int64)
    return product.to(torch.uint32 if unsigned else torch.int32)


@microsoft("MulInteger")
def mul_integer(
    A: Tensor,
    A_zero_point: Tensor | None,
    B: Tensor,
    B_zero_point: Tensor | None = None,
) -> Tensor:
    """Multiply codes less their zero points, as int32."""
    a = A.to(torch.int32) - (0 if A_zero_point is None else A_zero_point.to(torch.int32))
    return a * (B.to(torch.int32) - (0 if B_zero_point is None else B_zero_point.to(torch.int32)))


@microsoft("ReduceSumInteger")
def reduce_sum_integer(data: Tensor, *, axes: Sequence[int], keepdims: int) -> Tensor:
    """Add up codes over axes; sums of unsigned ones are uint32."""
    total = data.to(torch.int32).sum(list(axes), bool(keepdims), dtype=torch.int32)
    return total.to(torch.uint32) if data.dtype == torch.uint8 else total


@microsoft("MatMulIntegerToFloat")
def matmul_integer_to_float(
    A: Tensor,
    B: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return ``(A - a_zero_point) @ (B - b_zero_point)``, scaled, plus ``bias``."""
    product = matmul_integer(A, B, a_zero_point, b_zero_point).float()
    y = product * (a_scale.float() * b_scale.float())
    return (y if bias is None else y + bias).to(a_scale.dtype)


@microsoft("DynamicQuantizeMatMul")
def dynamic_quantize_matmul(
    A: Tensor,
    B: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Quantize ``A`` by its own range, multiply with codes, return real values.

    Gradients pass through the rounding as if it were not there.
    """
    codes, scale, zero_point = dynamic_quantize_linear(A.detach())
    y = matmul_integer_to_float(codes, B, scale, b_scale, zero_point, b_zero_point, bias)
    if not (torch.is_grad_enabled() and A.requires_grad):
        return y
    weight = B.to(A.dtype) if b_zero_point is None else B.to(A.dtype) - b_zero_point
    return y + torch.matmul(A - A.detach(), weight * b_scale)


@microsoft("QGemm")
def qgemm(
    A: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    B: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    C: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """Return ``alpha * A @ B + C`` as codes, or as real values without ``y_zero_point``.

    ``C`` has the scale of the product before ``alpha``.
    """
    a, b = A.t() if transA else A, B.t() if transB else B
    total = matmul_integer(a, b, a_zero_point, b_zero_point)
    total = (total if C is None else total + C).float()
    scale = alpha * a_scale.reshape(()) * b_scale
    scale = scale if y_scale is None else scale / y_scale.reshape(())
    if y_zero_point is None:
        return total * scale
    return round_to_codes(total * scale, y_zero_point.reshape(()).float(), y_zero_point.dtype)


@microsoft("QLinearConv", ignored=("kernel_shape",))
def qlinear_conv_of_either_layout(
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
    channels_last: int = 0,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolve codes; padding stands for 0.0.

    With ``channels_last`` ``x`` and ``y`` are ``[N, ..., C]``; ``w`` is ``[M, C / group, ...]``.
    """
    y = qlinear_conv(
        x.movedim(-1, 1) if channels_last else x,
        x_scale,
        x_zero_point,
        w,
        w_scale,
        w_zero_point,
        y_scale,
        y_zero_point,
        B,
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    )
    return y.movedim(1, -1) if channels_last else y
