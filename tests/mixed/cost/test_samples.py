"""Assignments that are timed."""

from itertools import pairwise

from qwrap.mixed.choices import CHOICES, FLOAT, Group
from qwrap.mixed.cost.owners import Border
from qwrap.mixed.cost.parts import types_at
from qwrap.mixed.cost.samples import random_assignments, sample_assignments

NAMES = [f"g{i}" for i in range(20)]
GROUPS = [Group(name, (name,), CHOICES) for name in NAMES]
BORDERS = [Border(a, a, a, (b,)) for a, b in pairwise(NAMES)]


def test_each_choice_is_everywhere_in_one() -> None:
    found = sample_assignments(GROUPS, BORDERS, 0, 0)
    assert found == [dict.fromkeys(NAMES, choice) for choice in CHOICES]


def test_nine_mixtures_of_three_choices_have_nearly_all_conversions_of_a_chain() -> None:
    seen = set()
    for mix in sample_assignments(GROUPS, BORDERS, 9, 0):
        for border in BORDERS:
            source, kinds = types_at(border.producer, border.consumers, mix)
            seen |= {(border.tensor, source, kind) for kind in kinds}
    # 6 of the 9 are made to cover the 6 conversions of a tensor, group by group and greedily.
    assert len(seen) >= 0.9 * 6 * len(BORDERS)


def test_the_same_seed_gives_the_same_assignments_and_others_others() -> None:
    assert sample_assignments(GROUPS, BORDERS, 4, 1) == sample_assignments(GROUPS, BORDERS, 4, 1)
    assert random_assignments(GROUPS, 4, 1) != random_assignments(GROUPS, 4, 2)


def test_groups_get_choices_that_they_have() -> None:
    few = [*GROUPS[:3], Group("last", ("last",), (CHOICES[0], FLOAT))]
    for mix in sample_assignments(few, BORDERS[:2], 6, 0):
        assert all(mix[group.name] in group.choices for group in few)
