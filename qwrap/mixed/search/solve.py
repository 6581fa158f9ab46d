"""The best assignment under budgets, and the greedy one that it is held against.

Source: HAWQ-V3 (Yao et al., arXiv:2011.10680) states the choice of bit widths as an integer linear
programme, without conversions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from qwrap.errors import ConfigError, QwrapError
from qwrap.mixed.choices import Assignment, Choice, Group
from qwrap.mixed.search.linear import Limit, LinearCost
from qwrap.mixed.search.programme import Programme

MOST_EXACT = 2000  # groups up to which the optimum is proven
_TRIES = 100  # assignments beyond a limit by the solver's tolerance


def solve(
    groups: Sequence[Group],
    objective: LinearCost,
    limits: Sequence[Limit] = (),
    without: Iterable[Assignment] = (),
) -> dict[str, Choice]:
    """Return the assignment with the least ``objective`` within all ``limits``.

    Up to 2000 groups it is the optimum. Beyond, the relaxation is solved, and what that leaves
    undecided is assigned as well as can be.

    Args:
        groups: what to choose for.
        objective: what to minimise, such as the loss.
        limits: what it may cost.
        without: assignments that it is not to be.

    Raises:
        ConfigError: nothing else is within the limits; the error says what the nearest limits are.
            Or the cost of a choice is unknown.
    """
    for cost in (objective, *(limit.cost for limit in limits)):
        cost.check(groups)
    attempt = _exact if len(groups) <= MOST_EXACT else _relaxed
    found = attempt(groups, objective, limits, without)
    if found is None:
        raise ConfigError(_infeasible(groups, limits))
    return found


def nearest(groups: Sequence[Group], limits: Sequence[Limit]) -> dict[str, Choice]:
    """Return the assignment that is within ``limits`` times the least common factor."""
    return Programme(groups, [limit.cost for limit in limits]).least_factor(limits)


def greedy(groups: Sequence[Group], loss: LinearCost, limits: Sequence[Limit]) -> dict[str, Choice]:
    """Return an assignment within ``limits`` by the usual order: least loss for what is saved.

    All groups begin with the choice of least loss. Again and again the step is taken that loses
    least for each unit saved, as if there were no conversions, until the whole, conversions
    included, is within the limits.

    Raises:
        ConfigError: no step is left, and a limit is exceeded.
    """
    for cost in (loss, *(limit.cost for limit in limits)):
        cost.check(groups)
    start = {g.name: min(g.choices, key=lambda c: loss.of[g.name, c]) for g in groups}
    found = _lowered(groups, start, loss, limits)
    if found is None:
        raise ConfigError(f"in greedy order, {_infeasible(groups, limits)}")
    return found


def _lowered(
    groups: Sequence[Group],
    start: Mapping[str, Choice],
    loss: LinearCost,
    limits: Sequence[Limit],
) -> dict[str, Choice] | None:
    """Return what steps from ``start`` lead to within ``limits``; None if there are too few."""
    found, taken = dict(start), set(start.items())  # no step back, which some other limit may want
    while beyond := [limit for limit in limits if not limit.holds(found)]:
        steps = [step for g in groups for step in _steps(g, found[g.name], loss, beyond)]
        steps = [step for step in steps if step[1:] not in taken]
        if not steps:
            return None
        _, name, choice = min(steps)
        found[name] = choice
        taken.add((name, choice))
    return found


def _steps(
    group: Group, current: Choice, loss: LinearCost, beyond: Sequence[Limit]
) -> Iterator[tuple[float, str, Choice]]:
    """Yield (loss for each unit saved, group, choice); units are shares of the limits."""
    name = group.name
    for choice in group.choices:
        saved = sum((b.cost.of[name, current] - b.cost.of[name, choice]) / b.most for b in beyond)
        if saved > 0:
            yield (loss.of[name, choice] - loss.of[name, current]) / saved, name, choice


def _exact(
    groups: Sequence[Group],
    objective: LinearCost,
    limits: Sequence[Limit],
    without: Iterable[Assignment] = (),
    decided: Mapping[str, Choice] | None = None,
) -> dict[str, Choice] | None:
    programme = Programme(groups, [objective, *(limit.cost for limit in limits)])
    programme.decide(decided or {})
    for assignment in without:
        programme.forbid(assignment)
    for _ in range(_TRIES):
        found = programme.minimise(objective, limits)
        if found is None or all(limit.holds(found) for limit in limits):
            return found
        programme.forbid(found)
    raise QwrapError(f"the solver's first {_TRIES} assignments were just beyond the limits")


def _relaxed(
    groups: Sequence[Group],
    objective: LinearCost,
    limits: Sequence[Limit],
    without: Iterable[Assignment] = (),
) -> dict[str, Choice] | None:
    without = list(without)
    programme = Programme(groups, [objective, *(limit.cost for limit in limits)])
    decided = programme.relaxation(objective, limits)
    if decided is None:
        return None
    found = _exact(groups, objective, limits, without, decided)
    if found is None:  # what is undecided cannot make up for what is decided
        start = {
            g.name: decided.get(g.name, min(g.choices, key=lambda c: objective.of[g.name, c]))
            for g in groups
        }
        found = _lowered(groups, start, objective, limits)
    if found is None or found in without:
        found = _exact(groups, objective, limits, without)
    return found


def _infeasible(groups: Sequence[Group], limits: Sequence[Limit]) -> str:
    found = nearest(groups, limits)
    asked = ", ".join(f"{limit.cost.name} of {limit.most:.6g}" for limit in limits)
    least = ", ".join(f"{limit.cost.name} of {limit.cost.total(found):.6g}" for limit in limits)
    return f"no choice of types is within {asked}; the nearest that some are: {least}"
