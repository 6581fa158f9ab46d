"""Costs that add up over the groups of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qwrap.errors import ConfigError
from qwrap.mixed.choices import FLOAT, Assignment, Choice, Edge, Group

_ROUNDING = 1e-9  # relative; by as much a sum of floats may exceed a limit


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCost:
    """What an assignment costs: a sum over groups, and over tensors that are converted.

    Attributes:
        name: of the cost, such as "bytes".
        of: (name of a group, choice) -> cost.
        edges: tensors between groups.
        fixed: what it costs whatever is chosen.
    """

    name: str
    of: Mapping[tuple[str, Choice], float]
    edges: Sequence[Edge] = ()
    fixed: float = 0.0

    def __post_init__(self) -> None:
        for (name, choice), value in self.of.items():
            if not np.isfinite(value):
                raise ConfigError(
                    f"{self.name} of group {name!r} as {choice} is {value}; a choice that is not "
                    "finite cannot be weighed: leave it out"
                )
        for edge in self.edges:
            if not all(np.isfinite(value) and value >= 0 for value in edge.costs.values()):
                raise ConfigError(f"{self.name} of conversions of {edge.tensor!r}: below 0")

    def total(self, assignment: Assignment) -> float:
        """Return the cost of an assignment."""
        own = sum(self.of[name, choice] for name, choice in assignment.items())
        return self.fixed + own + sum(_converted(edge, assignment) for edge in self.edges)

    def check(self, groups: Sequence[Group]) -> None:
        """Refuse groups of which a choice has no cost.

        Raises:
            ConfigError: the error names the first.
        """
        for group in groups:
            for choice in group.choices:
                if (group.name, choice) not in self.of:
                    raise ConfigError(f"{self.name} of group {group.name!r} as {choice}: unknown")


def _converted(edge: Edge, assignment: Assignment) -> float:
    source = _activation(edge.producer, assignment)
    types = {_activation(name, assignment) for name in edge.consumers}
    return sum(edge.costs.get((source, kind), 0.0) for kind in sorted(types - {source}))


def _activation(name: str | None, assignment: Assignment) -> str:
    return FLOAT.activation if name is None else assignment[name].activation


@dataclass(frozen=True, slots=True)
class Limit:
    """The most, above 0, that an assignment may cost."""

    cost: LinearCost
    most: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.most) and self.most > 0):
            raise ConfigError(f"{self.cost.name} of {self.most}: a limit has to be above 0")

    def holds(self, assignment: Assignment) -> bool:
        """Whether an assignment is within the limit, but for rounding."""
        return self.cost.total(assignment) <= self.most * (1 + _ROUNDING)
