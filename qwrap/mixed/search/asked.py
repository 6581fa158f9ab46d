"""What a search is asked for: a budget, an allowed drop, and which point meets them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qwrap.errors import ConfigError
from qwrap.mixed.choices import Assignment, Group
from qwrap.mixed.search.budget import Budget
from qwrap.mixed.search.linear import Limit, LinearCost
from qwrap.mixed.search.pareto import Measured, Point, choose
from qwrap.mixed.search.solve import solve

Along = Literal["bytes", "bit_ops", "latency"]

TIMING = 0.02  # by which the times of one file differ from one round to the next
NEAR = 0.05  # by which what is predicted may be beyond a limit that the file's time is within
TIMED = 8  # points that are worth timing for one decision


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user wants of the chosen point."""

    budget: Budget | None = None
    max_drop: float | None = None
    along: Along = "latency"
    points: int = 2

    def __post_init__(self) -> None:
        if self.budget is None and self.max_drop is None:
            raise ConfigError(
                "give a budget, such as budget='latency=1.1 x uint8/int8' or 'bytes=50%', or "
                "max_drop=, the most that the metric may fall by"
            )
        if self.budget is not None and not self.budget.asked:
            raise ConfigError("Budget() limits nothing; give bytes=, bit_ops= or latency=")
        if self.max_drop is not None and not (0 <= self.max_drop < math.inf):
            raise ConfigError(f"max_drop={self.max_drop}: expected 0 or more")
        if self.points < 2:
            raise ConfigError(f"points={self.points}: expected 2 or more")

    @property
    def costs(self) -> list[str]:
        """The costs that matter, and those that cost nothing to know."""
        limited = self.budget.asked if self.budget else ()
        return [*dict.fromkeys(["bytes", "bit_ops", self.along, *limited])]

    @property
    def text(self) -> str:
        """What was asked, in words."""
        parts = [f"{k}={v}" for k, v in (self.budget.asked if self.budget else {}).items()]
        if self.max_drop is not None:
            parts.append(f"least {self.along} with a drop of at most {self.max_drop:g}")
        return ", ".join(parts)

    def limits(self, costs: Mapping[str, LinearCost], groups: Sequence[Group]) -> list[Limit]:
        """Return the limits in units of the costs."""
        return self.budget.limits(costs, groups) if self.budget else []

    def check(self, costs: Mapping[str, LinearCost], groups: Sequence[Group]) -> None:
        """Refuse a budget that nothing is within.

        Raises:
            ConfigError: the error says what the nearest budget is.
        """
        solve(groups, costs[self.along], self.limits(costs, groups))

    def accepts(self, of_float: Measured) -> Callable[[Measured], bool] | None:
        """Return what says whether a point is good enough, None if all are."""
        most = self.max_drop
        if most is None:
            return None
        if of_float.metric is None:
            return lambda found: found.loss <= most
        least = of_float.metric - most
        return lambda found: found.metric is not None and found.metric >= least

    def worth_timing(
        self,
        points: Sequence[Point],
        costs: Mapping[str, LinearCost],
        groups: Sequence[Group],
        of_float: Measured,
    ) -> list[Point]:
        """Return the points that may turn out to be the one that is asked for."""
        near = [Limit(t.cost, t.most * (1 + NEAR)) for t in self.limits(costs, groups)]
        fitting = [p for p in points if all(limit.holds(p.assignment) for limit in near)]
        accepts = self.accepts(of_float)
        if accepts is None:
            return sorted(fitting, key=lambda p: p.measured.quality, reverse=True)[:TIMED]
        good = [p for p in fitting if accepts(p.measured)]
        return sorted(good, key=lambda p: p.costs[self.along])[:TIMED]

    def pick(
        self,
        points: Sequence[Point],
        costs: Mapping[str, LinearCost],
        groups: Sequence[Group],
        of_float: Measured,
    ) -> Point:
        """Return the point that is asked for: of those that were timed, by the time they took.

        A latency that is limited to a multiple of a choice is one of the time that the file with
        this choice everywhere took. Where no timed point is within the limits, predictions count.

        Raises:
            ConfigError: nothing is within the budget or good enough.
        """
        timed = [
            p for p in points if p.latency is not None and self._is_within(p, points, costs, groups)
        ]
        accepts = self.accepts(of_float)
        good = [p for p in timed if accepts is None or accepts(p.measured)]
        if not good:
            return choose(points, self.along, self.limits(costs, groups), accepts)
        if accepts is None:
            return max(good, key=lambda p: (p.measured.quality, -self._cost(p)))
        return min(good, key=lambda p: (self._cost(p), tuple(-q for q in p.measured.quality)))

    def _cost(self, point: Point) -> float:
        if self.along == "latency" and point.latency is not None:
            return point.latency
        return point.costs[self.along]

    def _is_within(
        self,
        point: Point,
        points: Sequence[Point],
        costs: Mapping[str, LinearCost],
        groups: Sequence[Group],
    ) -> bool:
        if self.budget is None:
            return True
        others = [t for t in self.limits(costs, groups) if t.cost.name != "latency"]
        if not all(limit.holds(point.assignment) for limit in others):
            return False
        if "latency" not in self.budget.asked or point.latency is None:
            return True

        def took(assignment: Assignment) -> float:
            found = (p.latency for p in points if p.assignment == assignment)
            return next(filter(None, found), costs["latency"].total(assignment))

        return point.latency <= self.budget.most("latency", took, groups) * (1 + TIMING)
