"""The front of what can be had: least loss for each cost, held against real evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qwrap.errors import ConfigError
from qwrap.mixed.choices import Assignment, Choice, Group, everywhere
from qwrap.mixed.search.interactions import LossModel
from qwrap.mixed.search.linear import Limit, LinearCost
from qwrap.mixed.search.solve import greedy, solve

ROUNDS = 2  # of solving again with corrected losses
SUSPECTS = 0.05  # share of the groups that are raised where an assignment loses more than predicted
TOLERANCE = 0.25  # deviation from the prediction, as a share of it, from which on that is done
EVERYWHERE = "everywhere"
TRIES = 6  # assignments evaluated for one budget or one allowed drop


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What real evaluation says of an assignment.

    Attributes:
        loss: distance from the float model's outputs on held-out batches, as in ``sensitivity``.
        metric: what the user's metric says, more is better; None without one.
    """

    loss: float
    metric: float | None = None

    @property
    def quality(self) -> tuple[float, float]:
        """What points are compared by: the metric, and where that is equal the loss."""
        return (0.0 if self.metric is None else self.metric, -self.loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One assignment that was evaluated.

    Attributes:
        assignment: name of a group -> choice.
        costs: name of a cost -> what the assignment is predicted to cost.
        predicted: loss predicted before it was evaluated.
        measured: what evaluation found.
        origin: what proposed it: "everywhere", "solved", "corrected", "raised", "greedy".
        latency: seconds that its file was found to take, None if it was not timed.
    """

    assignment: Mapping[str, Choice]
    costs: Mapping[str, float]
    predicted: float
    measured: Measured
    origin: str
    latency: float | None = None

    def dominates(self, other: Point, along: str) -> bool:
        """Whether this point is as good as ``other`` at no higher cost, and better in one."""
        mine = (-self.costs[along], *self.measured.quality)
        theirs = (-other.costs[along], *other.measured.quality)
        at_least = mine[0] >= theirs[0] and mine[1:] >= theirs[1:]
        return at_least and mine != theirs


def front_of(points: Iterable[Point], along: str) -> list[Point]:
    """Return the points that no other one dominates, the cheapest first."""
    points = list(points)
    kept = [p for p in points if not any(q.dominates(p, along) for q in points)]
    alike: dict[tuple[float, ...], Point] = {}
    for point in kept:
        alike.setdefault((point.costs[along], *point.measured.quality), point)
    return sorted(alike.values(), key=lambda point: point.costs[along])


Evaluate = Callable[[Assignment], Measured]


@dataclass(slots=True)
class Explorer:
    """Proposes assignments, has them evaluated, and learns from it.

    Attributes:
        groups: what to choose for.
        costs: by name.
        along: name of the cost that the front runs along.
        model: knows the losses of groups; learns, in place.
        evaluate: measures an assignment.
        points: what was evaluated, in order.
    """

    groups: Sequence[Group]
    costs: Mapping[str, LinearCost]
    along: str
    model: LossModel
    evaluate: Evaluate
    points: list[Point] = field(default_factory=list)

    def try_(self, assignment: Assignment, origin: str) -> Point:
        """Return the point of an assignment, evaluated if it is a new one."""
        known = next((p for p in self.points if p.assignment == assignment), None)
        if known is not None:
            return known
        predicted = self.model.losses().total(assignment)
        measured = self.evaluate(assignment)
        self.model.observe(assignment, measured.loss)
        costs = {name: cost.total(assignment) for name, cost in self.costs.items()}
        point = Point(
            assignment=dict(assignment),
            costs=costs,
            predicted=predicted,
            measured=measured,
            origin=origin,
        )
        self.points.append(point)
        return point

    def reprice(self, costs: Mapping[str, LinearCost]) -> None:
        """Go by other costs from now on, in place."""
        self.costs = costs
        self.points = [
            replace(p, costs={name: cost.total(p.assignment) for name, cost in costs.items()})
            for p in self.points
        ]

    def ends(self) -> None:
        """Evaluate every choice everywhere, in place."""
        for choice in dict.fromkeys(c for group in self.groups for c in group.choices):
            self.try_(everywhere(self.groups, choice), EVERYWHERE)

    def lay_out(self, count: int, rounds: int = ROUNDS) -> None:
        """Evaluate what is best at ``count`` costs between the lowest and that of least loss.

        Then again with losses corrected by what was found, and with the most suspect groups raised
        where more was lost than predicted. In place.
        """
        budgets = self._budgets(count)
        for number in range(1 + rounds):
            origin = "corrected" if number else "solved"
            before = len(self.points)
            for budget in budgets:
                limits = [Limit(self.costs[self.along], budget)]
                self.try_(solve(self.groups, self.model.losses(), limits), origin)
            if len(self.points) == before:
                return
            for point in self.points[before:]:
                if point.measured.loss > (1 + TOLERANCE) * point.predicted:
                    self.try_(self._raised(point.assignment), "raised")

    def settle(self, limits: Sequence[Limit], tries: int = TRIES) -> None:
        """Evaluate assignments within ``limits`` until none promises less than was found, in place.

        Raises:
            ConfigError: nothing is within the limits.
        """
        self.try_(solve(self.groups, self.model.losses(), limits), "solved")
        for _ in range(tries - 1):
            losses = self.model.losses()
            within = [p for p in self.points if all(t.holds(p.assignment) for t in limits)]
            try:
                found = solve(self.groups, losses, limits, [p.assignment for p in within])
            except ConfigError:  # all there are were evaluated
                return
            if losses.total(found) >= min(p.measured.loss for p in within):
                return
            self.try_(found, "corrected")

    def press(self, accepts: Callable[[Measured], bool], tries: int = TRIES) -> None:
        """Evaluate what lies between the cheapest point accepted and cheaper ones, in place."""
        for _ in range(tries):
            accepted = [p.costs[self.along] for p in self.points if accepts(p.measured)]
            if not accepted:
                return
            high = min(accepted)
            low = max(
                (p.costs[self.along] for p in self.points if p.costs[self.along] < high),
                default=self._lowest(),
            )
            if not low < high * (1 - 1e-3):
                return
            limits = [Limit(self.costs[self.along], (low + high) / 2)]
            before = len(self.points)
            self.try_(solve(self.groups, self.model.losses(), limits), "solved")
            if len(self.points) == before:
                return

    def greedily(self, alone: LinearCost, limits: Sequence[Limit]) -> Point:
        """Return the point of the greedy order by the losses of groups ``alone``."""
        return self.try_(greedy(self.groups, alone, limits), "greedy")

    def _lowest(self) -> float:
        cost = self.costs[self.along]
        return cost.total(solve(self.groups, cost))

    def _budgets(self, count: int) -> list[float]:
        cost, losses = self.costs[self.along], self.model.losses()
        low = self._lowest()
        high = max(cost.total(self._best(losses)), low)
        return [float(x) for x in np.linspace(low, high, max(count, 2))]

    def _best(self, losses: LinearCost) -> dict[str, Choice]:
        return {g.name: min(g.choices, key=lambda c: losses.of[g.name, c]) for g in self.groups}

    def _raised(self, assignment: Assignment) -> dict[str, Choice]:
        """Return an assignment with the groups that lose most in their choice of least loss."""
        losses = self.model.losses()
        best = self._best(losses)
        gains = {
            group.name: losses.of[group.name, assignment[group.name]]
            - losses.of[group.name, best[group.name]]
            for group in self.groups
        }
        count = max(1, round(SUSPECTS * len(self.groups)))
        worst = sorted(gains, key=lambda name: -gains[name])[:count]
        return {**assignment, **{name: best[name] for name in worst}}


def choose(
    points: Sequence[Point],
    along: str,
    limits: Sequence[Limit] = (),
    accepts: Callable[[Measured], bool] | None = None,
) -> Point:
    """Return the best point within ``limits``, or the cheapest of those that are accepted.

    Args:
        points: that were evaluated.
        along: name of the cost that decides among those accepted, and among equally good ones.
        limits: what a point may cost.
        accepts: says which points are good enough; None for all.

    Raises:
        ConfigError: there is none.
    """
    fitting = [p for p in points if all(limit.holds(p.assignment) for limit in limits)]
    if not fitting:
        raise ConfigError("no point that was evaluated is within the budget; search with it")
    if accepts is None:
        return max(fitting, key=lambda p: (p.measured.quality, -p.costs[along]))
    good = [p for p in fitting if accepts(p.measured)]
    if not good:
        best = max(fitting, key=lambda p: p.measured.quality).measured
        found = f"loss {best.loss:.4g}" if best.metric is None else f"metric {best.metric:.6g}"
        raise ConfigError(
            f"no assignment within the budget is good enough; the best has {found}: allow a "
            "larger drop, a larger budget, or offer a wider choice"
        )
    return min(good, key=lambda p: (p.costs[along], tuple(-q for q in p.measured.quality)))
