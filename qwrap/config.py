"""What the user asks for: how a tensor is quantized, and which nodes are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from qwrap.dtypes import INT8, UINT8, QuantType, quant_type
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


Method = Literal["minmax", "percentile", "mse"]
METHODS = get_args(Method)


@dataclass(slots=True, kw_only=True)
class QConfig:
    """What the user asks of a whole model.

    Attributes:
        activation: type of the tensors between nodes, or its name.
        weight: type of Conv, Gemm and MatMul weights, or its name; signed types are symmetric.
        per_channel: one weight scale per output channel instead of one per tensor.
        method: how an activation's range is chosen from what was observed.
        weight_method: how a weight's range is chosen; "percentile" has no meaning here.
        percentile: share of the values, in percent, that method "percentile" keeps in range.
        only_if_faster: leave in float what integer kernels would not speed up, going by the shapes
            and costs measured for onnxruntime on CPUs; False quantizes all that has a kernel.
        excluded: nodes left in float: shell patterns over node names, or operator types.
    """

    activation: QuantType | str = UINT8
    weight: QuantType | str = INT8
    per_channel: bool = True
    method: Method = "mse"
    weight_method: Method = "mse"
    percentile: float = 99.999
    only_if_faster: bool = True
    excluded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, allowed in (("method", METHODS), ("weight_method", ("minmax", "mse"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {allowed}")
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile={self.percentile}: expected more than 50, up to 100")
        for spec in (self.activation_spec, self.weight_spec(0)):
            if spec.dtype.bits > 16:
                raise ConfigError(f"{spec.dtype} is for biases; choose a type of 8 or 16 bits")

    @property
    def activation_spec(self) -> QuantSpec:
        """How an activation is quantized."""
        return QuantSpec(dtype=quant_type(self.activation), symmetric=False)

    def weight_spec(self, axis: int | None) -> QuantSpec:
        """How a weight with output channels along ``axis`` is quantized."""
        dtype = quant_type(self.weight)
        axis = axis if self.per_channel else None
        return QuantSpec(
            dtype=dtype,
            # onnxruntime's kernels read one zero point, even where there is a scale per channel.
            symmetric=dtype.signed or axis is not None,
            axis=axis,
            narrow_range=dtype.signed,
        )

    def exclude(self, *selectors: str) -> None:
        """Leave nodes in float, in place: shell patterns over node names, or operator types."""
        self.excluded.extend(selectors)
