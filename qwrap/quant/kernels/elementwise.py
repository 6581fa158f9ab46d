"""Elementwise operators as onnxruntime computes them on 8-bit codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwrap.quant.kernels.grid import Grid


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return float32 ``a * b + c`` rounded once; the product of two float32 is exact in float64."""
    return (a.double() * b.double() + c.double()).float()


def _one_value_per_span(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether broadcasting repeats one value of ``shape`` along the innermost axis."""
    rank = max(len(shape), len(other))
    a, b = ((1,) * (rank - len(s)) + tuple(s) for s in (shape, other))
    inner = [(m, n) for m, n in zip(a, b, strict=True) if (m, n) != (1, 1)]
    return not inner or inner[-1][0] == 1


@dataclass(frozen=True, slots=True, eq=False)
class QLinearAdd:
    """Add of two activations; make it with ``qlinear_add``.

    onnxruntime rounds twice, in fused multiply-adds whose order depends on how the operands
    broadcast. All 2^16 results are computed when the kernel is made: looking them up is faster than
    emulating the fused operation in float64.

    Attributes:
        a: grid of the first input.
        b: grid of the second.
        results: output values for (a, b) of every pair of codes, float32 [65536].
        results_spans: the same where one value of ``a`` meets a span of values of ``b``.
    """

    a: Grid
    b: Grid
    results: Tensor
    results_spans: Tensor

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a + b``, both on their grids, on the output grid."""
        spans = _one_value_per_span(a.shape, b.shape)
        index = self.a.codes(a).sub_(self.a.low).mul_(256) + self.b.codes(b).sub_(self.b.low)
        table = self.results_spans if spans else self.results
        return table.index_select(0, index.to(torch.int32).flatten()).view(index.shape)


def qlinear_add(a: Grid, b: Grid, y: Grid) -> QLinearAdd:
    """Return Add as QLinearAdd computes it, for inputs on grids ``a`` and ``b``."""
    ratio_a, ratio_b = a.scale / y.scale, b.scale / y.scale
    zero_a, zero_b, zero_y = (torch.full_like(a.scale, g.zero_point_u8) for g in (a, b, y))
    fixed = zero_y - fma(ratio_a, zero_a, ratio_b * zero_b)
    codes_a = (a.codes_table() + a.zero_point_u8)[:, None]
    codes_b = b.codes_table() + b.zero_point_u8
    general = fma(codes_a, ratio_a, fma(codes_b, ratio_b, fixed))
    spans = fma(codes_b, ratio_b, fma(codes_a, ratio_a, fixed))
    return QLinearAdd(a, b, *(y.from_shifted_steps(t).flatten() for t in (general, spans)))


@dataclass(frozen=True, slots=True, eq=False)
class QLinearMul:
    """Mul of two activations.

    Attributes:
        a: grid of the first input.
        b: grid of the second.
        y: grid of the output.
    """

    a: Grid
    b: Grid
    y: Grid

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a * b``, both on their grids, on the output grid."""
        product = self.a.codes(a) * self.b.codes(b)
        product.mul_(self.a.scale * self.b.scale / self.y.scale)
        return self.y.from_shifted_steps(product.add_(self.y.zero_point_u8))


@dataclass(frozen=True, slots=True, eq=False)
class LookUp:
    """A function of one activation, tabulated over its 256 codes.

    Attributes:
        x: grid of the input.
        values: output values by code of x, float32 [256].
    """

    x: Grid
    values: Tensor

    def __call__(self, x: Tensor, *_: Tensor) -> Tensor:
        """Return the function of x, which lies on its grid, on the output grid."""
        index = self.x.codes(x).sub_(self.x.low).to(torch.int32)
        return self.values.index_select(0, index.flatten()).view(index.shape)


def look_up(x: Grid, y: Grid, function: Callable[[Tensor], Tensor]) -> LookUp:
    """Return ``function``, of float32 values, on the codes of ``x``, rounded to ``y``."""
    return LookUp(x, y.quantize(function(x.table())))


def qlinear_leaky_relu(x: Grid, y: Grid, alpha: float = 0.01) -> LookUp:
    """Return LeakyRelu as QLinearLeakyRelu computes it."""
    slope = x.scale.new_tensor(alpha)
    return look_up(x, y, lambda v: torch.where(v >= 0, v, v * slope))


def qlinear_sigmoid(x: Grid, y: Grid) -> LookUp:
    """Return Sigmoid as QLinearSigmoid computes it, up to onnxruntime's approximation of exp.

    The approximation errs by about 1e-7, so a code in some 10^4 table entries may differ by one.
    """
    return look_up(x, y, lambda v: v.double().sigmoid().float())


@dataclass(frozen=True, slots=True, eq=False)
class QLinearConcat:
    """Concat of activations that may lie on different grids.

    Attributes:
        y: grid of the output.
        axis: the axis to join along.
    """

    y: Grid
    axis: int

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return ``inputs`` joined and rounded to the output grid."""
        return self.y.quantize(torch.cat(inputs, self.axis))


@dataclass(frozen=True, slots=True, eq=False)
class QLinearWhere:
    """Where of two activations that may lie on different grids.

    Attributes:
        y: grid of the output.
    """

    y: Grid

    def __call__(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return x where ``condition`` is true, else y, rounded to the output grid."""
        return self.y.quantize(torch.where(condition, x, y))


def pass_through(x: Tensor, *_: Tensor) -> Tensor:
    """Return ``x``: an operator that onnxruntime removes, such as a Relu above its grid."""
    return x
