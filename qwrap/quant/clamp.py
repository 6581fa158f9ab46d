"""An activation function that the clamp of a fake-quantization makes redundant."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qwrap.quant.stubs import Stub


class Clamp:
    """Stands in for a Relu or Clip whose output a stub quantizes.

    While the stub does, and none of its codes stands for a value beyond the bounds, clamping codes
    is clamping values: one pass over the tensor less, and one tensor less to keep for the backward
    pass, where the gradient is cut off by the codes.

    Args:
        stub: quantizes the output.
        low: what the activation function cuts off below, -inf for nothing.
        high: what it cuts off above.
    """

    def __init__(self, stub: Stub, low: float, high: float) -> None:
        self.stub, self.low, self.high = stub, low, high
        self._known: tuple[tuple[int, ...], bool] = ((), False)

    def __call__(self, x: Tensor, *_bounds: Any) -> Tensor:
        """Return ``x`` clamped, or as it is where the stub will clamp it."""
        if self.stub.mode == "quantize" and self.is_redundant():
            return x
        if (self.low, self.high) == (0, math.inf):
            return x.relu()
        low, high = (None if math.isinf(bound) else bound for bound in (self.low, self.high))
        return x.clamp(low, high)

    def look(self) -> None:
        """Find out whether the stub's clamp is enough, for a compiler that is about to trace."""
        self.is_redundant()

    def is_redundant(self) -> bool:
        """Whether no code lies beyond; only looked up again where the initial scale changed.

        Training keeps it so, for it respects the stub's limit and moves no zero point here.
        """
        stub = self.stub
        watches = stub.following and stub.training  # and has to see what the function makes of it
        if watches:
            return False
        if torch.compiler.is_compiling():  # where versions of tensors cannot be looked up
            return self._known[1]
        parts = (stub.initial_scale, stub.initial_zero_point, stub.scale_limit)
        key = tuple(n for part in parts for n in (part.data_ptr(), part._version))
        if key != self._known[0]:
            self._known = key, self.covers()
        return self._known[1]

    @torch.no_grad()
    def covers(self) -> bool:
        """Whether the stub's codes lie within the bounds."""
        stub = self.stub
        scale, zero_point = stub.initial_scale, stub.initial_zero_point
        below = (stub.grid.qmin - zero_point) * scale >= self.low
        above = (stub.grid.qmax - zero_point) * scale <= self.high
        return bool((below & above).all())
