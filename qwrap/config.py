"""What the user asks for: how a tensor is quantized, and which nodes are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from qwrap.dtypes import INT8, UINT8, QuantType, quant_type
from qwrap.errors import ConfigError
from qwrap.overrides import TensorOverride, parse_overrides
from qwrap.targets import Scope, Target, find_target

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
SCOPES = get_args(Scope)
FLOATS = ("float32", "float16")
"""What a region can be left in, beside the types of codes."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Nodes that are quantized in other types than the rest of the model.

    Attributes:
        selectors: each a node's name, a shell pattern over node names, an operator type, the path
            of a Block (``"layers.0.attention"``), or a tensor or pattern over tensors, which stands
            for what writes and what reads it: the first of these kinds that fits.
        to: if there are any, the region is all nodes on a way from the selected ones to these.
        activation: type of the nodes' inputs and outputs, as in ``QConfig``; "float32" leaves them
            float, "float16" computes them in half precision; None says nothing of it.
        weight: type of the nodes' weights, as in ``QConfig``; "float32" leaves them float; None
            says nothing of it.
    """

    selectors: tuple[str, ...]
    to: tuple[str, ...] = ()
    activation: QuantType | QuantSpec | str | None = None
    weight: QuantType | QuantSpec | str | None = None

    @property
    def text(self) -> str:
        """What was asked, for messages."""
        where = f"{list(self.selectors)}" + (f" to {list(self.to)}" if self.to else "")
        types = {"activation": self.activation, "weight": self.weight}
        given = [f"{k}={getattr(v, 'dtype', v)}" for k, v in types.items() if v is not None]
        return f"set {where}: {', '.join(given)}"


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
        scope: what is quantized. "faster": what integer kernels speed up, going by the shapes and
            costs measured for onnxruntime on CPUs. "kernels": all that has an integer kernel.
            "all": every node that reads or writes floats, those without a kernel between pairs.
            "named": the tensors in ``tensors``, and nothing else.
            None: what suits the target, which is "faster" on CPUs, and "all" on accelerators that
            have nothing but integers; and where there are regions or ``tensors``, "all" for a model
            with which integer kernels could not save any time worth speaking of.
        contrib: write com.microsoft's QuantizeLinear and DequantizeLinear, which carry 16 and 4
            bits at any opset, instead of raising the opset.
        target: the runtime that the file is for: "onnxruntime" (on CPUs), "qnn", "tensorrt",
            "openvino", "vitisai", or a ``Target``. What it cannot run is refused; types that are
            given by name get the zero points and scales that it wants. ``for_target`` has types
            that suit it. Only onnxruntime's kernels are simulated exactly.
        excluded: nodes left in float: shell patterns over node names, or operator types.
        overrides: (shell pattern over tensor names, what is known), later ones win.
        regions: nodes in other types than ``activation`` and ``weight``, later ones win.
        tensors: tensor -> what is said of it in the words of onnxruntime; it precedes all else, and
            what is named is quantized in any case. See ``from_overrides``.
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
    scope: Scope | None = None
    contrib: bool = False
    target: str | Target = "onnxruntime"
    excluded: list[str] = field(default_factory=list)
    overrides: list[tuple[str, RangeOverride]] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    tensors: dict[str, TensorOverride] = field(default_factory=dict)

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
        if self.scope not in (None, *SCOPES):
            raise ConfigError(f"scope={self.scope!r}: choose one of {SCOPES}")
        if not 0 < self.ema <= 1:
            raise ConfigError(f"ema={self.ema}: expected more than 0, up to 1")
        if self.kept_samples < 0:
            raise ConfigError(f"kept_samples={self.kept_samples}: expected 0 or more")
        find_target(self.target)
        _check_width(self.activation_spec)
        _check_width(self.weight_spec(0))

    @classmethod
    def from_overrides(cls, overrides: Mapping[str, Any], **settings: Any) -> QConfig:
        """Return a configuration with what onnxruntime's ``TensorQuantOverrides`` says.

        A tensor that is named has exactly the type given, or else that of ``activation`` or
        ``weight``, and all nodes read it so, but those in the "recv_nodes" of its "convert"; what
        is not named follows the other settings. A constant that is named has one scale unless an
        "axis" is given; and so has a bias, which is then no int32.

        Args:
            overrides: tensor -> list of one dictionary, or of one for each channel, with the keys
                of onnxruntime; "quant_type" may also be a name, and "recv_nodes" a list.
            settings: other fields, as for ``QConfig``. With ``scope="named"`` and what
                ``plan.to_overrides(model)`` returned, the same file comes out again.

        Raises:
            ConfigError: the dictionary contradicts itself, or a setting does. What depends on the
                model ``prepare`` refuses.
        """
        if "tensors" in settings:
            raise ConfigError("tensors= are what the overrides say; leave one of the two out")
        return cls(tensors=parse_overrides(overrides), **settings)

    @classmethod
    def for_target(cls, target: str | Target, **settings: Any) -> QConfig:
        """Return a config with types that suit a runtime.

        Args:
            target: see ``target`` above.
            **settings: fields that are to be otherwise.

        Raises:
            ConfigError: there is no such target, or a setting is wrong.
        """
        return cls(**{**dict(find_target(target).defaults), "target": target, **settings})

    @property
    def activation_spec(self) -> QuantSpec | None:
        """How an activation is quantized, None if it is not."""
        return None if self.activation is None else self.activation_spec_of(self.activation)

    def activation_spec_of(self, activation: QuantType | QuantSpec | str) -> QuantSpec:
        """Return what ``activation_spec`` would for another type of activations."""
        if isinstance(activation, QuantSpec):
            return activation
        target, spec = find_target(self.target), activation_spec(activation)
        symmetric = spec.symmetric or spec.dtype.name in target.symmetric
        return replace(spec, symmetric=symmetric, power_of_two=target.power_of_two)

    @property
    def activation_specs(self) -> list[QuantSpec]:
        """How activations are quantized in the model at large, in regions and by name."""
        asked = [self.activation, *(region.activation for region in self.regions)]
        specs = [self.activation_spec_of(a) for a in asked if a is not None and a not in FLOATS]
        alike = self.activation_spec or QuantSpec(symmetric=False)
        said = [part for o in self.tensors.values() if o.axis is None for part in (o, o.convert)]
        kinds = dict.fromkeys(part.dtype for part in said if part is not None)
        return specs + [retyped(alike, kind, symmetric=False) for kind in kinds if kind is not None]

    def weight_specs(self, axis: int | None, block_axis: int | None = None) -> list[QuantSpec]:
        """Return what ``weight_spec`` does, and the same for regions and what is named."""
        asked = [self.weight, *(region.weight for region in self.regions)]
        given = [weight for weight in asked if weight is not None and weight not in FLOATS]
        usual = self.weight_spec_of(self.weight, None).dtype
        kinds = {o.dtype or usual: None for o in self.tensors.values() if o.axis is not None}
        named = [QuantSpec(dtype=kind, axis=axis) for kind in kinds]
        return [*(self.weight_spec_of(weight, axis, block_axis) for weight in given), *named]

    def weight_spec(self, axis: int | None, block_axis: int | None = None) -> QuantSpec:
        """Return how a weight is quantized.

        Args:
            axis: what its output channels run along, None where it cannot have a scale for each.
            block_axis: what the products are summed over, along which blocks are laid.
        """
        return self.weight_spec_of(self.weight, axis, block_axis)

    def weight_spec_of(
        self, weight: QuantType | QuantSpec | str, axis: int | None, block_axis: int | None = None
    ) -> QuantSpec:
        """Return what ``weight_spec`` would for another type of weights."""
        if isinstance(weight, QuantSpec):
            blocked = weight.block_size is not None
            chosen = block_axis if blocked else axis if self.per_channel else None
            return replace(weight, axis=chosen)
        dtype = quant_type(weight)
        axis = axis if self.per_channel else None
        return QuantSpec(
            dtype=dtype,
            # onnxruntime's kernels read one zero point, even where there is a scale per channel.
            symmetric=dtype.signed or axis is not None,
            axis=axis,
            narrow_range=dtype.signed and dtype.is_integer,
            power_of_two=find_target(self.target).power_of_two,
        )

    def exclude(self, *selectors: str) -> None:
        """Leave nodes in float, in place: shell patterns over node names, or operator types."""
        self.excluded.extend(selectors)

    def set(
        self,
        selector: Selector,
        *,
        to: Selector | None = None,
        activation: QuantType | QuantSpec | str | None = None,
        weight: QuantType | QuantSpec | str | None = None,
        low: float | None = None,
        high: float | None = None,
        scale: float | None = None,
        zero_point: int | None = None,
        method: Choice | None = None,
        percentile: float | None = None,
        training: Training | None = None,
    ) -> None:
        """Say in which types nodes are quantized, or what is known of tensors, in place.

        A later word on the same node or tensor wins. Types make a region of nodes; where two
        regions meet, tensors are converted. What a region's type has no kernel for computes in
        float between pairs, and what is in a region is quantized whether that is faster or not.

        Args:
            selector: with types: nodes, see ``Region``; several in a list or set; or a Block of
                the model, the module itself. Else a shell pattern over tensor names: activations,
                weights and other constants.
            to: with types: the region is all nodes on a way from ``selector`` to these.
            activation: type of the nodes' inputs and outputs; "float32" leaves them float, and
                "float16" has them computed in half precision.
            weight: type of the nodes' weights; "float32" leaves them float.
            low: smallest value to represent, in real units; with ``high``.
            high: largest value to represent.
            scale: the scale itself, one for the tensor.
            zero_point: the zero point that goes with ``scale``.
            method: how the range is chosen, for this tensor.
            percentile: as in ``QConfig``, for this tensor.
            training: as in ``QConfig``, for this tensor.

        Raises:
            ConfigError: a setting is unknown or contradicts another one.
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
        selectors = _names(selector)
        if activation is None and weight is None:
            if to is not None:
                raise ConfigError(f"to={to!r} goes with activation= or weight=")
            self.overrides += [(name, override) for name in selectors]
            return
        if override != RangeOverride():
            raise ConfigError(
                f"set {selector!r}: activation and weight speak of nodes, the rest of tensors; "
                "call set() once for each"
            )
        region = Region(
            selectors=selectors,
            to=() if to is None else _names(to),
            activation=activation,
            weight=weight,
        )
        _check_region(region)
        self.regions.append(region)


