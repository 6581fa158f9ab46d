"""What the user asks for: how a tensor is quantized, and which nodes are."""

from __future__ import annotations

from dataclasses import dataclass

from qwrap.dtypes import INT8, QuantType
from qwrap.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How one tensor is quantized.

    Without ``axis`` the tensor has one scale (per-tensor); with it, one per index of that axis.

    Attributes:
        dtype: storage type of the codes.
        symmetric: zero point fixed at the middle code (0 for signed, ``2^(bits-1)`` for unsigned).
        axis: channel axis, or None for per-tensor.
        narrow_range: leave the smallest code of a signed type unused, so that the codes are
            symmetric too (int8: -127 … 127, what onnxruntime does for weights).
    """

    dtype: QuantType = INT8
    symmetric: bool = True
    axis: int | None = None
    narrow_range: bool = False

    def __post_init__(self) -> None:
        if self.narrow_range and not (self.symmetric and self.dtype.signed):
            raise ConfigError(
                f"narrow_range=True needs a symmetric signed type; got {self.dtype}, "
                f"symmetric={self.symmetric}"
            )

    @property
    def qmin(self) -> int:
        """Smallest code in use."""
        return self.dtype.qmin + self.narrow_range

    @property
    def qmax(self) -> int:
        """Largest code in use."""
        return self.dtype.qmax
