"""The choice of types as an integer linear programme, for scipy's HiGHS."""

from __future__ import annotations

import copy
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from qwrap.errors import QwrapError
from qwrap.mixed.choices import FLOAT, Choice, Edge, Group
from qwrap.mixed.search.linear import Limit, LinearCost

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint

_LARGEST = 1e4  # coefficient of the objective: the solver stops 1e-6 from the optimum
_LARGEST_IN_ROW = 1.0  # coefficient of a limit; what exceeds it by the tolerance is cut off
_INFEASIBLE = 2  # status of scipy's milp
_WHOLE = 1 - 1e-6

Row = list[tuple[int, float]]


@dataclass(slots=True)
class _Rows:
    """Inequalities ``least <= coefficients @ variables <= most``."""

    numbers: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    least: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)

    def add(self, row: Row, most: float, least: float = -np.inf) -> None:
        for column, value in row:
            self.numbers.append(len(self.most))
            self.columns.append(column)
            self.values.append(value)
        self.least.append(least)
        self.most.append(most)

    def copied(self) -> _Rows:
        return copy.deepcopy(self)

    def constraint(self, width: int) -> LinearConstraint:
        from scipy.optimize import LinearConstraint  # slow to import
        from scipy.sparse import coo_array

        shape = (len(self.most), width)
        matrix = coo_array((self.values, (self.numbers, self.columns)), shape=shape)
        return LinearConstraint(matrix.tocsr(), self.least, self.most)