Selector = str | Iterable[str] | Any
"""A name or pattern, several of them, or a Block of a model."""


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


def _names(selector: Selector) -> tuple[str, ...]:
    """Return the patterns of a selector; a Block has a path as its name."""
    if isinstance(selector, str):
        return (selector,)
    path = getattr(selector, "path", None)
    if isinstance(path, tuple):
        if not path:
            raise ConfigError("the root Block is the whole model; set QConfig's own fields instead")
        return (".".join(path),)
    names = tuple(selector) if isinstance(selector, Iterable) else ()
    names = tuple(sorted(names)) if isinstance(selector, (set, frozenset)) else names
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{selector!r} selects nothing; give a name or pattern, several of them, or a Block"
        )
    return names


def _check_region(region: Region) -> None:
    if isinstance(region.activation, QuantSpec) or region.activation not in (None, *FLOATS):
        _check_width(activation_spec(region.activation))
    if region.weight == "float16":
        raise ConfigError(f"{region.text}: weights are of float16 with activation='float16'")
    if isinstance(region.weight, QuantSpec) or region.weight not in (None, *FLOATS):
        _check_width(activation_spec(region.weight))
    if region.activation == "float16" and region.weight not in (None, "float32"):
        raise ConfigError(
            f"{region.text}: what computes in float16 has weights of float16; leave out weight="
        )


def _check_width(spec: QuantSpec | None) -> None:
    if spec is not None and spec.dtype.is_integer and spec.dtype.bits > 16:
        raise ConfigError(f"{spec.dtype} is for biases; choose a type of up to 16 bits")


def _check_training(training: str | None) -> None:
    if training not in (None, *TRAININGS):
        raise ConfigError(f"training={training!r}: choose one of {TRAININGS}")


def _check_method(method: str | None, percentile: float | None) -> None:
    if method not in (None, "auto", *METHODS):
        raise ConfigError(f"method={method!r}: choose one of {(*METHODS, 'auto')}")
    if percentile is not None and not 50 < percentile <= 100:
        raise ConfigError(f"percentile={percentile}: expected more than 50, up to 100")
