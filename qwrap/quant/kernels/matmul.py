"""MatMul and Gemm as onnxruntime's QLinearMatMul, QGemm and MatMulIntegerToFloat compute them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qwrap.quant.kernels.accumulate import (
    EXACT,
    Requantize,
    cut,
    largest_partial_sum,
    multiplier,
    parts_needed,
    split_bias,
)
from qwrap.quant.kernels.grid import Grid


@dataclass(frozen=True, slots=True, eq=False)
class QLinearMatMul:
    """MatMul or Gemm by constant weights.

    Make it with ``qlinear_matmul`` or ``qgemm``; call it with the node's inputs, of which only the
    first is read.
    """

    x: Grid
    weights: tuple[Tensor, ...]
    inner_bias: Tensor | None
    transpose: bool
    requantize: Requantize

    def __call__(self, x: Tensor, *_: Tensor) -> Tensor:
        """Return y for x [..., K] (Gemm with transA: [K, M]) on the input grid."""
        codes = self.x.codes(x)
        if self.transpose:
            codes = codes.T
        if len(self.weights) == 1:
            return self.requantize([_product(codes, self.weights[0], self.inner_bias)])
        chunks = cut(codes, self.weights[0].shape[-2], -1)
        return self.requantize([c @ w for c, w in zip(chunks, self.weights, strict=True)])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else (x @ weight).add_(bias)


def qlinear_matmul(x: Grid, weight: Tensor, weight_scale: Tensor, y: Grid | None) -> QLinearMatMul:
    """Return MatMul by constant weights as QLinearMatMul or MatMulIntegerToFloat computes it.

    Args:
        x: grid of the input.
        weight: integer codes minus their zero point [..., K, N].
        weight_scale: float32 [1] or [N].
        y: grid of the output; None for a float output.
    """
    return qgemm(x, weight, weight_scale, None, y)


def qgemm(
    x: Grid,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    y: Grid | None,
    *,
    transA: int = 0,  # noqa: N803 -- ONNX's name
    transB: int = 0,  # noqa: N803
) -> QLinearMatMul:
    """Return Gemm by constant weights, alpha and beta 1, as onnxruntime's QGemm computes it.

    Args:
        x: grid of the input.
        weight: integer codes minus their zero point [K, N], with transB [N, K].
        weight_scale: float32 [1] or [N].
        bias: int32 codes [N] (or [M, N]) at scale ``x.scale * weight_scale``.
        y: grid of the output; None for a float output.
        transA: whether x is [K, M].
        transB: whether weight is [N, K].
    """
    codes = weight.mT if transB else weight
    rows = codes.mT.flatten(0, -2)
    parts = parts_needed(rows, x)
    cuts = cut(codes.float(), -(-codes.shape[-2] // parts), -2)
    bias64, inside = split_bias(bias, largest_partial_sum(rows, x).max(), parts)
    return QLinearMatMul(
        x=x,
        weights=tuple(c.contiguous() for c in cuts),
        inner_bias=bias64.float() if bias64 is not None and inside else None,
        transpose=bool(transA),
        requantize=Requantize(multiplier(x, weight_scale, y), None if inside else bias64, y),
    )


@dataclass(frozen=True, slots=True, eq=False)
class ActivationMatMul:
    """MatMul of two activations.

    Attributes:
        a: grid of the first input.
        b: grid of the second.
        y: grid of the output; None for a float output.
    """

    a: Grid
    b: Grid
    y: Grid | None

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a @ b``, both on their grids, on the output grid."""
        largest = max(-self.a.low, self.a.high) * max(-self.b.low, self.b.high)
        length = (EXACT - 1) // largest
        left = cut(self.a.codes(a), length, -1)
        right = cut(self.b.codes(b), length, -2 if b.dim() > 1 else -1)
        requantize = Requantize(multiplier(self.a, self.b.scale, self.y), None, self.y)
        return requantize([p @ q for p, q in zip(left, right, strict=True)])
