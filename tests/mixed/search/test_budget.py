"""What a budget means in units of its cost."""

import pytest

from qwrap.errors import ConfigError
from qwrap.mixed.choices import CHOICES, FLOAT, Choice, Group, everywhere
from qwrap.mixed.search.budget import Budget
from qwrap.mixed.search.linear import LinearCost

INT8, INT16, _ = CHOICES
GROUPS = [Group("a", ("a",), CHOICES), Group("b", ("b",), (INT8, FLOAT))]
VALUE = {INT8: 1.0, INT16: 2.0, FLOAT: 4.0}
COSTS = {
    name: LinearCost(
        name=name, of={(g.name, c): VALUE[c] for g in GROUPS for c in g.choices}, fixed=2
    )
    for name in ("bytes", "bit_ops", "latency")
}


@pytest.mark.parametrize(
    ("asked", "most"),
    [
        (7, 7.0),
        ("7", 7.0),
        ("1.5 KB", 1500.0),
        ("2 MiB", 2 * 2.0**20),
        ("50%", 5.0),  # of 2 + 4 + 4
        ("0.5 x float32", 5.0),
        ("1.5 x uint8/int8", 6.0),  # of 2 + 1 + 1
        ("1x uint16/int8", 8.0),  # of 2 + 2 + 4: the second group has no 16 bits
    ],
)
def test_a_budget_is_absolute_or_against_one_type(asked: float | str, most: float) -> None:
    (limit,) = Budget(bytes=asked).limits(COSTS, GROUPS)
    assert limit.cost is COSTS["bytes"]
    assert limit.most == pytest.approx(most, rel=1e-12)


def test_units_are_those_of_the_cost() -> None:
    limits = Budget(latency="1.5 ms", bit_ops="3 G").limits(COSTS, GROUPS)
    assert {limit.cost.name: limit.most for limit in limits} == {"latency": 1.5e-3, "bit_ops": 3e9}


def test_a_text_names_several_limits() -> None:
    want = Budget(bytes="50%", latency="1.1 x uint8/int8")
    assert Budget.parse("bytes=50%, latency=1.1 x uint8/int8") == want
    with pytest.raises(
        ConfigError, match="budget 'flops=3': expected one of bytes, bit_ops, latency"
    ):
        Budget.parse("flops=3")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bytes": 0}, "has to be above 0"),
        ({"bytes": "0%"}, "has to be above 0"),
        ({"bytes": "3 ms"}, "unit 'ms' is none of B, KB"),
        ({"latency": "fast"}, "expected a number, perhaps with a unit"),
        ({"latency": "1.1 x int8"}, "give the types of activations and weights"),
    ],
)
def test_what_is_no_budget_is_refused(given: dict[str, float | str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget(**given)


def test_a_multiple_of_what_no_group_has_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"no group has the choice uint4/int4; there are uint8/int8"
    ):
        Budget(bytes="1 x uint4/int4").limits(COSTS, GROUPS)
    assert everywhere(GROUPS, INT16) == {"a": INT16, "b": FLOAT}
    assert everywhere([*GROUPS, Group("c", ("c",), (Choice("uint16", "int4"), INT8))], INT16)[
        "c"
    ] == (Choice("uint16", "int4"))
