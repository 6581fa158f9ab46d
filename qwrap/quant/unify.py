"""One scale for tensors that are joined, where none of them loses much by it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from qwrap.graph.index import OnnxGraph
from qwrap.quant.plan import QuantPlan
from qwrap.quant.sources import source_of

LARGEST_LOSS = 2.0  # steps may grow so far, which costs one bit: beyond, a box hides a score

Range = tuple[float, float]


def unify_joined(
    plan: QuantPlan,
    graph: OnnxGraph,
    ranges: Mapping[str, Range],
    fixed: Mapping[str, Range] | None = None,
    most: float = LARGEST_LOSS,
    operators: Collection[str] = ("Concat",),
) -> dict[str, Range]:
    """Return the ranges, with a common one for the inputs and output of Concats that allow it.

    onnxruntime copies codes of equal scale; others it translates one by one, which takes almost
    twice as long. Concats that share a tensor are taken together, as far as the limit lets them.
    Fixed members keep what they have: the others take over their range if it holds all of theirs.

    Args:
        plan: what is quantized.
        graph: its graph.
        ranges: source tensor -> chosen range.
        fixed: source tensor -> range that must not change.
        most: how many times as large steps may become; infinite where joined tensors have to have
            one scale.
        operators: types of the operators that this is about.
    """
    given = {**ranges, **(fixed or {})}
    result = dict(given)
    groups: dict[str, set[str]] = {key: {key} for key in given}
    for members in joined(plan, graph, operators):
        known = [key for key in members if key in groups]
        together = set[str]().union(*(groups[key] for key in known))
        common = _common(plan, together, result, fixed or {})
        if len(known) < len(members) or common is None:
            continue
        free = [key for key in together if key in ranges]
        if all(_width(common) <= most * _width(ranges[key]) for key in free):
            for key in together:
                groups[key] = together
                result[key] = common
    return {key: result[key] for key in ranges}


def _common(
    plan: QuantPlan,
    members: Collection[str],
    ranges: Mapping[str, Range],
    fixed: Mapping[str, Range],
) -> Range | None:
    """Return the range that could hold for all members, None if there is none."""
    union = _union([ranges[key] for key in members])
    dictated = {fixed[key] for key in members if key in fixed}
    if not dictated:
        return union
    (low, high), *others = dictated
    bits = max(plan.tensors[key].spec.dtype.bits for key in members)
    slack = (high - low) / 2 ** (bits + 1)  # half a step: what is so far beyond rounds to the end
    holds = low - slack <= union[0] and union[1] <= high + slack
    return (low, high) if holds and not others else None


def joined(plan: QuantPlan, graph: OnnxGraph, operators: Collection[str]) -> list[set[str]]:
    """Return for every such node in integers the source tensors it reads and writes."""
    found = []
    for key, node in plan.nodes.items():
        if node.op_type in operators and node.role == "integer":
            inputs = [(i, v) for i, v in enumerate(graph.nodes[key].inputs) if v is not None]
            sources = [plan.read_by(key, i, graph.key(v)) for i, v in inputs]
            sources.append(source_of(plan, graph, graph.nodes[key].outputs[0]))
            found.append({source for source in sources if source is not None})
    return found


def _union(ranges: Sequence[Range]) -> Range:
    return min((r[0] for r in ranges), default=0.0), max((r[1] for r in ranges), default=0.0)


def _width(span: Range) -> float:
    return max(span[1], 0.0) - min(span[0], 0.0) or 1e-30
