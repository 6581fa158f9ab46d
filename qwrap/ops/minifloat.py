"""Rounding to floats of 8, 6 and 4 bits, as ONNX Cast defines it.

Torch stores the 8-bit types but differs in what it does out of range; those of 6 and 4 bits travel
as the float32 numbers that they stand for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from onnx import TensorProto
from torch import Tensor

from qwrap.ops.element_types import TORCH_DTYPES

FLOAT8 = frozenset((
    *(TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ),
    *(TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ),
))
"""The 8-bit floats that have a sign and a mantissa."""


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


def to_float8(x: Tensor, data_type: int, saturate: bool) -> Tensor:
    """Return ``x`` as one of ``FLOAT8``, rounded to nearest even.

    With ``saturate`` what is too large, infinity included, becomes the largest number, else
    infinity or, in a type without it, NaN.
    """
    dtype = TORCH_DTYPES[data_type]
    x = x.to(torch.float32)
    if saturate:
        largest = torch.finfo(dtype).max
        return x.clamp(-largest, largest).to(dtype)
    if data_type == TensorProto.FLOAT8E4M3FN:  # torch saturates this one
        # 480 would be next after 448; half way, 464, goes to the even mantissa, that of 448.
        x = torch.where(x.abs() > 464.0, torch.full_like(x, math.nan).copysign(x), x)
    return x.to(dtype)


def to_e8m0(x: Tensor, saturate: bool, round_mode: str) -> Tensor:
    """Return ``x`` as FLOAT8E8M0, the powers of two from 2^-127 to 2^127.

    Where ONNX leaves the result open this is what onnxruntime returns: numbers below the smallest
    power, negative ones too, become it, or NaN without ``saturate``.
    """
    x = x.detach().to(torch.float32)
    smallest, largest = 2.0**-127, 2.0**127
    invalid = x.isnan()
    if not saturate:
        invalid = invalid | (x < smallest) | (x > largest)
    mantissa, exponent = torch.frexp(x.nan_to_num(nan=1.0).clamp(smallest, largest))
    # The mantissa is in [0.5, 1): the number lies between 2^(exponent - 1) and 2^exponent.
    if round_mode == "up":
        exponent = exponent + (mantissa > 0.5)
    elif round_mode == "nearest":
        exponent = exponent + (mantissa >= 0.75)
    codes = torch.where(invalid, 255, exponent - 1 + 127)
    return codes.to(torch.uint8).view(torch.float8_e8m0fnu)
