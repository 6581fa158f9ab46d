"""The terms that the latency of an assignment is the sum of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwrap.mixed.choices import FLOAT, Assignment, Choice, Edge, Group
from qwrap.mixed.cost.attribution import Attribution
from qwrap.mixed.cost.owners import Border
from qwrap.quant.placement.cost import dequantize_cost, integer_layout_cost, quantize_cost

FLOAT32 = FLOAT.activation
Pair = tuple[str, str]
Term = tuple[Any, ...]

MICRO, NANO = 1e-6, 1e-9


@dataclass(frozen=True, slots=True)
class Timed:
    """What was measured of one file.

    Attributes:
        assignment: what it was made for.
        seconds: of one run.
        shares: of its kernels; None if only the whole was timed.
    """

    assignment: Assignment
    seconds: float
    shares: Attribution | None = None


@dataclass(slots=True)
class Parts:
    """The terms that a latency is the sum of.

    Attributes:
        seconds: (group, choice) -> seconds.
        edges: what conversions cost.
        constant: what every assignment pays.
        known: (tensor, pair) of the conversions that were measured; the others are guessed.
    """

    seconds: dict[tuple[str, Choice], float]
    edges: list[Edge]
    constant: float
    known: set[tuple[str, Pair]] = field(default_factory=set)

    def terms(self, assignment: Assignment) -> list[Term]:
        """Return the terms that an assignment pays, see ``value``."""
        found: list[Term] = [("constant",)]
        found += [("choice", name, choice) for name, choice in assignment.items()]
        for edge in self.edges:
            source, readers = types_at(edge.producer, edge.consumers, assignment)
            found += [
                ("edge", edge.tensor, (source, reader))
                for reader in readers
                if (source, reader) in edge.costs
            ]
        return found

    def values(self) -> dict[Term, float]:
        """Return every term with its seconds."""
        found: dict[Term, float] = {("constant",): self.constant}
        found |= {("choice", *key): value for key, value in self.seconds.items()}
        for edge in self.edges:
            found |= {("edge", edge.tensor, pair): cost for pair, cost in edge.costs.items()}
        return found

    def with_values(self, values: Mapping[Term, float]) -> Parts:
        """Return the same terms with other seconds."""
        edges = [
            Edge(
                edge.tensor,
                edge.producer,
                edge.consumers,
                {pair: values["edge", edge.tensor, pair] for pair in edge.costs},
            )
            for edge in self.edges
        ]
        seconds = {(name, c): values["choice", name, c] for name, c in self.seconds}
        return Parts(seconds, edges, values["constant",], self.known)


def types_at(
    producer: str | None, consumers: Iterable[str | None], assignment: Assignment
) -> tuple[str, list[str]]:
    """Return the type of a tensor's producer, and the other ones that its readers want."""
    source = FLOAT32 if producer is None else assignment[producer].activation
    wanted = [FLOAT32 if c is None else assignment[c].activation for c in consumers]
    return source, [kind for kind in dict.fromkeys(wanted) if kind != source]


def pairs_of(border: Border, groups: Mapping[str, Group]) -> list[Pair]:
    """Return the conversions that some assignment has on a tensor."""

    def kinds(name: str | None) -> list[str]:
        choices = () if name is None else groups[name].choices
        return [FLOAT32] if name is None else [choice.activation for choice in choices]

    wanted = [kind for consumer in border.consumers for kind in kinds(consumer)]
    pairs = [(a, b) for a in kinds(border.producer) for b in wanted if a != b]
    return list(dict.fromkeys(pairs))


def static_conversion(pair: Pair, elements: int) -> float:
    """Return seconds of a conversion, as the cost model of the placement has them."""
    source, reader = pair
    cost = 0.0
    if not source.startswith("float"):
        cost += dequantize_cost(elements)
    if not reader.startswith("float"):
        cost += quantize_cost(elements)
    if source.startswith("float") and reader.startswith("float"):
        cost = quantize_cost(elements)  # a Cast
    return (cost + integer_layout_cost(elements)) * NANO
