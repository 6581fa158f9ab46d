"""The set of values a quantized activation can take, and the way onto it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qwrap.dtypes import QuantType
from qwrap.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The values ``scale * (code - zero_point)`` of one per-tensor quantized activation.

    Kernels take and return ordinary float32 tensors that lie on such a grid; a *centered code* is
    ``code - zero_point``, held as float32. On x86 onnxruntime turns int8 activations into uint8
    ones with a zero point 128 higher (QDQS8ToU8Transformer), so both types compute alike here.

    Attributes:
        scale: float32 [1], on the device where the kernel runs.
        zero_point: the code of 0.0.
        dtype: ``UINT8`` or ``INT8``; onnxruntime has no fused kernel for wider activations.
    """

    scale: Tensor
    zero_point: int
    dtype: QuantType

    def __post_init__(self) -> None:
        if self.dtype.bits != 8 or not self.dtype.is_integer:
            raise ConfigError(f"fused kernels take 8-bit activations; got {self.dtype}")
        if not self.dtype.qmin <= self.zero_point <= self.dtype.qmax:
            raise ConfigError(f"zero point {self.zero_point} is outside {self.dtype}")

    @property
    def low(self) -> int:
        """Smallest centered code."""
        return int(self.dtype.qmin) - self.zero_point

    @property
    def high(self) -> int:
        """Largest centered code."""
        return int(self.dtype.qmax) - self.zero_point

    @property
    def zero_point_u8(self) -> int:
        """The zero point of the same grid in uint8 codes."""
        return -self.low

    def codes(self, x: Tensor) -> Tensor:
        """Return the centered codes of ``x``, float32 values that lie on this grid."""
        return (x / self.scale).round_()

    def from_steps(self, x: Tensor) -> Tensor:
        """Round ``x``, in units of ``scale``, to this grid and return the values, in place."""
        return x.round_().clamp_(self.low, self.high).mul_(self.scale)

    def from_shifted_steps(self, x: Tensor) -> Tensor:
        """As ``from_steps``, for ``x`` that has ``zero_point_u8`` added before it is rounded.

        Rounding half to even before or after adding an odd zero point differs at ties.
        """
        return x.round_().sub_(self.zero_point_u8).clamp_(self.low, self.high).mul_(self.scale)

    def quantize(self, x: Tensor) -> Tensor:
        """Return float32 ``x`` rounded to this grid, as QuantizeLinear does."""
        return self.from_steps(x / self.scale)

    def table(self) -> Tensor:
        """Return all values, float32 [256], in the order of their codes."""
        return self.codes_table() * self.scale

    def codes_table(self) -> Tensor:
        """Return all centered codes, float32 [256], ascending."""
        return self.scale.new_ones(self.high - self.low + 1).cumsum(0) + (self.low - 1)