class Programme:
    """One choice for each group, at the least cost.

    A variable x for each choice of each group is 1 if it is taken. A variable y for each edge and
    pair of types is 1 if the tensor is converted from the one to the other::

        y[s, t] >= x[reader, t] + x[producer, s] - 1
        sum over s of y[s, t] >= x[reader, t] - x[producer, t]

    For whole x the first says it all, and costs push y down to 0 or 1; the second brings the
    relaxation closer.
    """

    def __init__(self, groups: Sequence[Group], costs: Sequence[LinearCost]) -> None:
        self._groups = groups
        keys = [(group.name, choice) for group in groups for choice in group.choices]
        self._x = {key: column for column, key in enumerate(keys)}
        self._width = len(keys)
        self._fixed: set[int] = set()
        self._rows = _Rows()
        self._by_type: dict[str, dict[str, Row]] = defaultdict(lambda: defaultdict(list))
        for (name, choice), column in self._x.items():
            self._by_type[name][choice.activation].append((column, 1.0))
        for group in groups:
            self._rows.add([(self._x[group.name, c], 1.0) for c in group.choices], 1.0, 1.0)
        self._costs: dict[int, Row] = {}
        for cost in costs:
            if id(cost) not in self._costs:
                own = [(column, float(cost.of[key])) for key, column in self._x.items()]
                between = [term for edge in cost.edges for term in self._convert(edge)]
                self._costs[id(cost)] = own + between

    def _types(self, name: str | None) -> Sequence[str]:
        return [FLOAT.activation] if name is None else list(self._by_type[name])

    def _is_of(self, name: str | None, kind: str) -> tuple[Row, float]:
        """Return the sum of variables, and a constant, that is 1 where a group has a type."""
        if name is None:
            return [], float(kind == FLOAT.activation)
        return list(self._by_type[name].get(kind, ())), 0.0

    def _convert(self, edge: Edge) -> Iterator[tuple[int, float]]:
        """Add variables and rows for an edge; yield what each variable costs."""
        if not any(edge.costs.values()):
            return
        readers = [name for name in dict.fromkeys(edge.consumers) if name != edge.producer]
        for kind in dict.fromkeys(kind for name in readers for kind in self._types(name)):
            sources = [source for source in self._types(edge.producer) if source != kind]
            y = {source: self._width + i for i, source in enumerate(sources)}
            self._width += len(sources)
            for name in readers:
                if kind in self._types(name):
                    self._link(edge.producer, name, kind, y)
            yield from ((column, edge.costs.get((s, kind), 0.0)) for s, column in y.items())

    def _link(self, producer: str | None, reader: str | None, kind: str, y: dict[str, int]) -> None:
        reads, constant = self._is_of(reader, kind)
        for source, column in y.items():
            makes, other = self._is_of(producer, source)
            self._rows.add([*reads, *makes, (column, -1.0)], 1.0 - constant - other)
        same, other = self._is_of(producer, kind)
        less = [(column, -value) for column, value in same]
        self._rows.add([*reads, *less, *((c, -1.0) for c in y.values())], other - constant)

    def decide(self, decided: Mapping[str, Choice]) -> None:
        """Fix the choice of some groups, in place."""
        self._fixed |= {self._x[key] for key in decided.items()}

    def forbid(self, assignment: Mapping[str, Choice]) -> None:
        """Cut off one assignment, in place."""
        self._rows.add([(self._x[key], 1.0) for key in assignment.items()], len(assignment) - 1.0)

    def minimise(
        self, objective: LinearCost, limits: Sequence[Limit] = ()
    ) -> dict[str, Choice] | None:
        """Return the assignment with the least ``objective`` within ``limits``, None if none is.

        It may exceed a limit by the solver's tolerance, about 1e-9 of the largest cost in it.
        """
        x = self._solve(self._costs[id(objective)], self._limited(limits), whole=True)
        return None if x is None else self._chosen(x)

    def relaxation(
        self, objective: LinearCost, limits: Sequence[Limit] = ()
    ) -> dict[str, Choice] | None:
        """Return the groups that the relaxation, with x between 0 and 1, gives one choice.

        None if it has no solution, and so the programme has none.
        """
        x = self._solve(self._costs[id(objective)], self._limited(limits), whole=False)
        if x is None:
            return None
        return {name: choice for (name, choice), i in self._x.items() if x[i] >= _WHOLE}

    def least_factor(self, limits: Sequence[Limit]) -> dict[str, Choice]:
        """Return the assignment that is within ``limits`` times the least factor."""
        rows, factor = self._rows.copied(), self._width
        self._width += 1
        for limit in limits:
            row = [*self._costs[id(limit.cost)], (factor, -limit.most)]
            scale = _scale(row, _LARGEST_IN_ROW)
            rows.add([(c, v * scale) for c, v in row], -limit.cost.fixed * scale)
        x = self._solve([(factor, 1.0)], rows, whole=True, unbounded=factor)
        self._width -= 1
        assert x is not None, "some factor is large enough"
        return self._chosen(x)

    def _limited(self, limits: Sequence[Limit]) -> _Rows:
        rows = self._rows.copied()
        for limit in limits:
            row = self._costs[id(limit.cost)]
            scale = _scale(row, _LARGEST_IN_ROW)
            rows.add([(c, v * scale) for c, v in row], (limit.most - limit.cost.fixed) * scale)
        return rows

    def _solve(
        self, objective: Row, rows: _Rows, *, whole: bool, unbounded: int | None = None
    ) -> np.ndarray | None:
        from scipy.optimize import Bounds, milp  # slow to import

        weights = np.zeros(self._width)
        np.add.at(weights, [c for c, _ in objective], [v for _, v in objective])
        least, most = np.zeros(self._width), np.ones(self._width)
        least[list(self._fixed)] = 1.0
        if unbounded is not None:
            most[unbounded] = np.inf
        integrality = np.zeros(self._width)
        integrality[: len(self._x)] = float(whole)
        with _quiet():
            result = milp(
                weights * _scale(objective, _LARGEST),
                integrality=integrality,
                bounds=Bounds(least, most),
                constraints=rows.constraint(self._width),
                options={"mip_rel_gap": 0.0},
            )
        if result.status == _INFEASIBLE:
            return None
        if result.x is None or result.status != 0:
            raise QwrapError(f"the solver gave up: {result.message}")
        return np.asarray(result.x)

    def _chosen(self, x: np.ndarray) -> dict[str, Choice]:
        return {name: choice for (name, choice), i in self._x.items() if x[i] > 0.5}


def _scale(row: Row, largest: float) -> float:
    most = max((abs(value) for _, value in row), default=0.0)
    return largest / most if most else 1.0


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what HiGHS writes to the standard output, whatever ``disp`` says, from the user."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed, as in a service
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
