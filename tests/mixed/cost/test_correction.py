"""Parts that are moved to where their sums fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwrap.mixed.choices import FLOAT, Choice, Edge
from qwrap.mixed.cost.correction import corrected, posterior
from qwrap.mixed.cost.parts import Parts, Timed

U8 = Choice("uint8", "int8")
SECONDS = {("a", U8): 1e-3, ("a", FLOAT): 3e-3, ("b", U8): 2e-3, ("b", FLOAT): 5e-3}
EDGES = [Edge("t", "a", ("b",), {("uint8", "float32"): 2e-4, ("float32", "uint8"): 3e-4})]
MIXES = [{"a": x, "b": y} for x in (U8, FLOAT) for y in (U8, FLOAT)]


def predicted(parts: Parts, mix: dict[str, Choice]) -> float:
    values = parts.values()
    return sum(values[term] for term in parts.terms(mix))


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_the_posterior_minimises_the_sum_of_squares(seed: int, n: int, m: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    mean, deviation = rng.normal(size=n), rng.uniform(0.5, 2, n)
    rows, observed = rng.normal(size=(m, n)), rng.normal(size=m)
    noise, together = rng.uniform(0.5, 2, m), rng.normal(size=(k, n))
    found = posterior(mean, deviation, rows, observed, noise, together)
    covariance = np.diag(deviation**2) + together.T @ together
    # The normal equations of |x - mean|^2 in the prior's metric plus the weighted residuals.
    gradient = np.linalg.solve(covariance, found - mean)
    gradient += rows.T @ ((rows @ found - observed) / noise**2)
    assert gradient == pytest.approx(np.zeros(n), abs=1e-6)  # float64, conditions of some 1e3


def test_one_variable_is_the_weighted_mean() -> None:
    found = posterior(*(np.array(x) for x in ([2.0], [1.0], [[1.0]], [5.0], [0.5])))
    assert found == pytest.approx([(2.0 / 1 + 5.0 / 0.25) / (1 / 1 + 1 / 0.25)])


def test_sums_that_fit_leave_the_parts_alone() -> None:
    parts = Parts(SECONDS, EDGES, 1e-4)
    timed = [Timed(mix, predicted(parts, mix)) for mix in MIXES]
    found = corrected(parts, timed)
    for term, value in parts.values().items():
        assert found.values()[term] == pytest.approx(value, rel=1e-9)


def test_a_slower_machine_moves_all_parts_of_a_choice_and_no_part_below_zero() -> None:
    parts = Parts(SECONDS, EDGES, 1e-4)
    slow = [Timed(mix, 1.1 * predicted(parts, mix)) for mix in MIXES]
    found = corrected(parts, slow)
    for each in slow:
        # Each sum has noise of 1.5 %; what was off by 10 % is off by less than that now.
        assert predicted(found, dict(each.assignment)) == pytest.approx(each.seconds, rel=0.015)
    fast = [Timed(mix, 1e-6) for mix in MIXES]
    assert min(corrected(parts, fast).values().values()) >= 0


def test_an_assignment_pays_each_conversion_once_for_all_readers_of_a_type() -> None:
    edge = Edge("t", "a", ("b", "c", None), {("uint8", "float32"): 1.0, ("uint8", "uint16"): 2.0})
    parts = Parts({}, [edge], 0.0)
    u16 = Choice("uint16", "int8")

    def paid(a: Choice, b: Choice, c: Choice) -> float:
        terms = parts.terms({"a": a, "b": b, "c": c})
        return sum(edge.costs[term[2]] for term in terms if term[0] == "edge")

    assert paid(U8, U8, U8) == 1.0  # the graph output
    assert paid(U8, FLOAT, FLOAT) == 1.0
    assert paid(U8, u16, FLOAT) == 3.0
    assert paid(FLOAT, u16, U8) == 0.0  # nothing is known of these
