"""What a quantized model will look like: a plain value, keyed by ONNX names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from qwrap.config import QuantSpec, RangeOverride, Training
from qwrap.dtypes import INT8, UINT8
from qwrap.model.points import OutputPoint, Point, UsePoint, ValuePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.dictionary import Overrides, to_overrides
from qwrap.quant.outcome import Outcome

Role = Literal["integer", "pairs", "weights", "moves", "absorbed", "float"]
Use = tuple[str, int]
"""A node and the index of an input."""


Ends = tuple[float | None, float | None]
"""The smallest and largest value of a range, None where it is what was observed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What the user said of the range of a constant: one number, or one for each channel."""

    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None
    zero_point: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What some readers of a quantized tensor get instead: its codes in another type.

    Attributes:
        key: a name, unlike that of any tensor.
        spec: its type.
        consumers: which inputs of which nodes read it.
        outputs: which graph outputs it is.
        fixed: scale and zero point that the user dictates, None to derive them from the tensor's.
        override: what the user said of it, None for nothing.
        ends: one end of its range alone that the user said.
        training: how its scale moves in training, see ``QConfig``.
        shape: of its scale.
    """

    key: str
    spec: QuantSpec
    consumers: tuple[Use, ...] = ()
    outputs: tuple[int, ...] = ()
    fixed: tuple[float, int] | None = None
    override: RangeOverride | None = None
    ends: Ends = (None, None)
    training: Training = "fixed"
    shape: tuple[int, ...] = (1,)

    @property
    def points(self) -> list[Point]:
        """Where it is made."""
        return [*(UsePoint(*use) for use in self.consumers), *map(OutputPoint, self.outputs)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """An activation that gets a QuantizeLinear/DequantizeLinear pair.

    Attributes:
        spec: its type.
        source: the tensor whose scale and zero point it has: itself, or the one that operators
            which only move values made it from; perhaps a conversion of that.
        fixed: scale and zero point that the operator or the user dictates, None to observe them.
        table: key in ``QuantPlan.constants`` of the constant whose entries the tensor is made of,
            and whose scale it has, None where it is computed.
        override: what the user said of it, None for nothing.
        ends: one end of its range alone that the user said.
        training: how its scale moves in training, see ``QConfig``.
        shape: of its scale.
        conversions: what some of its readers get in another type, one for each type.
    """

    spec: QuantSpec
    source: str
    fixed: tuple[float, int] | None = None
    table: tuple[str, int] | None = None
    override: RangeOverride | None = None
    ends: Ends = (None, None)
    training: Training = "fixed"
    shape: tuple[int, ...] = (1,)
    conversions: tuple[Conversion, ...] = ()

    def read_by(self, node: str, index: int) -> Conversion | None:
        """Return what input ``index`` of ``node`` gets, None for the tensor itself."""
        return next((c for c in self.conversions if (node, index) in c.consumers), None)

    @property
    def is_observed(self) -> bool:
        """Whether the scale comes from what calibration sees."""
        return self.fixed is None and self.table is None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantPlan:
    """A weight, or a constant operand, that is stored as codes behind a DequantizeLinear.

    Attributes:
        value: initialiser.
        spec: its type and axis.
        override: what the user said of it, None for nothing.
        given: its range, if the user said it by name; precedes ``override``.
        training: how its scale moves in training, see ``QConfig``.
        shared: key in ``QuantPlan.constants`` of the reader whose scale this one has too, None
            for a scale of its own.
    """

    value: str
    spec: QuantSpec
    override: RangeOverride | None = None
    given: Numbers | None = None
    training: Training = "fixed"
    shared: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasPlan:
    """A bias stored as int32 codes at the scale of the accumulator, activation times weight.

    Attributes:
        value: initialiser.
        activation: source tensor of the node's input, or the conversion that the node reads.
        weight: key of the node's weight in ``QuantPlan.constants``.
    """

    value: str
    activation: str
    weight: tuple[str, int]


@dataclass(frozen=True, slots=True)
class NodePlan:
    """How a node will run.

    Attributes:
        role: "integer" in an integer kernel (or between pairs, where ``QuantPlan.notes`` says that
            there is none), "pairs" in float between pairs, for there is no such kernel, "weights"
            in float from a quantized weight, "moves" codes without computing, "absorbed" into its
            producer's kernel, or "float".
        reason: why, for "float".
        dtype: name of the type of its inputs and outputs, empty where they are as in the graph;
            "float16" for a float node that computes in half precision.
    """

    op_type: str
    role: Role
    reason: str = ""
    dtype: str = ""

    def in_half(self) -> NodePlan:
        """Return the same node as one that computes in float16."""
        return replace(self, reason="", dtype="float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfPlan:
    """Which tensors of a node are of float16; the node computes with that precision.

    Attributes:
        inputs: indices of the inputs that it reads so.
        outputs: indices of the outputs that it makes so.
    """

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


@dataclass(slots=True)
class QuantPlan:
    """Which tensors are quantized, and how each node will run.

    Attributes:
        tensors: value key -> plan of an activation.
        constants: (node key, input index) -> plan of a weight or constant operand.
        biases: (node key, input index) -> plan of a bias.
        nodes: node key -> how it runs.
        half: node key -> what of it is in float16, see ``HalfPlan``.
        changes: what was rewritten in the graph before placement, one line each.
        without: node key -> why calibration returned the node to float.
        notes: what to know about the plan as a whole, one line each.
        fused: whether the runtime has integer kernels for what is quantized, regions apart.
        methods: source tensor -> method that "auto" chose for it.
        outcomes: what algorithms tried on the model since, in order.
    """

    tensors: dict[str, TensorPlan] = field(default_factory=dict)
    constants: dict[tuple[str, int], ConstantPlan] = field(default_factory=dict)
    biases: dict[tuple[str, int], BiasPlan] = field(default_factory=dict)
    nodes: dict[str, NodePlan] = field(default_factory=dict)
    half: dict[str, HalfPlan] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    without: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    fused: bool = True
    methods: dict[str, str] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    def sources(self) -> dict[str, TensorPlan]:
        """Return the tensors that have a scale of their own."""
        return {key: plan for key, plan in self.tensors.items() if plan.source == key}

    def conversions(self) -> Iterator[tuple[str, Conversion]]:
        """Yield every conversion with the tensor it is made of."""
        for key, tensor in self.tensors.items():
            yield from ((key, conversion) for conversion in tensor.conversions)

    def scales(self) -> dict[str, TensorPlan | Conversion]:
        """Return the tensors that have a scale of their own, and the conversions."""
        return {**self.sources(), **{c.key: c for _, c in self.conversions()}}

    def point_of(self, key: str) -> Point:
        """Return where the scale of a tensor or conversion is."""
        if key in self.tensors:
            return ValuePoint(key)
        return next(c.points[0] for _, c in self.conversions() if c.key == key)

    def observed_as(self, key: str) -> str:
        """Return the tensor whose observer sees what a tensor holds, but for rounding."""
        made_of = {conversion.key: tensor for tensor, conversion in self.conversions()}
        while (source := self.tensors[key].source) != key:
            key = made_of.get(source, source)
        return key

    def spec_of(self, key: str) -> QuantSpec:
        """Return the type of a tensor or conversion."""
        if key in self.tensors:
            return self.tensors[key].spec
        return next(c.spec for _, c in self.conversions() if c.key == key)

    def table_of(self, tensor: TensorPlan) -> Use | None:
        """Return where the constant is read whose scale a tensor has, None if it has another."""
        source = self.tensors.get(tensor.source)  # else a conversion, which has its own
        return None if source is None else source.table

    def read_by(self, node: str, index: int, value: str) -> str | None:
        """Return the key of the scale that ``node`` reads ``value`` with, None if it has none."""
        tensor = self.tensors.get(value)
        if tensor is None:
            return None
        conversion = tensor.read_by(node, index)
        return tensor.source if conversion is None else conversion.key

    @property
    def has_float_constants(self) -> bool:
        """Whether some constants are of types that a runtime makes floats of before it runs."""
        dtypes = (constant.spec.dtype for constant in self.constants.values())
        return any(dtype.codebook or dtype.function is not None for dtype in dtypes)

    @property
    def kept_apart(self) -> bool:
        """Whether operators must not follow a DequantizeLinear, lest onnxruntime fuse them.

        Of weights that are floats when the model runs it would make 8 bits, to have an integer
        kernel; and it would hand weights of 2 bits, of float8, or of 8 bits in blocks, to kernels
        that take none of them. Behind activations of 16 bits with scales of float16 it rounds
        biases to the product of two scales, which is 0.
        """
        tensors = [tensor.spec for tensor in self.tensors.values()]
        if self.has_float_constants or any(map(_underflows, tensors)):
            return True
        eight = (UINT8.onnx_type, INT8.onnx_type)
        if not any(spec.dtype.onnx_type in eight for spec in tensors):
            return False
        specs = [constant.spec for constant in self.constants.values()]
        in_blocks = [s.dtype.onnx_type in eight and s.block_size is not None for s in specs]
        odd = [s.dtype.bits == 2 or not s.dtype.is_integer for s in specs]
        return any(in_blocks) or any(odd)

    def drop(self, nodes: dict[str, str]) -> None:
        """Mark ``nodes`` as float with the reasons given, in place."""
        for key, reason in nodes.items():
            self.nodes[key] = NodePlan(self.nodes[key].op_type, "float", reason)

    def summary(self) -> str:
        """Return a table of what runs in integers and, for the rest, why not."""
        roles = Counter((n.role, n.op_type) for n in self.nodes.values())
        lines = []
        for role in ("integer", "pairs", "weights", "absorbed", "moves"):
            counts = [f"{op} {n}" for (r, op), n in sorted(roles.items()) if r == role]
            label = "in pairs" if role == "pairs" or not (role != "integer" or self.fused) else role
            if counts:
                lines.append(f"{label + ':':10s} {', '.join(counts)}")
        if self.half:
            kinds = sorted(Counter(self.nodes[key].op_type for key in self.half).items())
            lines.append(f"{'float16:':10s} {', '.join(f'{op} {n}' for op, n in kinds)}")
        lines += self._types()
        lines.append(
            f"quantized: {len(self.sources())} activations, "
            f"{len(self.constants)} weights and constants, {len(self.biases)} biases"
        )
        if self.methods:
            chosen = Counter(self.methods.values()).most_common()
            lines.append("auto:      " + ", ".join(f"{method} {n}" for method, n in chosen))
        reasons: dict[str, list[str]] = {}
        for key, node in self.nodes.items():
            if node.role == "float" and key not in self.half:
                reasons.setdefault(f"{node.op_type}: {node.reason}", []).append(key)
        for reason, keys in sorted(reasons.items()):
            shown = ", ".join(keys[:3]) + (f", … ({len(keys)} nodes)" if len(keys) > 3 else "")
            lines.append(f"float:     {reason} [{shown}]")
        lines += [f"note:      {line}" for line in self.notes]
        lines += [f"changed:   {line}" for line in self.changes]
        kept = {True: "kept:", False: "undone:"}
        return "\n".join([*lines, *(f"{kept[o.kept]:10s} {o.line()}" for o in self.outcomes)])

    def _types(self) -> list[str]:
        """Return what to know of a plan with several types."""
        kinds = Counter(node.dtype for node in self.nodes.values() if node.dtype)
        lines = []
        if len(kinds) > 1:
            counts = ", ".join(f"{dtype} {n}" for dtype, n in kinds.most_common())
            lines.append(f"types:     {counts} nodes")
        found = Counter(
            (self.tensors[key].spec.dtype, c.spec.dtype) for key, c in self.conversions()
        )
        if found:
            counts = ", ".join(f"{a} to {b} {n}" for (a, b), n in found.most_common())
            lines.append(f"converted: {counts} tensors")
        return lines

    def to_overrides(self, model: WrappedModel | None = None) -> Overrides:
        """Return what the plan says of every tensor, as onnxruntime's ``TensorQuantOverrides``.

        Biases are not in it: their scales follow. Types are members of onnxruntime's ``QuantType``.
        ``QConfig.from_overrides(plan.to_overrides(model), scope="named")``, with the other settings
        as they were, gives the same file. onnxruntime's tool computes the same from it, but that it
        quantizes whatever else it meets, such as what a Relu reads whose output is converted, and
        that symmetric weights beyond the range end at -128 there, at -127 here.

        Args:
            model: the calibrated model, for its scales and zero points: numpy arrays without
                dimensions, as onnxruntime wants them; of a constant with channels, one dictionary
                for each.

        Raises:
            ConfigError: onnxruntime's dictionary cannot say it: a type that it has not, scales in
                blocks, a tensor that is converted to two types.
            NotCalibratedError: ``model`` is not calibrated.
        """
        return to_overrides(self, model)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-able dictionaries and lists."""
        return {
            "tensors": {key: _plain(plan) for key, plan in self.tensors.items()},
            "constants": [[*key, _plain(plan)] for key, plan in self.constants.items()],
            "biases": [[*key, _plain(plan)] for key, plan in self.biases.items()],
            "nodes": {key: _plain(plan) for key, plan in self.nodes.items()},
            "half": {key: _plain(plan) for key, plan in self.half.items()},
            "changes": list(self.changes),
            "without": dict(self.without),
            "notes": list(self.notes),
            "fused": self.fused,
            "methods": dict(self.methods),
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }


def _underflows(spec: QuantSpec) -> bool:
    return spec.scale_type == "float16" and spec.dtype.is_integer and spec.dtype.bits > 8


def _plain(plan: TensorPlan | ConstantPlan | BiasPlan | NodePlan | HalfPlan) -> dict[str, Any]:
    result = asdict(plan)
    for part in (result, *result.get("conversions", ())):
        if "spec" in part:
            part["spec"]["dtype"] = part["spec"]["dtype"]["name"]
    return result
