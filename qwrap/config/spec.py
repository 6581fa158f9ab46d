"""How one tensor is quantized."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from qwrap.dtypes import INT8, QuantType, quant_type
from qwrap.errors import ConfigError

ScaleType = Literal["float32", "float16", "bfloat16", "float8e8m0", "float8e4m3fn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How one tensor is quantized.

    Without ``axis`` the tensor has one scale (per-tensor); with it, one per index of that axis
    (per-channel); with ``block_size`` as well, one per ``block_size`` consecutive elements along
    it and per index of all other axes (blocked, as in ONNX QuantizeLinear-21).

    Attributes:
        dtype: storage type of the codes, or its name.
        symmetric: zero point fixed at the middle code (0 for signed, ``2^(bits-1)`` for unsigned);
            float types and code books, which have none, are always symmetric.
        axis: channel axis, or None for per-tensor. In ``QConfig`` it stays None: it is filled in
            for each weight.
        block_size: elements that share a scale along ``axis``, None for all.
        narrow_range: leave the smallest code of a signed type unused, so that the codes are
            symmetric too (int8: -127 … 127, what onnxruntime does for weights). In an activation
            it only sets the scale.
        reduce_range: use half of the codes (7 of 8 bits), for kernels that add products in 16 bit.
            In an activation it only sets the scale: values beyond the range get the other codes.
        restricted: let the zero point of an asymmetric unsigned type be either 0, if no value is
            negative, or the middle code.
        power_of_two: round scales up to a power of two.
        min_real_range: least width of the range, in real units; a narrower one grows upwards.
        scale_type: what scales are rounded to and stored as. ``"float8e8m0"`` are powers of two
            (OCP MX); ``"float8e4m3fn"`` stands for a product with one float32 scale of the whole
            tensor (NVFP4).
    """

    dtype: QuantType = INT8
    symmetric: bool = True
    axis: int | None = None
    block_size: int | None = None
    narrow_range: bool = False
    reduce_range: bool = False
    restricted: bool = False
    power_of_two: bool = False
    min_real_range: float = 0.0
    scale_type: ScaleType = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", quant_type(self.dtype))
        if not self.dtype.has_zero_point:
            object.__setattr__(self, "symmetric", True)
        for wrong in self._contradictions():
            raise ConfigError(wrong)

    def _contradictions(self) -> list[str]:
        kind = f"{self.dtype}, symmetric={self.symmetric}"
        checks = {
            f"narrow_range=True needs a symmetric signed integer; got {kind}": self.narrow_range
            and not (self.symmetric and self.dtype.signed and self.dtype.is_integer),
            f"reduce_range=True needs an integer of 4 bits or more; got {kind}": self.reduce_range
            and not (self.dtype.is_integer and self.dtype.bits >= 4),
            f"restricted=True needs an asymmetric unsigned integer; got {kind}": self.restricted
            and (self.symmetric or self.dtype.signed),
            f"min_real_range={self.min_real_range}: expected 0 or more": self.min_real_range < 0,
            f"block_size={self.block_size}: expected 1 or more": self.block_size is not None
            and self.block_size < 1,
            f"scale_type={self.scale_type!r}: choose one of {get_args(ScaleType)}": (
                self.scale_type not in get_args(ScaleType)
            ),
        }
        return [message for message, wrong in checks.items() if wrong]

    @property
    def qmin(self) -> float:
        """Smallest number that the scale is chosen for."""
        if not self.reduce_range:
            return self.dtype.qmin + self.narrow_range
        return -((-self.dtype.qmin) // 2)

    @property
    def qmax(self) -> float:
        """Largest number that the scale is chosen for.

        Half the range of a signed type is -64 … 64 in 8 bits, as in onnxruntime, but -4 … 3 in 4.
        """
        if not self.reduce_range:
            return self.dtype.qmax
        wide = self.dtype.signed and self.dtype.bits >= 8
        return (self.dtype.qmax + wide) // 2

    def as_computed(self) -> QuantSpec:
        """Return the spec of an activation as a runtime clamps it: at the ends of the type."""
        if not (self.narrow_range or self.reduce_range):
            return self
        return replace(self, narrow_range=False, reduce_range=False)


def activation_spec(activation: QuantType | QuantSpec | str) -> QuantSpec:
    """Return how activations of a type are quantized where nothing more is said."""
    if isinstance(activation, QuantSpec):
        return activation
    return QuantSpec(dtype=quant_type(activation), symmetric=False)


def retyped(spec: QuantSpec, dtype: QuantType, *, symmetric: bool) -> QuantSpec:
    """Return the spec for another type, without what that one cannot have."""
    return replace(
        spec,
        dtype=dtype,
        symmetric=symmetric,
        narrow_range=spec.narrow_range and symmetric and dtype.signed and dtype.is_integer,
        reduce_range=spec.reduce_range and dtype.is_integer and dtype.bits >= 4,
        restricted=spec.restricted and not symmetric and not dtype.signed,
    )


def check_width(spec: QuantSpec | None) -> None:
    """Refuse integers of more than 16 bits."""
    if spec is not None and spec.dtype.is_integer and spec.dtype.bits > 16:
        raise ConfigError(f"{spec.dtype} is for biases; choose a type of up to 16 bits")
