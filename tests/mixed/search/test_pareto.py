"""The front, and losses that learn from what whole assignments lose."""

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwrap.errors import ConfigError
from qwrap.mixed.choices import CHOICES, FLOAT, Choice, Group
from qwrap.mixed.search.interactions import DOUBT, LEAST, NOISE, LossModel
from qwrap.mixed.search.linear import Limit, LinearCost
from qwrap.mixed.search.pareto import Explorer, Measured, Point, choose, front_of

INT8, INT16, _ = CHOICES
GROUPS = [Group(f"g{i}", (f"n{i}",), (INT8, FLOAT)) for i in range(8)]
SIZE = {(g.name, c): (1.0 if c == INT8 else 4.0) for g in GROUPS for c in g.choices}
BYTES = LinearCost(name="bytes", of=SIZE)
ALONE = {(g.name, c): (i + 1.0) * (c == INT8) for i, g in enumerate(GROUPS) for c in g.choices}


def point(cost: float, loss: float, metric: float | None = None) -> Point:
    return Point(
        assignment={"g": INT8},
        costs={"bytes": cost},
        predicted=loss,
        measured=Measured(loss=loss, metric=metric),
        origin="solved",
    )


values = st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6))


@given(st.lists(values, min_size=1, max_size=12))
def test_the_front_is_what_no_other_point_beats(found: list[tuple[int, int, int]]) -> None:
    points = [point(*map(float, numbers)) for numbers in found]
    front = {
        (p.costs["bytes"], p.measured.metric, -p.measured.loss) for p in front_of(points, "bytes")
    }
    plain = set()
    for cost, loss, metric in found:
        better = [
            other
            for other in found
            if other[0] <= cost
            and (other[2], -other[1]) >= (metric, -loss)
            and (other[0] < cost or (other[2], -other[1]) > (metric, -loss))
        ]
        if not better:
            plain.add((float(cost), float(metric), -float(loss)))
    assert front == plain


def truth(assignment: Mapping[str, Choice]) -> float:
    """Losses that do not add up: neighbours in 8 bits make each other's worse, but for the last."""
    own = [ALONE[item] for item in assignment.items()]
    together = sum(a * b for a, b in itertools.pairwise(own[:4]))
    return sum(own) + together


def explorer() -> Explorer:
    return Explorer(
        groups=GROUPS,
        costs={"bytes": BYTES},
        along="bytes",
        model=LossModel(ALONE),
        evaluate=lambda assignment: Measured(loss=truth(assignment)),
    )


def test_repair_gets_closer_to_the_best_assignment_than_the_first_solution() -> None:
    found = explorer()
    limits = [Limit(BYTES, 20.0)]
    found.ends()
    found.settle(limits, tries=1)
    first = found.points[-1].measured.loss
    found.settle(limits, tries=12)
    best = min(
        truth(dict(zip([g.name for g in GROUPS], chosen, strict=True)))
        for chosen in itertools.product((INT8, FLOAT), repeat=8)
        if chosen.count(FLOAT) <= 4
    )
    settled = choose(found.points, "bytes", limits).measured.loss
    assert best <= settled < first
    assert settled <= 1.2 * best


def test_the_layout_goes_from_the_cheapest_to_the_one_without_loss() -> None:
    found = explorer()
    found.ends()
    found.lay_out(5)
    front = front_of(found.points, "bytes")
    assert front[0].costs["bytes"] == 8.0
    assert front[-1].costs["bytes"] == 32.0
    assert front[-1].measured.loss == 0.0
    assert len(front) >= 5
    assert [p.measured.loss for p in front] == sorted(
        (p.measured.loss for p in front), reverse=True
    )


def test_no_assignment_is_evaluated_twice() -> None:
    found = explorer()
    found.ends()
    found.lay_out(6)
    found.settle([Limit(BYTES, 20.0)])
    assert len({tuple(sorted(p.assignment.items())) for p in found.points}) == len(found.points)


def test_pressing_finds_a_cheaper_point_that_is_good_enough() -> None:
    found = explorer()
    found.ends()
    found.press(lambda measured: measured.loss <= 8)
    cheapest = choose(found.points, "bytes", accepts=lambda measured: measured.loss <= 8)
    assert cheapest.costs["bytes"] < 32.0
    assert cheapest.measured.loss <= 8


def test_new_prices_hold_for_points_that_were_evaluated_before() -> None:
    found = explorer()
    found.ends()
    found.reprice({"bytes": LinearCost(name="bytes", of={k: 2 * v for k, v in SIZE.items()})})
    assert [p.costs["bytes"] for p in found.points] == [16.0, 64.0]


def test_the_best_point_is_chosen_within_the_budget() -> None:
    found = explorer()
    found.ends()
    found.lay_out(5)
    chosen = choose(found.points, "bytes", [Limit(BYTES, 20.0)])
    within = [p for p in found.points if p.costs["bytes"] <= 20.0]
    assert chosen.measured.loss == min(p.measured.loss for p in within)
    with pytest.raises(ConfigError, match="is within the budget"):
        choose(found.points, "bytes", [Limit(BYTES, 7.0)])
    with pytest.raises(ConfigError, match="good enough; the best has loss 0"):
        choose(found.points, "bytes", accepts=lambda measured: measured.loss < 0)


def test_the_metric_precedes_the_loss() -> None:
    points = [point(1.0, 5.0, 0.9), point(1.0, 1.0, 0.8), point(2.0, 4.0, 0.9)]
    assert choose(points, "bytes").measured == Measured(loss=4.0, metric=0.9)
    assert front_of(points, "bytes") == [points[0], points[2]]


def test_without_observations_losses_are_those_of_groups_alone() -> None:
    assert LossModel(ALONE).losses().of == ALONE


def test_losses_are_the_conditional_mean_of_a_normal_prior() -> None:
    alone = {("a", INT8): 2.0, ("b", INT8): 1.0, ("a", FLOAT): 0.0, ("b", FLOAT): 0.0}
    model = LossModel(alone)
    model.observe({"a": INT8, "b": INT8}, 3.0)  # as predicted
    model.observe({"a": INT8, "b": FLOAT}, 2.0)
    model.observe({"a": FLOAT, "b": INT8}, 1.5)  # more
    found = model.losses().of
    rows = np.array([[1, 1], [1, 0], [0, 1]], float)
    mean = np.array([2.0, 1.0])  # the median ratio is 1
    prior = np.diag((DOUBT * mean) ** 2)
    noise = np.diag((NOISE * np.array([3.0, 2.0, 1.5])) ** 2 + (LEAST * 1.5) ** 2)
    gain = prior @ rows.T @ np.linalg.inv(rows @ prior @ rows.T + noise)
    want = mean + gain @ (np.array([3.0, 2.0, 1.5]) - rows @ mean)
    assert [found["a", INT8], found["b", INT8]] == pytest.approx(want, rel=1e-9)
    assert found["a", FLOAT] == found["b", FLOAT] == 0.0


def test_a_common_factor_is_no_reason_to_doubt_single_groups() -> None:
    model = LossModel(ALONE)
    for chosen in itertools.product((INT8, FLOAT), repeat=3):
        rest = dict.fromkeys([g.name for g in GROUPS[3:]], INT8)
        assignment = {**dict(zip(["g0", "g1", "g2"], chosen, strict=True)), **rest}
        model.observe(assignment, 3 * sum(ALONE[item] for item in assignment.items()))
    found = model.losses().of
    assert [found[key] for key in ALONE] == pytest.approx([3 * v for v in ALONE.values()], rel=1e-6)
