"""Which assignments are timed, so that each choice and most conversions occur in some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from qwrap.mixed.choices import Choice, Group, everywhere
from qwrap.mixed.cost.cost import all_choices
from qwrap.mixed.cost.owners import Border
from qwrap.mixed.cost.parts import Pair, types_at

_STAYS = 0.5  # chance that a group has the choice of the one before it
_COVERING = 2 / 3  # of the mixtures look for conversions which no other has


def sample_assignments(
    groups: Sequence[Group], borders: Sequence[Border], mixes: int, seed: int
) -> list[dict[str, Choice]]:
    """Return one assignment for each choice, which all groups have, and ``mixes`` others.

    Two thirds of the others have as many conversions as can be that none before them has. The rest
    have one choice nearly everywhere, as what a search under a budget finds.
    """
    rng = np.random.default_rng(seed)
    found = [everywhere(groups, choice) for choice in all_choices(groups)]
    covering = round(mixes * _COVERING)
    seen = _Seen(borders)
    for mix in found:
        seen.add(mix)
    for _ in range(covering):
        found.append(_covering(groups, seen, rng))
        seen.add(found[-1])
    choices = all_choices(groups)
    rest = range(mixes - covering)
    found += [_mostly(groups, choices[number % len(choices)], rng) for number in rest]
    unique = {tuple(sorted(mix.items())): mix for mix in found}
    return list(unique.values())


def random_assignments(groups: Sequence[Group], count: int, seed: int) -> list[dict[str, Choice]]:
    """Return random assignments, which differ in how often they have each choice.

    They have it in runs of groups, about half of whose neighbours are of another choice.
    """
    rng = np.random.default_rng(seed)
    choices, found = all_choices(groups), []
    for _ in range(count):
        chances = dict(zip(choices, rng.dirichlet(np.ones(len(choices))), strict=True))
        mix: dict[str, Choice] = {}
        last: Choice | None = None
        for group in groups:
            if last not in group.choices or rng.random() > _STAYS:
                weights = np.array([chances[choice] for choice in group.choices])
                last = group.choices[rng.choice(len(weights), p=weights / weights.sum())]
            mix[group.name] = last
        found.append(mix)
    return found


def _mostly(groups: Sequence[Group], choice: Choice, rng: np.random.Generator) -> dict[str, Choice]:
    """Return an assignment that has ``choice`` in most groups, and others in some."""
    mix, share = everywhere(groups, choice), rng.uniform(0.1, 0.4)
    for group in groups:
        if rng.random() < share:
            mix[group.name] = group.choices[rng.integers(len(group.choices))]
    return mix


def _covering(groups: Sequence[Group], seen: _Seen, rng: np.random.Generator) -> dict[str, Choice]:
    """Return an assignment with many new conversions: group by group that with the most."""
    mix: dict[str, Choice] = {}
    for group in groups:
        order = rng.permutation(len(group.choices))
        options = [group.choices[i] for i in order]
        mix[group.name] = max(options, key=lambda c: seen.news(mix | {group.name: c}, group.name))
    return mix


class _Seen:
    """The conversions of the assignments so far."""

    def __init__(self, borders: Sequence[Border]) -> None:
        self._pairs: set[tuple[str, Pair]] = set()
        self._borders = borders
        self._at: dict[str, list[Border]] = {}
        for border in borders:
            for name in {border.producer, *border.consumers} - {None}:
                self._at.setdefault(name or "", []).append(border)

    def add(self, mix: Mapping[str, Choice]) -> None:
        """Take in the conversions of one more, in place."""
        self._pairs.update(self._conversions(mix, self._borders))

    def news(self, mix: Mapping[str, Choice], name: str) -> int:
        """Return how many conversions at one group are new; groups without a choice do not count.

        Args:
            mix: an assignment that may be of some groups only.
            name: of the group.
        """
        return len(set(self._conversions(mix, self._at.get(name, ()))) - self._pairs)

    @staticmethod
    def _conversions(
        mix: Mapping[str, Choice], borders: Sequence[Border]
    ) -> Iterator[tuple[str, Pair]]:
        for border in borders:
            if border.producer is None or border.producer in mix:
                readers = [name for name in border.consumers if name is None or name in mix]
                source, kinds = types_at(border.producer, readers, mix)
                for kind in kinds:
                    yield border.tensor, (source, kind)
