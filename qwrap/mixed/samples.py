"""Which assignments are timed, so that each choice and most conversions occur in some."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwrap.mixed.choices import Choice, Group, everywhere
from qwrap.mixed.cost import all_choices

_STAYS = 0.5  # chance that a group has the choice of the one before it


def sample_assignments(groups: Sequence[Group], mixes: int, seed: int) -> list[dict[str, Choice]]:
    """Return one assignment for each choice, which all groups have, and ``mixes`` random ones.

    The random ones differ in how often each choice occurs, and have it in runs of groups, about
    half of whose neighbours are of another choice.
    """
    rng = np.random.default_rng(seed)
    choices = all_choices(groups)
    found = [everywhere(groups, choice) for choice in choices]
    for _ in range(mixes):
        chances = dict(zip(choices, rng.dirichlet(np.ones(len(choices))), strict=True))
        mix: dict[str, Choice] = {}
        last: Choice | None = None
        for group in groups:
            if last not in group.choices or rng.random() > _STAYS:
                weights = np.array([chances[choice] for choice in group.choices])
                last = group.choices[rng.choice(len(weights), p=weights / weights.sum())]
            mix[group.name] = last
        found.append(mix)
    unique = {tuple(sorted(mix.items())): mix for mix in found}
    return list(unique.values())
