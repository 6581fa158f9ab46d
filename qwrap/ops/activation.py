"""Activation functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.ops.limits import one_of
from qwrap.ops.registry import op

op("Relu", since=(1, 6, 13, 14))(torch.relu)
op("Sigmoid", since=(1, 6, 13))(torch.sigmoid)
op("Tanh", since=(1, 6, 13))(torch.tanh)


@op("Softplus", since=(1, 22))
def softplus(x: Tensor) -> Tensor:
    """Return ``log(1 + exp(x))``."""
    return F.softplus(x)


@op("LeakyRelu", since=(1, 6, 16))
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """Multiply negative values by ``alpha``."""
    return F.leaky_relu(x, alpha)


@op("Elu", since=(1, 6, 22))
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return ``alpha * (exp(x) - 1)`` below zero, ``x`` above."""
    return F.elu(x, alpha)


@op("Selu", since=(6, 22))
def selu(
    x: Tensor, *, alpha: float = 1.6732631921768188, gamma: float = 1.0507010221481323
) -> Tensor:
    """Return ``gamma`` times ELU."""
    return gamma * F.elu(x, alpha)


@op("Selu", since=(1,))
def selu_1(x: Tensor, *, alpha: float = 1.6732, gamma: float = 1.0507) -> Tensor:
    """Return ``gamma`` times ELU, with the shorter constants of opset 1."""
    return gamma * F.elu(x, alpha)


@op("HardSigmoid", since=(1, 6, 22))
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """Return ``alpha * x + beta`` limited to ``[0, 1]``.

    Bit-equal to onnxruntime; ``F.hardsigmoid`` differs in the last bit of a quarter of the values.
    """
    return (x * alpha + beta).clamp(0.0, 1.0)


@op("HardSwish", since=(14, 22))
def hard_swish(x: Tensor) -> Tensor:
    """Return ``x * hard_sigmoid(x)`` with slope 1/6, bit-equal to onnxruntime."""
    return x * (x * (1 / 6) + 0.5).clamp(0.0, 1.0)


@op("Gelu", since=(20,), allowed={"approximate": one_of("none", "tanh")})
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Return ``x`` times the normal distribution function, or its ``"tanh"`` approximation."""
    return F.gelu(x, approximate=approximate)


@op("Softsign", since=(1, 22))
def softsign(x: Tensor) -> Tensor:
    """Return ``x / (1 + |x|)``."""
    return x / (1 + x.abs())


@op("ThresholdedRelu", since=(10, 22))
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return ``x`` above ``alpha``, else zero."""
    return torch.where(x > alpha, x, 0)


@op("Celu", since=(12, 28))
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return ``alpha * (exp(x / alpha) - 1)`` below zero, ``x`` above."""
    return F.celu(x, alpha)


@op("Shrink", since=(9,))
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """Move values beyond ``lambd`` towards zero by ``bias``; the others become zero."""
    y = torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0))
    return y.to(x.dtype)  # integers are moved in floating point and cut


@op("Mish", since=(18, 22))
def mish(x: Tensor) -> Tensor:
    """Return ``x * tanh(softplus(x))``."""
    return F.mish(x)


@op("Swish", since=(24,))
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return ``x * sigmoid(alpha * x)``."""
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@op("SwiGLU", since=(28,))
def swiglu(a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return ``b`` gated by the Swish of ``a``."""
    return swish(a, alpha=alpha) * b


@op("PRelu", since=(7, 9, 16))
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """Multiply negative values by ``slope``, which broadcasts to ``x``."""
    if x.dtype.is_floating_point and x.ndim >= 2 and _is_per_channel(x, slope):
        return F.prelu(x, slope.flatten())
    return torch.where(x < 0, x * slope, x)


def _is_per_channel(x: Tensor, slope: Tensor) -> bool:
    """Whether ``slope`` varies along axis 1 of ``x`` only."""
    channels = slope.ndim == x.ndim - 1 and slope.shape[0] == x.shape[1]
    return slope.numel() == (slope.shape[0] if channels else 1)


@op("PRelu", since=(1, 6))
def prelu_per_channel(x: Tensor, slope: Tensor) -> Tensor:
    """Multiply negative values by ``slope``, one per channel (axis 1) or one for all."""
    return F.prelu(x, slope.flatten())


@op("Softmax", since=(13,))
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Normalise exponentials along ``axis``."""
    return torch.softmax(x, axis)


@op("LogSoftmax", since=(13,))
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Return the logarithm of the softmax along ``axis``."""
    return torch.log_softmax(x, axis)


@op("Softmax", since=(1, 11))  # up to opset 12 everything right of ``axis`` is one dimension
def softmax_flattened(x: Tensor, *, axis: int = 1) -> Tensor:
    """Normalise exponentials over all dimensions from ``axis`` on."""
    return x.flatten(axis).softmax(-1).reshape(x.shape)


@op("LogSoftmax", since=(1, 11))
def log_softmax_flattened(x: Tensor, *, axis: int = 1) -> Tensor:
    """Return the logarithm of the softmax over all dimensions from ``axis`` on."""
    return x.flatten(axis).log_softmax(-1).reshape(x.shape)


@op("Hardmax", since=(13,))
def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Return one at the first maximum along ``axis``, zero elsewhere."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


@op("Hardmax", since=(1, 11))
def hardmax_flattened(x: Tensor, *, axis: int = 1) -> Tensor:
    """Return one at the first maximum over all dimensions from ``axis`` on, zero elsewhere."""
    return hardmax(x.flatten(axis)).reshape(x.shape)
