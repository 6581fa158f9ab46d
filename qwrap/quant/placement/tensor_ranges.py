"""What was said of named tensors, written into a plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import onnx_ir as ir

from qwrap.config import QuantSpec, RangeOverride
from qwrap.errors import ConfigError
from qwrap.model.layout import Layout
from qwrap.model.points import UsePoint
from qwrap.overrides import TensorOverride
from qwrap.quant.placement.eligibility import Eligibility
from qwrap.quant.placement.overrides import merged_with, override_tensor, qparams_of
from qwrap.quant.placement.specs import Specs
from qwrap.quant.placement.tensor_overrides import Named, middle_of
from qwrap.quant.plan import ConstantPlan, Ends, NodePlan, Numbers, QuantPlan, TensorPlan


@dataclass(frozen=True, slots=True)
class _Said:
    """What was said of a tensor, or of what it is converted to."""

    name: str
    override: TensorOverride

    @property
    def text(self) -> str:
        """Both, for messages."""
        return f"{self.override.text} of {self.name}"


def add_named_constants(plan: QuantPlan, facts: Eligibility, specs: Specs) -> None:
    """Quantize the named constants that no quantized node reads, in place, wherever they are read.

    Raises:
        ConfigError: one of them is nowhere read as a tensor.
    """
    graph, points = facts.graph, facts.layout.points
    for value, said in specs.named.constants.items():
        spec = specs.constant(value)
        key, found = graph.key(value), False
        for use in value.uses():
            node, point = graph.node_key(use.node), (graph.node_key(use.node), use.idx)
            if UsePoint(*point) not in points:
                continue
            found = True
            if point in plan.constants:
                continue
            plan.constants[point] = ConstantPlan(value=key, spec=spec)
            if node in plan.nodes and plan.nodes[node].role == "float":
                plan.nodes[node] = NodePlan(use.node.op_type, "weights")
        if not found:
            raise ConfigError(
                f"overrides of tensor {key!r}: {said.text}, but no node reads it as a tensor"
            )


def apply_named(plan: QuantPlan, layout: Layout, named: Named) -> None:
    """Write what was said of ranges into ``plan``, in place, and see to it that all of it holds.

    Tensors that are only moved share a scale, so that what is said of one holds for all.

    Raises:
        ConfigError: two words contradict each other, or one cannot be had.
    """
    for value, said in named.activations.items():
        _check_types(plan, named, value, said)
    for key, words in _groups(plan, named).items():
        override = _agreed(words)
        table = plan.tensors[key].table if key in plan.tensors else None
        if table is not None:
            _put_on_table(plan, table, words, override)
        elif key in plan.tensors:
            _put_on_tensor(plan, layout, key, override)
        else:
            _put_on_conversion(plan, key, override)
    for value, said in named.constants.items():
        _put_on_constant(plan, named, value, said)


# --- types ---------------------------------------------------------------------------------------


def _check_types(plan: QuantPlan, named: Named, value: ir.Value, said: TensorOverride) -> None:
    key = named.graph.key(value)
    tensor = plan.tensors.get(key)
    if tensor is None:
        return  # absorbed, in the type of what it is absorbed into
    if said.dtype is not None and tensor.spec.dtype != said.dtype:
        raise ConfigError(_moved_apart(named, value, tensor, said))
    wanted = None if said.convert is None else said.convert.dtype
    if wanted is not None and wanted not in {c.spec.dtype for c in tensor.conversions}:
        raise ConfigError(
            f"overrides of tensor {key!r}: 'convert' to {wanted}, which it has already; the "
            "'quant_type' of 'convert' must differ from the tensor's own"
        )


def _moved_apart(named: Named, value: ir.Value, tensor: TensorPlan, said: TensorOverride) -> str:
    """Return why a tensor has not the type said: it was moved from one of another."""
    key, node = named.graph.key(value), value.producer()
    assert node is not None
    moved = node.inputs[0]
    source = "" if moved is None else named.graph.key(moved)
    other = named.activations.get(moved) if moved is not None else None
    words = f", of which {other.text} was said" if other is not None else ""
    return (
        f"overrides of tensor {key!r}: {said.text}, but node {named.graph.node_key(node)!r} only "
        f"moves it, as {tensor.spec.dtype}, from {source!r}{words}; say the same of both, or let "
        f"'convert' of {source!r} reach that node"
    )


# --- ranges --------------------------------------------------------------------------------------


def _groups(plan: QuantPlan, named: Named) -> dict[str, list[_Said]]:
    """Return key of a scale -> what was said of the tensors that have it."""
    groups: dict[str, list[_Said]] = {}
    for value, said in named.activations.items():
        key = named.graph.key(value)
        if key not in plan.tensors:
            continue
        groups.setdefault(plan.tensors[key].source, []).append(_Said(f"tensor {key!r}", said))
        for conversion in plan.tensors[key].conversions if said.convert is not None else ():
            assert said.convert is not None
            word = _Said(f"'convert' of tensor {key!r}", said.convert)
            groups.setdefault(conversion.key, []).append(word)
    return groups


def _agreed(words: Iterable[_Said]) -> TensorOverride:
    """Return what holds for tensors of one scale."""
    first: dict[str, _Said] = {}
    result = TensorOverride()
    for word in words:
        said = word.override
        for part in ("symmetric", "range"):
            given = said.symmetric is not None if part == "symmetric" else said.has_range
            if not given:
                continue
            before = first.setdefault(part, word)
            if _part(before.override, part) != _part(said, part):
                raise ConfigError(
                    f"overrides: {before.text} and {word.text} contradict each other, as the "
                    "two tensors share one scale; say it of one of them, or the same of both"
                )
        if said.has_range:
            result = replace(_part(said, "range"), symmetric=result.symmetric)
        elif said.symmetric is not None and result.scale is None:
            result = replace(result, symmetric=said.symmetric)
    return result


def _part(said: TensorOverride, part: str) -> TensorOverride:
    if part == "symmetric":
        return TensorOverride(symmetric=said.symmetric)
    return TensorOverride(
        low=said.low, high=said.high, scale=said.scale, zero_point=said.zero_point
    )


def _spec_for(spec: QuantSpec, said: TensorOverride) -> QuantSpec:
    """Return the spec of a tensor of which that was said."""
    if said.symmetric is not None:
        narrow = said.symmetric and spec.dtype.signed and spec.dtype.is_integer
        spec = replace(spec, symmetric=said.symmetric, narrow_range=narrow)
    if said.zero_point is not None and said.zero_point[0] != middle_of(spec):
        spec = replace(spec, symmetric=False, narrow_range=False, restricted=False)
    return spec


def _range_of(said: TensorOverride) -> tuple[RangeOverride | None, Ends]:
    """Return the range or scale that was said, or the one end of it."""
    if said.scale is not None and said.zero_point is not None:
        return RangeOverride(scale=said.scale[0], zero_point=said.zero_point[0]), (None, None)
    low = None if said.low is None else said.low[0]
    high = None if said.high is None else said.high[0]
    if low is not None and high is not None:
        return RangeOverride(low=low, high=high), (None, None)
    return None, (low, high)


def _put_on_tensor(plan: QuantPlan, layout: Layout, source: str, said: TensorOverride) -> None:
    override, ends = _range_of(said)
    spec = _spec_for(plan.tensors[source].spec, said)
    for key, moved in plan.tensors.items():
        if moved.source == source:
            plan.tensors[key] = replace(moved, spec=spec, ends=ends)
    if override is not None:
        earlier = plan.tensors[source].override
        override = override if earlier is None else merged_with(earlier, override)
        override_tensor(plan, layout, source, override)


def _put_on_conversion(plan: QuantPlan, name: str, said: TensorOverride) -> None:
    override, ends = _range_of(said)
    spec = _spec_for(plan.spec_of(name), said)
    if override is not None:
        qparams_of(name, override, spec)  # refuses what cannot be had
    for key, tensor in plan.tensors.items():
        conversions = tuple(
            replace(c, spec=spec, override=override, ends=ends) if c.key == name else c
            for c in tensor.conversions
        )
        moved = spec if tensor.source == name else tensor.spec
        plan.tensors[key] = replace(tensor, spec=moved, conversions=conversions)


def _put_on_table(
    plan: QuantPlan, table: tuple[str, int], words: list[_Said], said: TensorOverride
) -> None:
    """Say of a table what was said of that which is fetched from it: they have one scale."""
    constant = plan.constants[table]
    if said.symmetric not in (None, constant.spec.symmetric):
        raise ConfigError(
            f"overrides: {words[0].text}, but it has the scale of table {constant.value!r}; say it "
            "of that"
        )
    if said.has_range:
        plan.constants[table] = replace(constant, given=_numbers(said))


# --- constants -----------------------------------------------------------------------------------


def _numbers(said: TensorOverride) -> Numbers:
    return Numbers(low=said.low, high=said.high, scale=said.scale, zero_point=said.zero_point)


def _put_on_constant(plan: QuantPlan, named: Named, value: ir.Value, said: TensorOverride) -> None:
    key, given = named.graph.key(value), _numbers(said)
    for point, constant in plan.constants.items():
        if constant.value != key:
            continue
        if constant.given not in (None, given) and said.has_range:
            raise ConfigError(
                f"overrides of tensor {key!r}: {said.text}, but something else was said of what is "
                "fetched from it, which has the same scale; say it of one of them"
            )
        if said.has_range:
            plan.constants[point] = replace(constant, given=given)
