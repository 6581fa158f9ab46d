"""Where a model is cut into units that are trained one after the other."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from qwrap.model.alive import Step, may_be_float, steps
from qwrap.model.points import UsePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.ops.traits import WEIGHTED
from qwrap.quant.plan import Use
from qwrap.quant.prepare import plan_of, stub_at
from qwrap.quant.stubs import Stub
from qwrap.reconstruct.soft_round import unlearnable

Granularity = Literal["layer", "block"]
LARGEST = 8  # weights; a stretch with more is cut at the next best places too
SMALLEST = 3  # weights; neighbours in a chain are joined to that many


@dataclass(frozen=True, slots=True)
class Weight:
    """A quantized weight.

    Attributes:
        value: initialiser.
        uses: where it is read.
    """

    value: str
    uses: tuple[Use, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """A stretch of the nodes of the main graph, in the order in which they run.

    Attributes:
        inputs: activations that it reads.
        outputs: activations that it makes for later units, or that are graph outputs.
        alive: activations that this unit or a later one reads.
        weights: those whose rounding may be learned, each in one unit only.
        nodes: keys of the nodes in it that make activations.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    alive: frozenset[str]
    weights: tuple[Weight, ...]
    nodes: tuple[str, ...]


def find_units(model: WrappedModel, granularity: Granularity) -> tuple[list[Unit], list[str]]:
    """Return the units of a prepared model in order, and which weights are in none of them and why.

    A "layer" is one node with a weight and all up to the next: what is added to its product, and
    the activation function. A "block" ends where as few activations as possible are alive: behind a
    residual block, or one half of a transformer layer; layers in a chain are joined by threes, and
    where skips run far, a stretch of more than eight layers is cut again at the next best places.
    Any activation that is alive at a cut may be the input of a later unit, so that each takes as
    many as it needs.

    Args:
        model: prepared.
        granularity: how large the units are.

    Source: Li et al., arXiv:2102.05426, section 3.2, for the granularities.
    """
    weights, left_out = _weights(model)
    found = steps(model.layout)
    owner = {use[0]: weight for weight in weights for use in weight.uses}
    key = model.graph.node_key
    layers = [i for i, step in enumerate(found) if key(step.node) in owner]
    cuts = _layer_cuts(found, layers)
    widths = [_width(model, found[cut]) for cut in cuts]
    if granularity == "block":
        ends_of_blocks = list(_block_cuts(widths, 0, len(cuts), whole=True))
        cuts = [cuts[i] for i in _joined(ends_of_blocks, len(layers))]
    ends = [-1, *cuts, len(found) - 1]
    stretches = [found[a + 1 : b + 1] for a, b in pairwise(ends)]
    return _made(model, stretches, weights, left_out)


def _made(
    model: WrappedModel,
    stretches: Sequence[Sequence[Step]],
    weights: Iterable[Weight],
    left_out: Counter[str],
) -> tuple[list[Unit], list[str]]:
    graph = model.graph
    place = {graph.node_key(step.node): i for i, part in enumerate(stretches) for step in part}
    inside: dict[int, list[Weight]] = defaultdict(list)
    for weight in weights:
        places = {place[node] for node, _ in weight.uses}
        if len(places) == 1:
            inside[places.pop()].append(weight)
        else:
            left_out["are shared by several units"] += 1
    given = {graph.key(value) for value in graph.outputs}
    result = []
    alive: frozenset[str] = frozenset()
    for i, part in enumerate(stretches):
        if part:
            result.append(_unit(model, part, alive, given, inside[i]))
            alive = part[-1].alive
    return result, [f"{count} weights {reason}" for reason, count in left_out.items()]


def _unit(
    model: WrappedModel,
    part: Sequence[Step],
    alive: frozenset[str],
    given: set[str],
    weights: Sequence[Weight],
) -> Unit:
    made = [key for step in part for key in step.made]
    needed = frozenset[str]().union(*(step.needs for step in part)) - set(made)
    outputs = [key for key in made if key in part[-1].alive or key in given]
    nodes = tuple(model.graph.node_key(step.node) for step in part if step.made)
    return Unit(tuple(sorted(needed)), tuple(outputs), alive, tuple(weights), nodes)


# --- weights -------------------------------------------------------------------------------------


