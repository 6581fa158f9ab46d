"""Activation functions, alone and with what is added before them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.limits import one_of

# Name -> function of (x, alpha, beta, gamma) and the defaults of the three.
ACTIVATIONS: dict[
    str, tuple[Callable[[Tensor, float, float, float], Tensor], tuple[float, float, float]]
] = {
    "Relu": (lambda x, _a, _b, _c: torch.relu(x), (0.0, 0.0, 0.0)),
    "Tanh": (lambda x, _a, _b, _c: torch.tanh(x), (0.0, 0.0, 0.0)),
    "Sigmoid": (lambda x, _a, _b, _c: torch.sigmoid(x), (0.0, 0.0, 0.0)),
    "Softplus": (lambda x, _a, _b, _c: F.softplus(x), (0.0, 0.0, 0.0)),
    "Softsign": (lambda x, _a, _b, _c: F.softsign(x), (0.0, 0.0, 0.0)),
    "LeakyRelu": (lambda x, a, _b, _c: F.leaky_relu(x, a), (0.01, 0.0, 0.0)),
    "Elu": (lambda x, a, _b, _c: F.elu(x, a), (1.0, 0.0, 0.0)),
    "Celu": (lambda x, a, _b, _c: F.celu(x, a), (1.0, 0.0, 0.0)),
    "ThresholdedRelu": (lambda x, a, _b, _c: torch.where(x > a, x, 0.0), (1.0, 0.0, 0.0)),
    "HardSigmoid": (lambda x, a, b, _c: (a * x + b).clamp(0.0, 1.0), (0.2, 0.5, 0.0)),
    "Clip": (lambda x, a, b, _c: x.clamp(a, b), (-3.4028234663852886e38, 3.4028234663852886e38, 0)),
    "Selu": (
        lambda x, a, _b, c: c * F.elu(x, a),
        (1.6732631921768188, 0.0, 1.0507010221481323),
    ),
}

FUSED = one_of("", *ACTIVATIONS)
"""What the attribute ``activation`` of a fused operator may name."""


def activate(
    x: Tensor,
    name: str | None,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
) -> Tensor:
    """Apply the activation that a fused operator names, see ``FUSED``; None and "" mean none."""
    if not name:
        return x
    function, defaults = ACTIVATIONS[name]
    given = (alpha, beta, gamma)
    a, b, c = (d if v is None else v for v, d in zip(given, defaults, strict=True))
    return function(x, a, b, c)


@microsoft("Gelu")
def gelu(X: Tensor) -> Tensor:
    """Return ``X`` times the normal distribution function."""
    return F.gelu(X)


@microsoft("BiasGelu")
def bias_gelu(A: Tensor, B: Tensor) -> Tensor:
    """Return GELU of the sum; ``B`` runs along the last axis."""
    return F.gelu(A + B)


@microsoft("FastGelu")
def fast_gelu(X: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the tanh approximation of GELU of ``X + bias``."""
    return F.gelu(X if bias is None else X + bias, approximate="tanh")


@microsoft("QuickGelu")
def quick_gelu(X: Tensor, *, alpha: float = 1.7020000219345093) -> Tensor:
    """Return ``X * sigmoid(alpha * X)``."""
    return X * torch.sigmoid(alpha * X)


@microsoft("ScaledSiLU")
def scaled_silu(X: Tensor, scale: Tensor | None = None, *, alpha: float = 1.0) -> Tensor:
    """Return SiLU of ``X`` times a number, every step rounded to the type of ``X``."""
    z = alpha * X if scale is None else (scale.float() * X.float()).to(X.dtype)
    return z * torch.sigmoid(z)


@microsoft("GatedAdd")
def gated_add(X: Tensor, Y: Tensor, gate: Tensor) -> Tensor:
    """Return ``X + Y * gate``, the product rounded to its type first."""
    return X + Y * gate


@microsoft("BiasAdd")
def bias_add(X: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """Add a bias along the last axis and a residual."""
    return X + bias + skip


@microsoft("BiasSplitGelu")
def bias_split_gelu(X: Tensor, bias: Tensor) -> Tensor:
    """Return the left half of ``X + bias`` along the last axis times GELU of the right half."""
    left, right = (X + bias).chunk(2, -1)
    return left * F.gelu(right)


@microsoft("BiasSoftmax", ignored=("is_inner_broadcast",))
def bias_softmax(data: Tensor, bias: Tensor, *, axis: int = 1) -> Tensor:
    """Return the softmax of ``data + bias`` over all dimensions from ``axis`` on.

    ``is_inner_broadcast`` tells a kernel which dimensions of ``bias`` are 1; its shape says it too.
    """
    total = data + bias
    return total.flatten(axis).softmax(-1).reshape(total.shape)


@microsoft("BiasDropout", host=(3, 4), ignored=("seed",))
def bias_dropout(
    data: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    ratio: float | None = None,
    training_mode: bool | None = None,
    *,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Return ``dropout(data + bias) + residual`` and the mask of what was kept.

    The random numbers are torch's; the attribute ``seed`` fixes them in no other runtime either.
    """
    y, mask = _dropped(data + bias, ratio, training_mode)
    return (y if residual is None else y + residual, mask)[:output_count]


def _dropped(x: Tensor, ratio: float | None, training_mode: bool | None) -> tuple[Tensor, Tensor]:
    ratio = 0.5 if ratio is None else ratio
    if not training_mode or ratio == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    mask = torch.rand_like(x) >= ratio
    return x * mask / (1 - ratio), mask
