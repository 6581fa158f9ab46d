"""One scale for tensors that are joined, where none of them loses much by it."""

from __future__ import annotations

from collections.abc import Sequence

from qwrap.graph.index import OnnxGraph
from qwrap.quant.plan import QuantPlan
from qwrap.quant.sources import source_of

LARGEST_LOSS = 2.0  # steps may grow so far, which costs one bit: beyond, a box hides a score

Range = tuple[float, float]


def unify_joined(plan: QuantPlan, graph: OnnxGraph, ranges: dict[str, Range]) -> dict[str, Range]:
    """Return the ranges, with a common one for the inputs and output of Concats that allow it.

    onnxruntime copies codes of equal scale; others it translates one by one, which takes almost
    twice as long. Concats that share a tensor are taken together, as far as the limit lets them.

    Args:
        plan: what is quantized.
        graph: its graph.
        ranges: source tensor -> chosen range.
    """
    result = dict(ranges)
    groups: dict[str, set[str]] = {key: {key} for key in ranges}
    for members in _joined(plan, graph):
        known = [key for key in members if key in groups]
        together = set().union(*(groups[key] for key in known)) if known else set()
        low, high = _union([result[key] for key in together])
        loss = max((_width((low, high)) / _width(ranges[key]) for key in together), default=0.0)
        if len(known) == len(members) and loss <= LARGEST_LOSS:
            for key in together:
                groups[key] = together
                result[key] = low, high
    return result


def _joined(plan: QuantPlan, graph: OnnxGraph) -> list[set[str]]:
    """Return for every integer Concat the source tensors it reads and writes."""
    found = []
    for key, node in plan.nodes.items():
        if node.op_type == "Concat" and node.role == "integer":
            values = (*graph.nodes[key].inputs, *graph.nodes[key].outputs)
            sources = [source_of(plan, graph, v) for v in values if v is not None]
            found.append({source for source in sources if source is not None})
    return found


def _union(ranges: Sequence[Range]) -> Range:
    return min((r[0] for r in ranges), default=0.0), max((r[1] for r in ranges), default=0.0)


def _width(span: Range) -> float:
    return max(span[1], 0.0) - min(span[0], 0.0) or 1e-30