def _weights(model: WrappedModel) -> tuple[list[Weight], Counter[str]]:
    """Return the weights whose rounding can be learned, and why others cannot, counted."""
    plan = plan_of(model)
    uses: dict[str, list[Use]] = defaultdict(list)
    holders: dict[Stub, set[str]] = defaultdict(set)
    for use, constant in plan.constants.items():
        holders[stub_at(model, UsePoint(*use))].add(constant.value)
        if (model.graph.types[constant.value].rank or 0) > 1:
            uses[constant.value].append(use)
    shared = {value for values in holders.values() if len(values) > 1 for value in values}
    main = {model.graph.node_key(node) for node in model.layout.region.nodes()}
    left_out: Counter[str] = Counter()
    result = []
    for value, found in uses.items():
        reason = _obstacle(model, value, found, main)
        reason = "share their scale with others" if value in shared else reason
        if reason:
            left_out[reason] += 1
        else:
            result.append(Weight(value, tuple(found)))
    return result, left_out


def _obstacle(model: WrappedModel, value: str, uses: Sequence[Use], main: set[str]) -> str:
    """Return why the rounding of a weight is not learned, empty where it is."""
    graph = model.graph
    others = {graph.nodes[node].op_type for node, _ in uses} - WEIGHTED.keys()
    if others:
        return f"of {', '.join(sorted(others))}: only those of {', '.join(WEIGHTED)} are learned"
    if any(node not in main for node, _ in uses):
        return "are inside the body of an If, Loop or Scan"
    if unfit := unlearnable(stub_at(model, UsePoint(*uses[0])).spec):
        return f"are left alone: {unfit}"
    if value in model.remade:
        return "have a live batch normalization; fold it first"
    if not _is_alike([stub_at(model, UsePoint(*use)) for use in uses]):
        return "are read with several scales"
    if len(list(graph.values[value].uses())) > len(uses) or graph.values[value].is_graph_output():
        return "are read as floats elsewhere"
    if not isinstance(model.stored(value), nn.Parameter):
        return "are no parameters"
    return ""


def _is_alike(stubs: Sequence[Stub]) -> bool:
    """Whether stubs give the same codes."""
    first = stubs[0]
    return all(
        stub.spec == first.spec
        and torch.equal(stub.scale.nan_to_num(), first.scale.nan_to_num())
        and torch.equal(stub.zero_point, first.zero_point)
        for stub in stubs[1:]
    )


# --- cuts ----------------------------------------------------------------------------------------


def _width(model: WrappedModel, step: Step) -> int:
    return sum(may_be_float(model.layout, key) for key in step.alive)


def _layer_cuts(found: Sequence[Step], layers: Sequence[int]) -> list[int]:
    """Return the best place to cut between each two layers: the index of the step before it.

    It is the last of those with the fewest activations alive that an operator computed.
    """
    cuts = []
    for first, second in pairwise(layers):
        between = range(first, second)
        fewest = min(len(found[i].alive) for i in between)
        best = [i for i in between if len(found[i].alive) == fewest and found[i].made]
        computed = [i for i in best if not found[i].moves]
        cuts.append((computed or best or [second - 1])[-1])
    return cuts


def _block_cuts(widths: Sequence[int], first: int, last: int, *, whole: bool) -> Iterator[int]:
    """Yield which of the cuts between layers ``first`` to ``last`` to make, in order.

    Args:
        widths: of every cut, how many activations are alive there.
        first: a layer.
        last: the same; cut i is behind layer i.
        whole: whether to cut at all costs, and not only a stretch that is too long.
    """
    if first == last or (last - first < LARGEST and not whole):
        return
    fewest, start = min(widths[first:last]), first
    for cut in range(first, last):
        if widths[cut] == fewest:
            yield from _block_cuts(widths, start, cut, whole=False)
            yield cut
            start = cut + 1
    yield from _block_cuts(widths, start, last, whole=False)


def _joined(cuts: Sequence[int], layers: int) -> list[int]:
    """Return ``cuts`` without those between neighbours that are small together."""
    kept: list[int] = []
    for cut, following in zip(cuts, [*cuts[1:], layers - 1], strict=False):
        start = kept[-1] + 1 if kept else 0
        if following + 1 - start > SMALLEST:
            kept.append(cut)
    return kept
