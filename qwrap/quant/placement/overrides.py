"""What the user knows of single tensors, resolved against a plan and written into it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch

from qwrap.config import WEIGHT_METHODS, QConfig, QuantSpec, RangeOverride
from qwrap.errors import ConfigError
from qwrap.model.layout import Layout
from qwrap.numerics import QParams, choose_qparams, round_scale, shrink_into
from qwrap.quant.bounds import bounds_of
from qwrap.quant.plan import Conversion, QuantPlan

Group = tuple[str, str]
"""Tensors of one scale: ("tensor", source), ("conversion", key) or ("constant", initialiser)."""


def apply_overrides(
    plan: QuantPlan, layout: Layout, config: QConfig, *, strict: bool = True
) -> None:
    """Write the overrides of ``config`` into ``plan``, in place.

    An override on a moved tensor holds for all tensors of its scale, and one on rows of a table
    for the table. A method for activations says nothing of the weights that a pattern fits too.

    Args:
        plan: what is quantized.
        layout: its graph.
        config: has the overrides.
        strict: refuse selectors that fit nothing; not so once calibration has returned nodes to
            float.

    Raises:
        ConfigError: a selector fits no quantized tensor, two contradict each other, or one cannot
            be had.
    """
    groups = _groups(plan)
    if strict:
        _require_hits(plan, layout, config.overrides, groups)
    for group, members in groups.items():
        override = _resolve(members, config.overrides)
        if override is not None and group[0] == "tensor":
            override_tensor(plan, layout, group[1], override)
        elif override is not None and group[0] == "conversion":
            _override_conversion(plan, group[1], override)
        elif override is not None:
            _override_constant(plan, group[1], override)


def _groups(plan: QuantPlan) -> dict[Group, list[str]]:
    """Return the names of the tensors that share a scale."""
    groups: dict[Group, list[str]] = {}
    for constant in plan.constants.values():
        groups.setdefault(("constant", constant.value), [constant.value])
    for _, conversion in plan.conversions():
        groups["conversion", conversion.key] = [conversion.key]
    for key, tensor in plan.tensors.items():
        group = ("tensor" if tensor.source in plan.tensors else "conversion", tensor.source)
        table = plan.table_of(tensor)
        if table is not None:
            group = ("constant", plan.constants[table].value)
        groups.setdefault(group, []).append(key)
    return groups


def _fits(selector: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if name == selector or fnmatchcase(name, selector)}


# --- one word for each group ---------------------------------------------------------------------


@dataclass(slots=True)
class _Word:
    """What was said so far, and of which tensors."""

    override: RangeOverride = field(default_factory=RangeOverride)
    said_of: set[str] = field(default_factory=set)


def _resolve(
    members: Iterable[str], overrides: Iterable[tuple[str, RangeOverride]]
) -> RangeOverride | None:
    """Return what holds for tensors of one scale, None if nothing was said of them."""
    word = _Word()
    for selector, override in overrides:
        hits = _fits(selector, members)
        if not hits:
            continue
        merged = merged_with(word.override, override)
        if word.said_of and not hits & word.said_of and merged != word.override:
            raise ConfigError(
                f"tensors {min(word.said_of)!r} and {min(hits)!r} share one scale, but "
                f"{_text(word.override)} was set for the first and {_text(override)} for the "
                "second; set only one of them, or both alike"
            )
        word = _Word(merged, word.said_of | hits)
    return word.override if word.said_of else None


def merged_with(earlier: RangeOverride, later: RangeOverride) -> RangeOverride:
    """Return the later word: a range replaces everything, a way to choose one replaces a range.

    How it is trained is a matter of its own.
    """
    if later == RangeOverride():
        return later
    training = later.training or earlier.training
    if later == RangeOverride(training=later.training):
        return replace(earlier, training=training)
    if has_range(later):
        return replace(later, training=training)
    return RangeOverride(
        method=later.method or earlier.method,
        percentile=later.percentile or earlier.percentile,
        training=training,
    )


def has_range(override: RangeOverride) -> bool:
    """Whether the override gives a range or a scale, so that no data is needed."""
    return override.low is not None or override.scale is not None


def _text(override: RangeOverride) -> str:
    names = RangeOverride.__dataclass_fields__
    given = {name: getattr(override, name) for name in names}
    return ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)


def _require_hits(
    plan: QuantPlan,
    layout: Layout,
    overrides: Iterable[tuple[str, RangeOverride]],
    groups: Mapping[Group, list[str]],
) -> None:
    names = list(dict.fromkeys(name for members in groups.values() for name in members))
    biases = {bias.value for bias in plan.biases.values()}
    constants = {constant.value for constant in plan.constants.values()}
    for selector, override in overrides:
        hits = _fits(selector, names)
        if hits and hits <= constants and override.method not in (None, *WEIGHT_METHODS):
            raise ConfigError(
                f"set {selector!r}: method={override.method!r} is not for weights and constants; "
                f"choose one of {WEIGHT_METHODS}"
            )
        if hits:
            continue
        nearest = difflib.get_close_matches(selector, names, 1, cutoff=0.0)
        hint = f"; the nearest name is {nearest[0]!r}" if nearest else "; no tensor is quantized"
        if _fits(selector, biases):
            why = "fits only biases, whose scale is that of the activation times the weight's"
        elif _fits(selector, layout.graph.values):
            why = "fits only tensors that are not quantized (plan.summary() says why)"
        else:
            why = "fits no tensor"
        raise ConfigError(f"set {selector!r}: {why}{hint}")


# --- what it means -------------------------------------------------------------------------------


def override_tensor(plan: QuantPlan, layout: Layout, source: str, override: RangeOverride) -> None:
    """Write what was said of a tensor's range, or how it is chosen, into ``plan``, in place."""
    tensor = plan.tensors[source]
    fixed = tensor.fixed
    if has_range(override):
        qparams = _within_bounds(
            qparams_of(source, override, tensor.spec), tensor.spec, plan, layout, source, override
        )
        fixed = float(qparams.scale), int(qparams.zero_point)
        _require_kernel(plan, layout, source, fixed)
    for key, moved in plan.tensors.items():
        if moved.source == source:
            plan.tensors[key] = replace(moved, override=override, fixed=fixed)


