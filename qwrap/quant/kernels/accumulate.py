"""What convolutions and matrix products share: exact accumulators and their requantization.

The scheme (onnxruntime, ``MlasRequantizeOutput``): the int32 accumulator is converted to
float32, multiplied by ``float32(float32(x_scale * w_scale) / y_scale)``, rounded half to even,
shifted by the zero point and clamped. The accumulator is computed here in float32, which is exact
while no partial sum reaches 2^24; sums that could are cut into parts along the reduced dimension
and the parts added in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwrap.quant.kernels.grid import Grid

EXACT = 2**24  # every integer up to here is a float32


def largest_partial_sum(weight: Tensor, grid: Grid) -> Tensor:
    """Return a bound per row on every partial sum of ``weight`` times centered codes of ``grid``.

    Args:
        weight: centered codes [rows, ...]; each row is one dot product.
        grid: of the other operand.

    Returns:
        float64 [rows]. A partial sum lies between the sum of all negative and that of all positive
        products, in whichever order and grouping the products are added.
    """
    rows = weight.double().flatten(1)
    up = (rows * grid.high).maximum(rows * grid.low).sum(1)
    down = (rows * grid.high).minimum(rows * grid.low).sum(1)
    return up.maximum(-down)


def cut(x: Tensor, length: int, dim: int) -> tuple[Tensor, ...]:
    """Return ``x`` in parts of ``length`` along ``dim``; the last may be shorter."""
    size = x.shape[dim]
    starts = range(0, max(size, 1), max(length, 1))
    return tuple(x.narrow(dim, s, min(length, size - s)) for s in starts)


def parts_needed(weight: Tensor, grid: Grid) -> int:
    """Return into how many parts of dimension 1 ``weight`` is cut to keep float32 sums exact.

    0 if no cut is fine enough.
    """
    size = max(weight.shape[1], 1)
    bound = largest_partial_sum(weight, grid)
    least = math.ceil(float(bound.max()) / EXACT) if bound.numel() else 1
    for parts in range(max(least, 1), size + 1):
        chunks = cut(weight, -(-size // parts), 1)
        if all(bool((largest_partial_sum(c, grid) < EXACT).all()) for c in chunks):
            return parts
    return 0


def multiplier(x: Grid, weight_scale: Tensor, y: Grid | None) -> Tensor:
    """Return what turns an accumulator into steps of ``y``, or into real units without ``y``.

    Args:
        x: grid of the activation.
        weight_scale: float32 [1] or [C].
        y: grid of the output; None for a float output.
    """
    product = x.scale * weight_scale
    return product if y is None else product / y.scale


@dataclass(frozen=True, slots=True, eq=False)
class Requantize:
    """Turns exact accumulators into the values of the output grid.

    Attributes:
        multiplier: float32, broadcastable against the accumulator.
        bias: int32 bias codes as float64, broadcastable too; None when there is none.
        y: output grid; None for a float output (MatMulIntegerToFloat, QGemm without ``y_scale``).
    """

    multiplier: Tensor
    bias: Tensor | None
    y: Grid | None

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """Add ``parts``, each an exact accumulator, and requantize the sum."""
        acc = parts[0]
        if len(parts) > 1 or self.bias is not None or acc.dtype == torch.float64:
            total = acc.double()
            for part in parts[1:]:
                total += part
            if self.bias is not None:
                total += self.bias
            acc = total.float()
        acc = acc.mul_(self.multiplier)
        return acc if self.y is None else self.y.from_steps(acc)


def split_bias(bias: Tensor | None, bound: Tensor, parts: int) -> tuple[Tensor | None, bool]:
    """Return float64 ``bias`` and whether a float32 product may add it itself and stay exact."""
    if bias is None:
        return None, False
    codes = bias.double()
    return codes, parts == 1 and bool((bound + codes.abs() < EXACT).all())
