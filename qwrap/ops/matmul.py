"""Matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from qwrap.ops.registry import op

LIMB = 16  # bits; a product of two limbs has 32, and float64 sums 2^21 of those exactly


@op("MatMul", since=(1, 9, 13))
def matmul(A: Tensor, B: Tensor) -> Tensor:
    """Multiply matrices as ``numpy.matmul`` does; integers wrap."""
    if A.dtype.is_floating_point or A.device.type == "cpu":
        return torch.matmul(A, B)
    return matmul_in_limbs(A, B)


def matmul_in_limbs(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of integers where torch has no kernel for them: from products in float64.

    Schoolbook multiplication in pieces of 16 bits, without those whose product leaves the type.
    """
    count = a.itemsize * 8 // LIMB
    lefts, rights = _limbs(a, count), _limbs(b, count)
    total: Tensor | None = None
    for i, left in enumerate(lefts):
        for j, right in enumerate(rights[: count - i]):
            part = torch.matmul(left, right).to(torch.int64) << LIMB * (i + j)
            total = part if total is None else total + part
    assert total is not None, "ONNX multiplies integers of 32 and 64 bits only"
    return total.to(a.dtype)


def _limbs(x: Tensor, count: int) -> list[Tensor]:
    """Cut integers into ``count`` unsigned pieces, the lowest first, as float64."""
    return [(x.to(torch.int64) >> LIMB * i & 2**LIMB - 1).double() for i in range(count)]


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
        product = int(alpha) * matmul(a, b)
        return product if c is None else product + int(beta) * c
    if c is not None:
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)
    return torch.mm(a, b) if alpha == 1 else alpha * torch.mm(a, b)