def _override_conversion(plan: QuantPlan, key: str, override: RangeOverride) -> None:
    for name, tensor in plan.tensors.items():
        plan.tensors[name] = replace(
            tensor,
            override=override if tensor.source == key else tensor.override,
            conversions=tuple(
                _overridden(c, override) if c.key == key else c for c in tensor.conversions
            ),
        )


def _overridden(conversion: Conversion, override: RangeOverride) -> Conversion:
    if not has_range(override):
        return replace(conversion, override=override)
    qparams = qparams_of(conversion.key, override, conversion.spec)
    fixed = float(qparams.scale), int(qparams.zero_point)
    return replace(conversion, override=override, fixed=fixed)


def _require_kernel(plan: QuantPlan, layout: Layout, source: str, fixed: tuple[float, int]) -> None:
    """Refuse another scale than the one for which the tensor's kernel computes what it should."""
    node, tensor = layout.graph.values[source].producer(), plan.tensors[source]
    if node is None or tensor.fixed in (None, fixed) or tensor.spec.dtype.bits != 8:
        return  # only codes of 8 bits have integer kernels
    if plan.nodes[layout.graph.node_key(node)].role == "integer":
        raise ConfigError(
            f"tensor {source!r}: the integer kernel of {node.op_type} is right only for "
            f"scale={tensor.fixed[0]:g} and zero_point={tensor.fixed[1]}; leave them, or exclude "
            f"node {layout.graph.node_key(node)!r}"
        )


