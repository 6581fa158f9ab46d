"""Casts to 8-bit floats, as ONNX Cast defines them: torch differs in what it does out of range."""

from __future__ import annotations

import math

import torch
from onnx import TensorProto
from torch import Tensor

from qwrap.minifloat import FLOAT8


def to_float8(x: Tensor, data_type: int, saturate: bool) -> Tensor:
    """Return ``x`` as one of the types ``FLOAT8``, rounded to nearest even.

    With ``saturate`` what is too large, infinity included, becomes the largest number, else
    infinity or, in a type without it, NaN.
    """
    dtype = FLOAT8[data_type]
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
