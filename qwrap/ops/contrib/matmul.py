"""Matrix products with what is fused into them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.ops.contrib.activation import FUSED, activate
from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.matmul import gemm


def _operand(x: Tensor, transposed: int, batch_transposed: int) -> Tensor:
    """Return the operand ``[..., rows, columns]`` that the attributes make of ``x``."""
    if x.ndim < 2:  # onnxruntime transposes no vectors
        return x
    if batch_transposed:
        x = x.movedim(0, -2)
    return x.transpose(-1, -2) if transposed else x


@microsoft("FusedMatMul")
def fused_matmul(
    A: Tensor,
    B: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """Return ``alpha * A @ B``.

    ``transBatchA`` moves the first axis of A behind its other batch axes, before ``transA`` swaps
    the last two; likewise for B.
    """
    y = torch.matmul(_operand(A, transA, transBatchA), _operand(B, transB, transBatchB))
    return y if alpha == 1 else alpha * y


@microsoft("TransposeMatMul")
def transpose_matmul(
    A: Tensor, B: Tensor, *, alpha: float = 1.0, transA: int = 0, transB: int = 0
) -> Tensor:
    """Return ``alpha * A @ B``; the older name of FusedMatMul."""
    return fused_matmul(A, B, alpha=alpha, transA=transA, transB=transB)


@microsoft("FusedMatMulActivation", ignored=("activation_axis",), allowed={"activation": FUSED})
def fused_matmul_activation(
    A: Tensor,
    B: Tensor,
    *,
    activation: str,
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """Return an activation of FusedMatMul."""
    y = fused_matmul(
        A,
        B,
        alpha=alpha,
        transA=transA,
        transB=transB,
        transBatchA=transBatchA,
        transBatchB=transBatchB,
    )
    return activate(y, activation, activation_alpha, activation_beta, activation_gamma)


@microsoft("FusedGemm", allowed={"activation": FUSED})
def fused_gemm(
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    *,
    activation: str | None = None,
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """Return an activation of Gemm."""
    y = gemm(A, B, C, alpha=alpha, beta=beta, transA=transA, transB=transB)
    return activate(y, activation, activation_alpha, activation_beta, activation_gamma)


@microsoft("GemmFastGelu")
def gemm_fast_gelu(X: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the tanh approximation of GELU of ``X @ W + bias``."""
    y = torch.matmul(X, W)
    return F.gelu(y if bias is None else y + bias, approximate="tanh")
