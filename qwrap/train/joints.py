"""Inner tensors at which a quantized model is worth comparing with the float one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qwrap.model.alive import may_be_float, steps
from qwrap.model.layout import Layout

MOST = 16  # tensors; beside them the float model's have to stay in memory for a step
LONGEST = 0.25  # of the layers: the stretch that may lie between two of them


@dataclass(frozen=True, slots=True)
class _Step:
    """What is there once a node has run.

    Attributes:
        value: the activation it made.
        width: activations that later nodes still read.
        layers: nodes with a weight of two or more axes that have run.
        moves: whether the node only moved values.
        is_joint: whether the activation is read again, and is no graph output.
    """

    value: str
    width: int
    layers: int
    moves: bool
    is_joint: bool


def joints(layout: Layout, most: int = MOST) -> list[str]:
    """Return activations through which much of the graph goes, in order, at most ``most``.

    Where a single activation that depends on weights is alive, all that was computed before goes
    through it: the ends of residual blocks, of transformer layers, of steps in a chain. In a graph
    with long skips or branches, where a quarter of the layers would be without one, activations
    beside others count too. Of those between the same two layers the last one is taken that an
    operator computed. Graph outputs are not among them, nor what no layer follows.

    Args:
        layout: of the model.
        most: how many at most; they are then evenly spaced, the last ones included.
    """
    made = list(_steps(layout))
    total = max((step.layers for step in made), default=0)
    inner = [step for step in made if step.is_joint and 0 < step.layers < total]
    found: list[_Step] = []
    for width in sorted({step.width for step in inner}):
        found = _between_layers([step for step in inner if step.width <= width])
        ends = [0, *(step.layers for step in found), total]
        if max(b - a for a, b in pairwise(ends)) <= max(LONGEST * total, 1):
            break
    stride = -(-len(found) // most) or 1
    return [step.value for step in found[::-1][::stride][::-1]]


def _between_layers(steps: Sequence[_Step]) -> list[_Step]:
    """Return one step for each number of layers before it: the last that computed something."""
    best: dict[int, _Step] = {}
    for step in steps:
        if step.layers not in best or not step.moves or best[step.layers].moves:
            best[step.layers] = step
    return list(best.values())


def _steps(layout: Layout) -> Iterator[_Step]:
    """Yield a step for every node of the main graph that makes an activation from weights."""
    given = {layout.graph.key(value) for value in layout.graph.outputs}
    layers = 0
    for step in steps(layout):
        layers += step.has_weight
        if step.made:
            alive = {key for key in step.alive if may_be_float(layout, key)}
            is_joint = step.made[0] in alive and step.made[0] not in given
            yield _Step(step.made[0], len(alive - given), layers, step.moves, is_joint)
