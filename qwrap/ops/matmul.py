"""Matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from qwrap.ops.registry import op

op("MatMul", since=(1, 9, 13))(torch.matmul)


@op("Gemm", since=(1, 6, 7, 9, 11, 13), ignored=("broadcast",))
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """Return ``alpha * a @ b + beta * c``; ``c`` broadcasts to the product."""
    a = a.t() if transA else a
    b = b.t() if transB else b
    if not a.dtype.is_floating_point:  # torch takes no fractions there; nor does onnxruntime
        alpha, beta = int(alpha), int(beta)
    if c is not None:
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)
    return torch.mm(a, b) if alpha == 1 else alpha * torch.mm(a, b)
