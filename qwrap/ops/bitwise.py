"""Operators on the bits of integers."""

from __future__ import annotations

import torch
from torch import Tensor

from qwrap.ops.limits import one_of
from qwrap.ops.registry import op

op("BitwiseAnd", since=(18,))(torch.bitwise_and)
op("BitwiseOr", since=(18,))(torch.bitwise_or)
op("BitwiseXor", since=(18,))(torch.bitwise_xor)
op("BitwiseNot", since=(18,))(torch.bitwise_not)


@op("BitShift", since=(11, 28), allowed={"direction": one_of("LEFT", "RIGHT")})
def bit_shift(X: Tensor, Y: Tensor, *, direction: str) -> Tensor:
    """Shift ``X`` by ``Y`` bits; beyond the width of the type only copies of the sign are left.

    Torch leaves shifts by a negative or too large number open, ONNX counts both as too large.
    """
    width = X.itemsize * 8
    inside = (Y >= 0) & torch.lt(Y, width)
    by = torch.where(inside, Y, 0)
    if direction == "LEFT":
        return torch.where(inside, X << by, 0)
    beyond = X >> width - 1 if X.dtype.is_signed else torch.zeros_like(X)
    return torch.where(inside, X >> by, beyond)
