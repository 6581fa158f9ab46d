"""From what was observed, and from weights, to every scale of a prepared model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qwrap.config import QuantSpec, RangeOverride
from qwrap.model.points import UsePoint, ValuePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams, choose_qparams, shrink_into
from qwrap.ops.traits import OUTPUT_RANGES
from qwrap.quant.bounds import bounds_of, operator_qparams
from qwrap.quant.constants import fit_biases
from qwrap.quant.observe.observers import Observer
from qwrap.quant.placement.overrides import has_range, qparams_of
from qwrap.quant.plan import Conversion, Ends
from qwrap.quant.prepare import config_of, plan_of, stub_at, stubs
from qwrap.quant.ranges import candidate_ranges, choose_ranges
from qwrap.quant.stubs import Stub
from qwrap.quant.unify import LARGEST_LOSS, Range, unify_joined
from qwrap.targets import find_target

FILLED = 7 / 8  # of an operator's range: from there on all of it costs less than a fifth of a bit

Way = tuple[str, float]
"""How a range is chosen: method and percentile."""


# --- activations ---------------------------------------------------------------------------------


def watched(model: WrappedModel) -> dict[str, Stub]:
    """Return the stubs of the tensors whose range is chosen from data, by tensor."""
    return {stub.name: stub for _, stub in stubs(model) if stub.observer is not None}


def ways_of(model: WrappedModel) -> dict[str, Way]:
    """Return how the range of every watched tensor is to be chosen."""
    plan, config = plan_of(model), config_of(model)
    result: dict[str, Way] = {}
    for key in watched(model):
        override = plan.tensors[key].override or RangeOverride()
        result[key] = override.method or config.method, override.percentile or config.percentile
    return result


def ranges_by(model: WrappedModel, ways: Mapping[str, Way]) -> dict[str, Range]:
    """Return the range of every tensor in ``ways``, chosen from what its observer saw.

    Raises:
        NotCalibratedError: an observer saw no value.
        ConfigError: a method needs a statistic that was not kept.
    """
    found = watched(model)
    ranges = choose_ranges(
        [_observer(found[key]) for key in ways],
        [found[key].spec for key in ways],
        [method for method, _ in ways.values()],
        [percentile for _, percentile in ways.values()],
        config_of(model).margin,
    )
    return {key: _numbers(ends) for key, ends in zip(ways, ranges, strict=True)}


def candidates_by(model: WrappedModel, ways: Mapping[str, Way]) -> dict[str, dict[str, Range]]:
    """Return for every tensor in ``ways`` what each method chooses, with the percentile given.

    Raises:
        NotCalibratedError: an observer saw no value.
    """
    found = watched(model)
    ranges = candidate_ranges(
        [_observer(found[key]) for key in ways],
        [found[key].spec for key in ways],
        [percentile for _, percentile in ways.values()],
        margin=config_of(model).margin,
    )
    return {
        key: {method: _numbers(ends) for method, ends in choices.items()}
        for key, choices in zip(ways, ranges, strict=True)
    }


def _numbers(ends: tuple[Tensor, Tensor]) -> Range:
    low, high = (float(end) for end in ends)
    return low, high


def _observer(stub: Stub) -> Observer:
    assert stub.observer is not None
    return stub.observer


@torch.no_grad()
def set_activations(
    model: WrappedModel,
    ranges: Mapping[str, Range],
    given: Mapping[str, QParams] | None = None,
    converted: Mapping[str, QParams] | None = None,
) -> None:
    """Give every activation its scale, and make room for the biases, in place.

    Args:
        model: prepared; its weights have their scales.
        ranges: watched tensor -> what its codes should cover.
        given: watched tensor -> the scale itself, for those not in ``ranges``.
        converted: key of a conversion -> its scale, where it is not to follow from the tensor's.
    """
    plan = plan_of(model)
    exact: dict[tuple[Range, QuantSpec], QParams] = {}
    fixed: dict[str, Range] = {}
    for key, qparams in {**_dictated(model), **(given or {})}.items():
        stub = stub_at(model, ValuePoint(key))
        stub.set_qparams(qparams, limit_of(model, key, qparams))
        fixed[key] = span_of(qparams, stub.spec)
        exact[fixed[key], stub.spec] = qparams
    ranges = {key: with_ends(span, plan.tensors[key].ends) for key, span in ranges.items()}
    wanted = dict(ranges)
    for key, span in ranges.items():
        spec = stub_at(model, ValuePoint(key)).spec
        whole = _operator_qparams(model, key, span, spec)
        if whole is not None:
            wanted[key] = span_of(whole, spec)
            exact[wanted[key], spec] = whole
    for key, span in _unified(model, wanted, fixed).items():
        stub = stub_at(model, ValuePoint(key))
        qparams = exact.get((span, stub.spec)) or _spread(span, stub.spec)
        stub.set_qparams(cut_to_bounds(model, key, qparams), limit_of(model, key, qparams))
    _set_tables(model)
    _set_conversions(model, converted or {})
    fit_biases(model)


def _unified(
    model: WrappedModel, ranges: Mapping[str, Range], fixed: Mapping[str, Range]
) -> dict[str, Range]:
    """Return the ranges with common ones where the target wants that, or where it costs little."""
    plan, operators = plan_of(model), find_target(config_of(model).target).unified
    result = unify_joined(plan, model.graph, ranges, fixed, math.inf, operators)
    return unify_joined(plan, model.graph, result, fixed, LARGEST_LOSS, {"Concat"} - operators)


def activation_qparams(model: WrappedModel, key: str, span: Range) -> QParams:
    """Return the scale that a watched tensor gets for a range, if no Concat has a say in it."""
    spec = stub_at(model, ValuePoint(key)).spec
    return cut_to_bounds(
        model, key, _operator_qparams(model, key, span, spec) or _spread(span, spec)
    )


def with_ends(span: Range, ends: Ends) -> Range:
    """Return a range with the end that the user said in place of what was observed."""
    low, high = (own if said is None else said for own, said in zip(span, ends, strict=True))
    return min(low, high), max(low, high)


def _spread(span: Range, spec: QuantSpec) -> QParams:
    return choose_qparams(torch.tensor(span[0]), torch.tensor(span[1]), spec)


def cut_to_bounds(model: WrappedModel, key: str, qparams: QParams) -> QParams:
    """Return ``qparams`` with the scale reduced so that no code lies beyond ``bounds_at``.

    Where an end is 0 only the zero point can see to that, and no scale.
    """
    grid = stub_at(model, ValuePoint(key)).grid
    low, high = bounds_at(model, key)
    reach = span_of(qparams, grid)
    low = -math.inf if low == 0 > reach[0] else low
    high = math.inf if high == 0 < reach[1] else high
    return shrink_into(qparams, low, high, grid)


def limit_of(model: WrappedModel, key: str, qparams: QParams) -> float:
    """Return the largest scale with which no code lies beyond ``bounds_at``."""
    if not any(map(math.isfinite, bounds_at(model, key))):
        return math.inf
    widest = torch.full_like(qparams.scale, torch.finfo(torch.float32).max)
    scale = float(cut_to_bounds(model, key, replace(qparams, scale=widest)).scale)
    return scale if scale < float(widest) else math.inf


def _dictated(model: WrappedModel) -> dict[str, QParams]:
    """Return the scales that operators and the user dictate, by tensor."""
    fixed = {key: tensor.fixed for key, tensor in plan_of(model).sources().items()}
    return {
        key: QParams(torch.tensor([pair[0]]), torch.tensor([pair[1]], dtype=torch.int32))
        for key, pair in fixed.items()
        if pair is not None
    }


def span_of(qparams: QParams, spec: QuantSpec) -> Range:
    """Return the smallest and largest value that there are codes for."""
    scale, zero_point = qparams.scale.double(), qparams.zero_point.double()
    ends = (spec.dtype.qmin - zero_point) * scale, (spec.dtype.qmax - zero_point) * scale
    return float(ends[0].min()), float(ends[1].max())


def _operator_qparams(
    model: WrappedModel, key: str, span: Range, spec: QuantSpec
) -> QParams | None:
    """Return the scale for all that the tensor's operator can put out, if ``span`` fills it.

    Then what calibration did not show is in range too, for the least bit of resolution. A range
    that is wider than the codes (an HardSigmoid's that gets to 1) stays as observed.
    """
    node = model.graph.values[key].producer()
    if node is None or node.domain or node.op_type not in OUTPUT_RANGES:
        return None
    low, high = OUTPUT_RANGES[node.op_type]
    qparams = operator_qparams(low, high, spec)
    reach, half = span_of(qparams, spec), float(qparams.scale) / 2
    filled = span[1] - span[0] >= FILLED * (high - low)
    return qparams if filled and reach[0] - half <= span[0] and span[1] <= reach[1] + half else None


def bounds_at(model: WrappedModel, key: str) -> tuple[float, float]:
    """Return where the activation that tensor ``key`` comes out of cuts, if it was absorbed.

    onnxruntime removes it only if none of the output's codes lies outside.
    """
    if not find_target(config_of(model).target).is_cpu:
        return -math.inf, math.inf
    node = model.graph.values[key].producer()
    if node is None or plan_of(model).nodes[model.graph.node_key(node)].role != "absorbed":
        return -math.inf, math.inf
    bounds = bounds_of(model.layout.values, node)
    assert bounds is not None
    return bounds


def _set_tables(model: WrappedModel) -> None:
    """Give what is looked up in a constant table the scale of the table, in place."""
    for key, tensor in plan_of(model).tensors.items():
        if tensor.table is not None:
            table = stub_at(model, UsePoint(*tensor.table))
            stub_at(model, ValuePoint(key)).set_qparams(table.qparams)


# --- conversions ---------------------------------------------------------------------------------


def _set_conversions(model: WrappedModel, known: Mapping[str, QParams]) -> None:
    """Give each conversion the scale that suits what the codes before it stand for, in place.

    A wider type gets the range of all codes: its grid then holds each of them exactly wherever
    that of the tensor divides it, as 255 does 65535. For a narrower one the range is chosen as
    for a tensor of that type, from what was observed, within what there are codes for.
    """
    plan = plan_of(model)
    waiting = [(plan.tensors[key].source, conversion) for key, conversion in plan.conversions()]
    while waiting:  # of what was moved from a conversion there may be further ones
        unknown = {conversion.key for _, conversion in waiting}
        given = [(source, conversion) for source, conversion in waiting if source not in unknown]
        waiting = [(source, conversion) for source, conversion in waiting if source in unknown]
        spans = _narrower_spans(model, given)
        for (_, conversion), span in zip(given, spans, strict=True):
            qparams = _conversion_qparams(conversion, span, known.get(conversion.key))
            stub_at(model, conversion.points[0]).set_qparams(qparams)


def _conversion_qparams(conversion: Conversion, span: Range, known: QParams | None) -> QParams:
    override = conversion.override
    if conversion.fixed is not None:
        scale, zero_point = conversion.fixed
        return QParams(torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32))
    if override is not None and has_range(override):
        return qparams_of(conversion.key, override, conversion.spec)
    return known or _spread(with_ends(span, conversion.ends), conversion.spec)


def _narrower_spans(model: WrappedModel, given: list[tuple[str, Conversion]]) -> list[Range]:
    """Return for scales and the conversions behind them what those should cover."""
    plan, ways = plan_of(model), ways_of(model)
    bases = [stub_at(model, plan.point_of(source)) for source, _ in given]
    spans = [span_of(base.qparams, base.spec) for base in bases]
    seen = [_seen_before(model, source) for source, _ in given]
    narrower = [
        (i, stub.name, stub.observer, conversion.spec)
        for i, ((_, conversion), base, stub) in enumerate(zip(given, bases, seen, strict=True))
        if conversion.spec.dtype.bits < base.spec.dtype.bits
        and stub.observer is not None
        and stub.observer.seen
    ]
    ranges = choose_ranges(
        [observer for _, _, observer, _ in narrower],
        [spec for _, _, _, spec in narrower],
        [
            plan.methods.get(name, ways[name][0]).replace("auto", "mse")
            for _, name, _, _ in narrower
        ],
        [ways[name][1] for _, name, _, _ in narrower],
        config_of(model).margin,
    )
    for (i, *_), chosen in zip(narrower, map(_numbers, ranges), strict=True):
        spans[i] = max(spans[i][0], chosen[0]), min(spans[i][1], chosen[1])
    return spans


def _seen_before(model: WrappedModel, source: str) -> Stub:
    """Return what watches the tensor that ``source`` is, or was converted from."""
    plan = plan_of(model)
    while source not in plan.tensors:
        source = plan.tensors[next(k for k, c in plan.conversions() if c.key == source)].source
    return stub_at(model, ValuePoint(source))
