"""What the user asks of a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from qwrap.config.ranges import (
    WEIGHT_METHODS,
    Choice,
    RangeOverride,
    Training,
    check_method,
    check_training,
)
from qwrap.config.region import FLOATS, Region, Selector, check_region, names_of
from qwrap.config.spec import QuantSpec, activation_spec, check_width, retyped
from qwrap.dtypes import INT8, UINT8, QuantType, quant_type
from qwrap.errors import ConfigError
from qwrap.overrides import TensorOverride, parse_overrides
from qwrap.targets import Scope, Target, find_target

SCOPES = get_args(Scope)


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
            that takes no time worth speaking of (50 microseconds, as estimated).
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
        check_method(self.method, self.percentile)
        if self.weight_method not in WEIGHT_METHODS:
            raise ConfigError(
                f"weight_method={self.weight_method!r}: choose one of {WEIGHT_METHODS}"
            )
        if not self.margin >= 0:
            raise ConfigError(f"margin={self.margin}: expected 0 or more")
        check_training(self.training)
        if self.bn not in ("fold", "live"):
            raise ConfigError(f"bn={self.bn!r}: choose one of ('fold', 'live')")
        if self.scope not in (None, *SCOPES):
            raise ConfigError(f"scope={self.scope!r}: choose one of {SCOPES}")
        if not 0 < self.ema <= 1:
            raise ConfigError(f"ema={self.ema}: expected more than 0, up to 1")
        if self.kept_samples < 0:
            raise ConfigError(f"kept_samples={self.kept_samples}: expected 0 or more")
        find_target(self.target)
        check_width(self.activation_spec)
        check_width(self.weight_spec(0))

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
        selectors = names_of(selector)
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
            to=() if to is None else names_of(to),
            activation=activation,
            weight=weight,
        )
        check_region(region)
        self.regions.append(region)
