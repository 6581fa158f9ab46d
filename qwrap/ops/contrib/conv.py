"""Convolutions and pools with fused activations, channels last, or computed padding."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qwrap.ops.contrib.activation import FUSED, activate
from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.conv import conv, conv_transpose
from qwrap.ops.pool import max_pool


@microsoft("FusedConv", ignored=("kernel_shape",), allowed={"activation": FUSED})
def fused_conv(
    X: Tensor,
    W: Tensor,
    B: Tensor | None = None,
    Z: Tensor | None = None,
    *,
    activation: str | None = None,
    activation_params: Sequence[float] | None = None,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Return an activation of ``conv(X, W, B) + Z``."""
    y = conv(
        X,
        W,
        B,
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    )
    return activate(y if Z is None else y + Z, activation, *(activation_params or ()))


@microsoft("NhwcConv", ignored=("kernel_shape",))
def nhwc_conv(
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
    """Convolve ``X`` ``[N, ..., C]`` with ``W`` ``[M, C / group, ...]``."""
    return nhwc_fused_conv(
        X,
        W,
        B,
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    )


@microsoft("NhwcFusedConv", ignored=("kernel_shape",), allowed={"activation": FUSED})
def nhwc_fused_conv(
    X: Tensor,
    W: Tensor,
    B: Tensor | None = None,
    Z: Tensor | None = None,
    *,
    activation: str | None = None,
    activation_params: Sequence[float] | None = None,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Return an activation of ``conv(X, W, B) + Z``; channels are last in X, Z and the result."""
    y = fused_conv(
        X.movedim(-1, 1),
        W,
        B,
        None if Z is None else Z.movedim(-1, 1),
        activation=activation,
        activation_params=activation_params,
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    )
    return y.movedim(1, -1)


@microsoft("NhwcMaxPool")
def nhwc_max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Return the largest value in each window of ``x`` ``[N, ..., C]``."""
    y = max_pool(
        x.movedim(-1, 1),
        kernel_shape=kernel_shape,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
        dilations=dilations,
        pads=pads,
        strides=strides,
    )
    return y.movedim(1, -1)


@microsoft("ConvTransposeWithDynamicPads", host=(2,), ignored=("kernel_shape",))
def conv_transpose_with_dynamic_pads(
    X: Tensor,
    W: Tensor,
    Pads: Sequence[int] | None = None,
    B: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    output_padding: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Apply ConvTranspose with the padding of an input."""
    return conv_transpose(
        X,
        W,
        B,
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        output_padding=output_padding,
        pads=Pads,
        strides=strides,
    )
