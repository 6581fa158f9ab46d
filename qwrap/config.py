"""What the user asks for: how a tensor is quantized, and which nodes are."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from qwrap.dtypes import INT8, UINT8, QuantType, quant_type
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


Method = Literal["minmax", "ema", "percentile", "mse", "l1", "cosine", "entropy", "distribution"]
METHODS = get_args(Method)
Choice = Literal[Method, "auto"]
Training = Literal["fixed", "follow", "lsq", "lsq+", "pact", "tqt"]
TRAININGS = get_args(Training)
WEIGHT_METHODS = ("minmax", "mse")


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeOverride:
    """What the user says of a tensor's range: what it is, how it is chosen, how it is trained.

    None leaves it open.

    Attributes:
        low: smallest value to represent, in real units.
        high: largest value to represent.
        scale: the scale itself, one for the tensor.
        zero_point: the zero point that goes with ``scale``.
        method: how the range is chosen, for this tensor.
        percentile: as in ``QConfig``, for this tensor.
        training: as in ``QConfig``, for this tensor.
    """

    low: float | None = None
    high: float | None = None
    scale: float | None = None
    zero_point: int | None = None
    method: Choice | None = None
    percentile: float | None = None
    training: Training | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ConfigError(f"low={self.low}, high={self.high}: give both or neither")
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise ConfigError(f"low={self.low} is above high={self.high}")
        if self.scale is None and self.zero_point is not None:
            raise ConfigError(f"zero_point={self.zero_point} needs a scale")
        if self.scale is not None and not (self.scale > 0 and self.low is None):
            raise ConfigError(f"scale={self.scale} has to be above 0, and without low and high")
        _check_method(self.method, self.percentile)
        _check_training(self.training)


@dataclass(slots=True, kw_only=True)
class QConfig:
    """What the user asks of a whole model.

    Attributes:
        activation: type of the tensors between nodes, its name, or a spec with more to say; None
            leaves them float and quantizes weights alone.
        weight: type of Conv, Gemm and MatMul weights, its name, or a spec; signed types named
            without a spec are symmetric with a narrow range.
        per_channel: one weight scale per output channel instead of one per tensor.
        method: how an activation's range is chosen from what was observed; "auto" chooses for
            each tensor the method with the least error behind the operators that read it.
        weight_method: how a weight's range is chosen.
        percentile: share of the values, in percent, that method "percentile" keeps in range.
        margin: error beyond the least, as a share of it, that methods "mse", "l1" and "cosine"
            accept for a wider range: what lies at its ends is rare, so little known from a sample,
            and matters more to what follows than the many small values. 0 takes the least.
        ema: weight of each new batch in method "ema".
        training: how scales move when the model is trained, from where calibration put them.
            "fixed": not at all; gradients pass straight through (STE). "follow": with the data, an
            average over batches for activations, until ``freeze_observers``. "lsq": learned by
            gradient descent. "lsq+": zero points too, where a tensor has one to choose. "pact": the
            clip of an activation is learned, from what it cuts off. "tqt": powers of two, learned
            in the log domain; what "lsq" means for a spec with such scales. Scales that a kernel or
            the user dictates, of tables that are looked up in and of types that are functions stay
            fixed; so do, where nothing else is said for the tensor, those learned of graph inputs
            with 8 bits or more, whose gradient would cost a product in the first layer.
        bn: "fold" each BatchNormalization into the layer before it, or keep it "live" in training:
            what is quantized is the folded weight. Live are the layers that one was folded into,
            quantized or not; in a model that came folded, each Conv and ConvTranspose that has
            another layer behind it, with statistics from calibration. The file is the same.
        first_last_8bit: keep layers that no other quantized one is in front of, or none behind, at
            8 bits where the types above have fewer: their weights, what they read, and all tensors
            in front of the first ones and behind the last.
        kept_samples: calibration samples kept in memory, of up to 20 MiB, on which "auto" compares
            ranges, then or later; 0 keeps none.
        only_if_faster: leave in float what integer kernels would not speed up, going by the shapes
            and costs measured for onnxruntime on CPUs; False quantizes all that has a kernel.
        contrib: write com.microsoft's QuantizeLinear and DequantizeLinear, which carry 16 and 4
            bits at any opset, instead of raising the opset.
        excluded: nodes left in float: shell patterns over node names, or operator types.
        overrides: (shell pattern over tensor names, what is known), later ones win.
    """

    activation: QuantType | QuantSpec | str | None = UINT8
    weight: QuantType | QuantSpec | str = INT8
    per_channel: bool = True
    method: Choice = "mse"
    weight_method: Literal["minmax", "mse"] = "mse"
    percentile: float = 99.999
    margin: float = 0.1
    ema: float = 0.01
    training: Training = "lsq"
    bn: Literal["fold", "live"] = "fold"
    first_last_8bit: bool = False
    kept_samples: int = 64
    only_if_faster: bool = True
    contrib: bool = False
    excluded: list[str] = field(default_factory=list)
    overrides: list[tuple[str, RangeOverride]] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_method(self.method, self.percentile)
        if self.weight_method not in WEIGHT_METHODS:
            raise ConfigError(
                f"weight_method={self.weight_method!r}: choose one of {WEIGHT_METHODS}"
            )
        if not self.margin >= 0:
            raise ConfigError(f"margin={self.margin}: expected 0 or more")
        _check_training(self.training)
        if self.bn not in ("fold", "live"):
            raise ConfigError(f"bn={self.bn!r}: choose one of ('fold', 'live')")
        if not 0 < self.ema <= 1:
            raise ConfigError(f"ema={self.ema}: expected more than 0, up to 1")
        if self.kept_samples < 0:
            raise ConfigError(f"kept_samples={self.kept_samples}: expected 0 or more")
        for spec in (self.activation_spec, self.weight_spec(0)):
            if spec is not None and spec.dtype.is_integer and spec.dtype.bits > 16:
                raise ConfigError(f"{spec.dtype} is for biases; choose a type of up to 16 bits")

    @property
    def activation_spec(self) -> QuantSpec | None:
        """How an activation is quantized, None if it is not."""
        if self.activation is None or isinstance(self.activation, QuantSpec):
            return self.activation
        return QuantSpec(dtype=quant_type(self.activation), symmetric=False)

    def weight_spec(self, axis: int | None, block_axis: int | None = None) -> QuantSpec:
        """Return how a weight is quantized.

        Args:
            axis: what its output channels run along, None where it cannot have a scale for each.
            block_axis: what the products are summed over, along which blocks are laid.
        """
        if isinstance(self.weight, QuantSpec):
            blocked = self.weight.block_size is not None
            chosen = block_axis if blocked else axis if self.per_channel else None
            return replace(self.weight, axis=chosen)
        dtype = quant_type(self.weight)
        axis = axis if self.per_channel else None
        return QuantSpec(
            dtype=dtype,
            # onnxruntime's kernels read one zero point, even where there is a scale per channel.
            symmetric=dtype.signed or axis is not None,
            axis=axis,
            narrow_range=dtype.signed and dtype.is_integer,
        )

    def exclude(self, *selectors: str) -> None:
        """Leave nodes in float, in place: shell patterns over node names, or operator types."""
        self.excluded.extend(selectors)

    def set(
        self,
        selector: str,
        *,
        low: float | None = None,
        high: float | None = None,
        scale: float | None = None,
        zero_point: int | None = None,
        method: Choice | None = None,
        percentile: float | None = None,
        training: Training | None = None,
    ) -> None:
        """Say what is known of tensors, in place; a later word on the same tensor wins.

        Args:
            selector: shell pattern over tensor names: activations, weights and other constants.
            low: smallest value to represent, in real units; with ``high``.
            high: largest value to represent.
            scale: the scale itself, one for the tensor.
            zero_point: the zero point that goes with ``scale``.
            method: how the range is chosen, for this tensor.
            percentile: as in ``QConfig``, for this tensor.
            training: as in ``QConfig``, for this tensor.
        """
        override = RangeOverride(
            low=low,
            high=high,
            scale=scale,
            zero_point=zero_point,
            method=method,
            percentile=percentile,
            training=training,
        )
        self.overrides.append((selector, override))


def _check_training(training: str | None) -> None:
    if training not in (None, *TRAININGS):
        raise ConfigError(f"training={training!r}: choose one of {TRAININGS}")


def _check_method(method: str | None, percentile: float | None) -> None:
    if method not in (None, "auto", *METHODS):
        raise ConfigError(f"method={method!r}: choose one of {(*METHODS, 'auto')}")
    if percentile is not None and not 50 < percentile <= 100:
        raise ConfigError(f"percentile={percentile}: expected more than 50, up to 100")
