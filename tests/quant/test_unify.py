"""Joined tensors share a scale exactly where none of them loses more than a bit."""

import pytest

import qwrap
from qwrap.quant.unify import unify_joined

NODES = "a = Conv(x, w) b = Conv(x, v) c = Concat<axis=1>(a, b) y = Conv(c, u)"
WEIGHTS = {"w": (4, 3, 1, 1), "v": (4, 3, 1, 1), "u": (4, 8, 1, 1)}


@pytest.fixture
def joined(small):
    model = qwrap.load(small.build(NODES, WEIGHTS))
    plan = qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    assert plan.nodes["/c"].role == "integer"
    return lambda ranges: unify_joined(plan, model.graph, ranges)


@pytest.mark.ort("G73")
def test_ranges_within_a_factor_of_two_become_their_union(joined) -> None:
    ranges = joined({"a": (-1.0, 1.0), "b": (0.0, 1.5), "c": (-1.0, 1.5), "y": (0.0, 9.0)})
    assert ranges == dict.fromkeys("abc", (-1.0, 1.5)) | {"y": (0.0, 9.0)}


def test_boxes_do_not_hide_scores(joined) -> None:
    ranges = {"a": (0.0, 300.0), "b": (0.0, 1.0), "c": (0.0, 300.0)}
    assert joined(ranges) == ranges