def _within_bounds(
    qparams: QParams,
    spec: QuantSpec,
    plan: QuantPlan,
    layout: Layout,
    source: str,
    override: RangeOverride,
) -> QParams:
    """Return ``qparams`` with no code beyond what an absorbed activation lets through."""
    node = layout.graph.values[source].producer()
    if node is None or plan.nodes[layout.graph.node_key(node)].role != "absorbed":
        return qparams
    bounds = bounds_of(layout.values, node)
    assert bounds is not None
    if override.low is not None and override.high is not None:
        low, high = max(override.low, bounds[0]), min(override.high, bounds[1])
        inside = choose_qparams(torch.tensor(low), torch.tensor(high), spec)
        return shrink_into(inside, *bounds, spec.as_computed())
    shrunk = shrink_into(qparams, *bounds, spec.as_computed())
    if abs(float(shrunk.scale / qparams.scale) - 1) > 1e-6:  # more than float32 rounding
        raise ConfigError(
            f"tensor {source!r}: {_text(override)} has codes outside of {list(bounds)}, what "
            f"{node.op_type} {layout.graph.node_key(node)!r} lets through; give a scale and zero "
            "point within it, or low and high, which are cut to it"
        )
    return shrunk


def _override_constant(plan: QuantPlan, value: str, override: RangeOverride) -> None:
    for point, constant in plan.constants.items():
        if constant.value == value:
            if has_range(override):
                qparams_of(value, override, constant.spec)  # refuses what cannot be had
            plan.constants[point] = replace(constant, override=override)


def qparams_of(name: str, override: RangeOverride, spec: QuantSpec) -> QParams:
    """Return the one scale and zero point that an override with a range stands for.

    Args:
        name: the tensor, for messages.
        override: has a range or a scale.
        spec: how the tensor is quantized.

    Raises:
        ConfigError: they cannot be had with ``spec``.
    """
    if override.low is not None and override.high is not None:
        if not (math.isfinite(override.low) and math.isfinite(override.high)):
            raise ConfigError(f"tensor {name!r}: {_text(override)}: both ends must be finite")
        whole = replace(spec, axis=None, block_size=None)
        return choose_qparams(torch.tensor(override.low), torch.tensor(override.high), whole)
    assert override.scale is not None
    scale = _storable(name, override.scale, spec)
    return QParams(scale, torch.tensor([_zero_point(name, override, spec)], dtype=torch.int32))


def _storable(name: str, scale: float, spec: QuantSpec) -> torch.Tensor:
    given = torch.tensor([scale], dtype=torch.float32)
    if not (given.isfinite().all() and given > 0):
        raise ConfigError(f"tensor {name!r}: scale={scale} is not a positive float32")
    stored = round_scale(given, spec).to(torch.float32)
    if (spec.power_of_two or spec.scale_type == "float8e8m0") and float(stored) != float(given):
        raise ConfigError(
            f"tensor {name!r}: scale={scale} is not a power of two, as its spec wants; give "
            f"{float(stored)} or half of that"
        )
    return stored


def _zero_point(name: str, override: RangeOverride, spec: QuantSpec) -> int:
    one = torch.ones(())
    middle = int(choose_qparams(-one, one, replace(spec, axis=None, block_size=None)).zero_point)
    given, kind = override.zero_point, spec.dtype
    if spec.symmetric:
        if given not in (None, middle):
            why = "has none" if not kind.has_zero_point else f"is symmetric and has only {middle}"
            raise ConfigError(f"tensor {name!r}: zero_point={given}, but its {kind} {why}")
        return middle
    if given is None:
        raise ConfigError(
            f"tensor {name!r}: scale={override.scale} needs a zero_point, as its {kind} is "
            "asymmetric; or give low and high"
        )
    if not kind.qmin <= given <= kind.qmax:
        raise ConfigError(
            f"tensor {name!r}: zero_point={given} lies outside of {kind}, {kind.qmin} … {kind.qmax}"
        )
    if spec.restricted and given not in (kind.qmin, middle):
        raise ConfigError(
            f"tensor {name!r}: zero_point={given}, but its spec is restricted to {kind.qmin} and "
            f"{middle}"
        )
    return given
