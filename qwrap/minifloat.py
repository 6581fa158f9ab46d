"""The numbers of float types of 8, 6 and 4 bits, and rounding to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from onnx import TensorProto
from torch import Tensor

FLOAT8: Mapping[int, torch.dtype] = MappingProxyType({
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2: torch.float8_e5m2,
    TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
})
"""The 8-bit floats that have a sign and a mantissa: ``onnx.TensorProto`` to torch type."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The finite numbers of a float type without infinity and NaN.

    Attributes:
        mantissa: bits after the leading one.
        exponent: of the smallest normal number; below it the spacing stays the same.
        largest: largest number.
    """

    mantissa: int
    exponent: int
    largest: float

    def round(self, x: Tensor) -> Tensor:
        """Return the nearest numbers, of two equally near the even one, in at least float32.

        What is too large becomes the largest number; NaN, which the types lack, becomes -0.0.
        Both are what ``ml_dtypes`` makes of them, which the ONNX backend suite takes its values
        from.
        """
        x = x if x.dtype == torch.float64 else x.to(torch.float32)
        exponent = torch.frexp(x.detach()).exponent - 1  # x is in [2^exponent, 2^(exponent + 1))
        step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=self.exponent) - self.mantissa)
        rounded = ((x / step).round() * step).clamp(-self.largest, self.largest)
        return torch.where(x.isnan(), -0.0, rounded).to(torch.float32)


GRIDS: Mapping[int, Grid] = MappingProxyType({
    TensorProto.FLOAT4E2M1: Grid(mantissa=1, exponent=0, largest=6.0),
    TensorProto.FLOAT6E2M3: Grid(mantissa=3, exponent=0, largest=7.5),
    TensorProto.FLOAT6E3M2: Grid(mantissa=2, exponent=-2, largest=28.0),
})
"""``onnx.TensorProto`` data type to its numbers (OCP Microscaling Formats, 5.3.2 and 5.3.3)."""


def saturate_to(x: Tensor, data_type: int) -> Tensor:
    """Return ``x`` rounded to the finite numbers of a float type, as float32, NaN aside.

    To nearest, of two equally near the even one; what is too large becomes the largest number.

    Args:
        x: floats of any shape.
        data_type: key of ``FLOAT8`` or ``GRIDS``.
    """
    if data_type in GRIDS:
        return GRIDS[data_type].round(x)
    dtype = FLOAT8[data_type]
    largest = torch.finfo(dtype).max
    return x.to(torch.float32).clamp(-largest, largest).to(dtype).to(torch.float32)


def numbers(data_type: int) -> tuple[float, ...]:
    """Return the finite numbers of a float type, ascending, each once.

    Args:
        data_type: key of ``FLOAT8`` or ``GRIDS``.
    """
    if data_type in FLOAT8:
        values = torch.arange(256, dtype=torch.uint8).view(FLOAT8[data_type]).to(torch.float64)
    else:
        grid = GRIDS[data_type]
        finest = 2.0 ** (grid.exponent - grid.mantissa)
        values = grid.round(torch.arange(-grid.largest, grid.largest + finest, finest)).double()
    return tuple(torch.unique(values[values.isfinite()] + 0.0).tolist())
