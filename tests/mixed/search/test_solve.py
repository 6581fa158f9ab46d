"""The programme against all assignments of small problems."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwrap.errors import ConfigError
from qwrap.mixed.choices import CHOICES, FLOAT, Choice, Edge, Group
from qwrap.mixed.search import programme
from qwrap.mixed.search import solve as solving
from qwrap.mixed.search.linear import Limit, LinearCost
from qwrap.mixed.search.solve import greedy, nearest, solve

INT8, INT16, _ = CHOICES
TYPES = [choice.activation for choice in CHOICES]


@dataclass
class Problem:
    groups: list[Group]
    loss: LinearCost
    limits: list[Limit]


@st.composite
def costs(draw: st.DrawFn, name: str, groups: Sequence[Group], *, edges: bool) -> LinearCost:
    whole = st.integers(0, 50)
    of = {(g.name, c): float(draw(whole)) for g in groups for c in g.choices}
    between = []
    names = st.sampled_from([None, *(g.name for g in groups)])
    for i in range(draw(st.integers(1, 5)) if edges else 0):
        readers = tuple(draw(st.lists(names, min_size=1, max_size=3)))
        prices = {pair: float(draw(whole)) for pair in itertools.permutations(TYPES, 2)}
        between.append(Edge(f"t{i}", draw(names), readers, prices))
    return LinearCost(name=name, of=of, edges=between, fixed=float(draw(st.integers(0, 9))))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    offered = st.sampled_from([CHOICES, CHOICES, CHOICES[::2], CHOICES[:2], CHOICES[2:]])
    count = draw(st.integers(1, 5))
    groups = [Group(f"g{i}", (f"n{i}",), draw(offered)) for i in range(count)]
    loss = draw(costs("loss", groups, edges=False))
    limits = []
    for i in range(draw(st.integers(1, 2))):
        cost = draw(costs(f"cost {i}", groups, edges=i == 0))
        limits.append(Limit(cost, float(draw(st.integers(1, 60 * count)))))
    return Problem(groups, loss, limits)


def assignments(groups: Sequence[Group]) -> Iterator[dict[str, Choice]]:
    for chosen in itertools.product(*(group.choices for group in groups)):
        yield {group.name: choice for group, choice in zip(groups, chosen, strict=True)}


def plain_total(cost: LinearCost, assignment: Mapping[str, Choice]) -> float:
    """The sum, written as a loop over every reader of every type."""
    total = cost.fixed + sum(cost.of[item] for item in assignment.items())
    for edge in cost.edges:
        source = "float32" if edge.producer is None else assignment[edge.producer].activation
        for kind in TYPES:
            read = [
                name
                for name in edge.consumers
                if ("float32" if name is None else assignment[name].activation) == kind
            ]
            if read and kind != source:
                total += edge.costs.get((source, kind), 0.0)
    return total


def within(problem: Problem) -> list[dict[str, Choice]]:
    return [
        assignment
        for assignment in assignments(problem.groups)
        if all(plain_total(limit.cost, assignment) <= limit.most for limit in problem.limits)
    ]


@given(problem=problems())
@settings(deadline=None, max_examples=150)
def test_the_optimum_is_that_of_all_assignments(problem: Problem) -> None:
    feasible = within(problem)
    if not feasible:
        with pytest.raises(ConfigError, match="no choice of types is within"):
            solve(problem.groups, problem.loss, problem.limits)
        return
    found = solve(problem.groups, problem.loss, problem.limits)
    assert found in feasible
    best = min(plain_total(problem.loss, assignment) for assignment in feasible)
    assert problem.loss.total(found) == best  # sums of whole numbers


@given(problem=problems(), count=st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_the_next_best_is_found_without_the_best(problem: Problem, count: int) -> None:
    feasible = within(problem)
    losses = sorted(plain_total(problem.loss, assignment) for assignment in feasible)
    known: list[dict[str, Choice]] = []
    for loss in losses[:count]:
        found = solve(problem.groups, problem.loss, problem.limits, known)
        assert problem.loss.total(found) == loss
        assert found not in known
        known.append(found)


@given(problem=problems())
@settings(deadline=None, max_examples=100)
def test_the_least_cost_under_an_allowed_loss_is_that_of_all_assignments(problem: Problem) -> None:
    cost, allowed = problem.limits[0].cost, Limit(problem.loss, problem.limits[0].most)
    totals = [
        plain_total(cost, assignment)
        for assignment in assignments(problem.groups)
        if plain_total(problem.loss, assignment) <= allowed.most
    ]
    if totals:
        assert cost.total(solve(problem.groups, cost, [allowed])) == min(totals)


@given(problem=problems())
@settings(deadline=None, max_examples=100)
def test_the_nearest_limits_are_those_of_all_assignments(problem: Problem) -> None:
    def factor(assignment: Mapping[str, Choice]) -> float:
        return max(plain_total(limit.cost, assignment) / limit.most for limit in problem.limits)

    best = min(map(factor, assignments(problem.groups)))
    # The factor is no whole number: the solver knows it to 1e-6.
    assert factor(nearest(problem.groups, problem.limits)) == pytest.approx(best, abs=1e-5)


@given(problem=problems())
@settings(deadline=None, max_examples=100)
def test_greedy_is_within_the_limits_and_never_better(problem: Problem) -> None:
    try:
        found = greedy(problem.groups, problem.loss, problem.limits)
    except ConfigError:
        return
    assert found in within(problem)
    best = solve(problem.groups, problem.loss, problem.limits)
    assert problem.loss.total(found) >= problem.loss.total(best)


@given(problem=problems())
@settings(deadline=None, max_examples=100)
def test_many_groups_are_rounded_to_an_assignment_within_the_limits(problem: Problem) -> None:
    feasible = within(problem)
    found = solving._relaxed(problem.groups, problem.loss, problem.limits)
    assert found in feasible if feasible else found is None


def knapsack(count: int) -> Problem:
    """One budget without edges, where the relaxation leaves one group undecided."""
    groups = [Group(f"g{i}", (f"n{i}",), (INT8, FLOAT)) for i in range(count)]
    loss = {
        (g.name, c): (1.0 + i % 97) * (c == INT8) for i, g in enumerate(groups) for c in g.choices
    }
    size = {
        (g.name, c): (1.0 + i % 89) * (4 if c == FLOAT else 1)
        for i, g in enumerate(groups)
        for c in g.choices
    }
    cost = LinearCost(name="bytes", of=size)
    return Problem(
        groups, LinearCost(name="loss", of=loss), [Limit(cost, 0.5 * sum(size.values()))]
    )


def test_thousands_of_groups_come_within_one_group_of_the_optimum() -> None:
    problem = knapsack(2500)
    found = solve(problem.groups, problem.loss, problem.limits)
    assert problem.limits[0].holds(found)
    # Rounding one group of the relaxation, which is at most the optimum, loses at most its loss.
    best = solving._exact(problem.groups, problem.loss, problem.limits)
    assert best is not None
    assert problem.loss.total(found) <= problem.loss.total(best) + 97


def test_a_chain_is_kept_in_one_type_where_conversions_cost_more_than_they_save() -> None:
    groups = [Group(name, (name,), (INT8, FLOAT)) for name in "abc"]
    seconds = {(g.name, c): 1.0 if c == INT8 else 2.0 for g in groups for c in g.choices}
    loss = {
        (g.name, c): float(c == INT8) * (9 if g.name == "b" else 1)
        for g in groups
        for c in g.choices
    }
    both = {("float32", "uint8"): 0.8, ("uint8", "float32"): 0.8}
    edges = [Edge("ab", "a", ("b",), both), Edge("bc", "b", ("c",), both)]
    apart = LinearCost(name="latency", of=seconds)
    joined = LinearCost(name="latency", of=seconds, edges=edges)
    target = LinearCost(name="loss", of=loss)
    assert solve(groups, target, [Limit(apart, 4.5)]) == {"a": INT8, "b": FLOAT, "c": INT8}
    assert solve(groups, target, [Limit(joined, 4.5)]) == {"a": INT8, "b": INT8, "c": INT8}


def test_readers_of_one_type_share_a_conversion() -> None:
    edge = Edge("t", "a", ("b", "c", None), {("uint8", "uint16"): 3.0, ("uint8", "float32"): 5.0})
    groups = [Group(name, (name,), CHOICES) for name in "abc"]
    cost = LinearCost(
        name="latency", of={(g.name, c): 0.0 for g in groups for c in CHOICES}, edges=[edge]
    )
    assert cost.total({"a": INT8, "b": INT16, "c": INT16}) == 8.0
    assert cost.total({"a": INT8, "b": INT16, "c": INT8}) == 8.0
    assert cost.total({"a": INT8, "b": INT8, "c": FLOAT}) == 5.0
    assert cost.total({"a": FLOAT, "b": INT8, "c": FLOAT}) == 0.0


def test_an_infeasible_budget_names_the_nearest() -> None:
    problem = knapsack(3)  # of sizes 1, 2 and 3
    cost = problem.limits[0].cost
    with pytest.raises(
        ConfigError, match=r"within bytes of 5; the nearest that some are: bytes of 6"
    ):
        solve(problem.groups, problem.loss, [Limit(cost, 5.0)])
    assert cost.total(solve(problem.groups, problem.loss, [Limit(cost, 6.0)])) == 6.0


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_units_do_not_matter(scale: float) -> None:
    problem = knapsack(40)
    want = solve(problem.groups, problem.loss, problem.limits)
    loss = LinearCost(name="loss", of={k: v * scale for k, v in problem.loss.of.items()})
    size = LinearCost(name="size", of={k: v / scale for k, v in problem.limits[0].cost.of.items()})
    found = solve(problem.groups, loss, [Limit(size, problem.limits[0].most / scale)])
    assert problem.loss.total(found) == problem.loss.total(want)


def test_what_cannot_be_weighed_is_refused() -> None:
    problem = knapsack(2)
    with pytest.raises(ConfigError, match=r"loss of group 'g0' as uint8/int8: unknown"):
        solve(problem.groups, LinearCost(name="loss", of={}), problem.limits)
    with pytest.raises(ConfigError, match=r"loss of group 'g' as float32 is nan"):
        LinearCost(name="loss", of={("g", FLOAT): float("nan")})
    with pytest.raises(ConfigError, match="conversions of 't': below 0"):
        LinearCost(name="loss", of={}, edges=[Edge("t", "a", ("b",), {("uint8", "uint16"): -1.0})])
    with pytest.raises(ConfigError, match="a limit has to be above 0"):
        Limit(problem.loss, 0.0)


def test_nothing_is_written_while_the_solver_runs(capfd: pytest.CaptureFixture[str]) -> None:
    with programme._quiet():
        os.write(1, b"as HiGHS does now and then\n")
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "after\n"
