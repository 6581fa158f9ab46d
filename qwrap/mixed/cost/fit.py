"""From the times of kernels and of whole files to what each choice and each conversion costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from qwrap.mixed.choices import Assignment, Choice, Edge, Group
from qwrap.mixed.cost.attribution import Attribution, Share
from qwrap.mixed.cost.correction import GUESS_OFF, WALL_NOISE, corrected, posterior
from qwrap.mixed.cost.owners import Border
from qwrap.mixed.cost.parts import (
    FLOAT32,
    MICRO,
    Pair,
    Parts,
    Timed,
    pairs_of,
    static_conversion,
    types_at,
)

_SHARE_NOISE = (0.1, 0.3 * MICRO)  # of the conversions of one tensor in one file
# Profiles against the clock: scale, seconds for each kernel, seconds for each run; how sure. In the
# time of a kernel is that of writing down its shapes, some 2 microseconds.
_CLOCK = ((1.0, -2.0 * MICRO, 5.0 * MICRO), (0.1, 1.5 * MICRO, 10.0 * MICRO))


def fitted(
    groups: Sequence[Group],
    borders: Sequence[Border],
    elements: Mapping[str, int],
    timed: Sequence[Timed],
) -> Parts:
    """Return what choices and conversions cost, from files that were timed as wholes and in parts.

    Kernels say how the time of a file divides; the clock says how much it is. So the parts are
    first averaged over the files where a group has the choice, or a tensor the conversion. Then
    they are moved, each within what it may be off, to where the sums fit the clock best.

    Args:
        groups: with their choices.
        borders: tensors between groups.
        elements: tensor -> its size.
        timed: what was measured; every choice of every group should be in one of them.
    """
    profiled = _as_the_clock_has_it([t for t in timed if t.shares is not None])
    means = _Means(borders, profiled)
    seconds = {
        (group.name, choice): means.of_group(group.name, choice)
        for group in groups
        for choice in group.choices
    }
    rates = _Rates(borders, elements, means)
    by_name = {group.name: group for group in groups}
    edges, known = [], set[tuple[str, Pair]]()
    for border in borders:
        costs = {}
        for pair in pairs_of(border, by_name):
            costs[pair], measured = rates.conversion(border, pair)
            if measured:
                known.add((border.tensor, pair))
        edges.append(Edge(border.tensor, border.producer, border.consumers, costs))
    parts = Parts(seconds, edges, means.rest, known)
    return corrected(parts, timed)


# --- profiles and the clock ----------------------------------------------------------------------


def _as_the_clock_has_it(timed: Sequence[Timed]) -> list[tuple[Assignment, Attribution]]:
    """Return shares in seconds of runs that are not profiled; they add up to the time of a run.

    Profiling adds to the time of every kernel, and between kernels the runtime does some work of
    its own. So a run takes ``scale * (sum of kernels) + each * (number of kernels) + once``; then
    each file has a scale of its own, for whatever else slowed it while it was profiled.
    """
    sums = [(s.seconds, s.kernels) for s in (_sum(t.shares) for t in timed)]
    rows = np.array([(seconds, count, 1.0) for seconds, count in sums])
    measured = np.array([t.seconds for t in timed])
    mean, off = (np.array(numbers) for numbers in _CLOCK)
    scale, each, once = posterior(mean, off, rows, measured, WALL_NOISE * measured)
    once = max(once, 0.0)

    def moved(share: Share) -> Share:
        return Share(max(scale * share.seconds + each * share.kernels, 0.0), share.kernels)

    found = []
    for t in timed:
        assert t.shares is not None
        groups = {name: moved(share) for name, share in t.shares.groups.items()}
        borders = {name: moved(share) for name, share in t.shares.borders.items()}
        shares = Attribution(groups, borders, moved(t.shares.rest))
        left = max(t.seconds - once, 0.0) / max(_sum(shares).seconds, MICRO)
        for share in shares.shares:
            share.seconds *= left
        shares.rest.seconds += once
        found.append((t.assignment, shares))
    return found


def _sum(shares: Attribution | None) -> Share:
    assert shares is not None
    return Share(sum(s.seconds for s in shares.shares), sum(s.kernels for s in shares.shares))


class _Means:
    """Averages over the files that were profiled."""

    def __init__(
        self, borders: Sequence[Border], profiled: Sequence[tuple[Assignment, Attribution]]
    ) -> None:
        self.profiled = profiled
        self.own: dict[tuple[str, str], float] = {}
        self.made: dict[str | None, list[Border]] = defaultdict(list)
        for border in borders:
            self.made[border.producer].append(border)
            self._set_own(border)
        rests = [shares.rest.seconds for _, shares in profiled]
        self.rest = _mean(rests) + sum(
            self.own.get((b.tensor, FLOAT32), 0) for b in self.made[None]
        )

    def _set_own(self, border: Border) -> None:
        """Find what a tensor costs whose readers all want the type that it is made in."""
        found: dict[str, list[float]] = defaultdict(list)
        for source, readers, seconds in self.seen(border):
            if not readers:
                found[source].append(seconds)
        for source, times in found.items():
            self.own[border.tensor, source] = _mean(times)

    def seen(self, border: Border) -> list[tuple[str, list[str], float]]:
        """Return type, other types wanted, and seconds of a tensor's conversions, by file."""
        found = []
        for assignment, shares in self.profiled:
            source, readers = types_at(border.producer, border.consumers, assignment)
            share = shares.borders.get(border.tensor)
            found.append((source, readers, 0.0 if share is None else share.seconds))
        return found

    def of_group(self, name: str, choice: Choice) -> float:
        """Return the seconds of a group, with those pairs on its outputs that it always has."""
        pure, mixed = list[float](), list[float]()
        for assignment, shares in self.profiled:
            if assignment[name] == choice:
                times = pure if len({c.activation for c in assignment.values()}) == 1 else mixed
                times.append(shares.groups[name].seconds if name in shares.groups else 0.0)
        own = sum(self.own.get((b.tensor, choice.activation), 0.0) for b in self.made[name])
        if pure and mixed:  # caches and layouts make the two differ; most searches end in between
            return (_mean(pure) + _mean(mixed)) / 2 + own
        return _mean(pure or mixed) + own


class _Rates:
    """What conversions cost: as measured on a tensor, else by its size."""

    def __init__(
        self, borders: Sequence[Border], elements: Mapping[str, int], means: _Means
    ) -> None:
        self.elements, self.means = elements, means
        samples: dict[Pair, list[tuple[int, float]]] = defaultdict(list)
        for border in borders:
            for source, readers, seconds in means.seen(border):
                if len(readers) == 1:
                    more = seconds - means.own.get((border.tensor, source), 0.0)
                    samples[source, readers[0]].append((elements[border.tensor], max(more, 0.0)))
        self.lines = {pair: _line(found) for pair, found in samples.items()}

    def guess(self, tensor: str, pair: Pair) -> float:
        """Return the seconds of a conversion, from the size of the tensor alone."""
        elements = self.elements[tensor]
        if pair in self.lines:
            once, each = self.lines[pair]
            return once + each * elements
        return static_conversion(pair, elements)

    def conversion(self, border: Border, pair: Pair) -> tuple[float, bool]:
        """Return the seconds of a conversion, and whether some file has it."""
        kinds = [pair[1]]
        rows, observed = [], []
        for source, readers, seconds in self.means.seen(border):
            if source == pair[0] and pair[1] in readers:
                rows.append(readers)
                observed.append(seconds - self.means.own.get((border.tensor, source), 0.0))
                kinds += readers
        kinds = list(dict.fromkeys(kinds))
        guesses = np.array([self.guess(border.tensor, (pair[0], kind)) for kind in kinds])
        if not rows:
            return float(guesses[0]), False
        table = np.array([[float(kind in readers) for kind in kinds] for readers in rows])
        times = np.array(observed)
        # Some kernels are many times slower between layouts that they were not made for.
        off = GUESS_OFF[0] * np.maximum(guesses, np.abs(times).max()) + GUESS_OFF[1]
        noise = _SHARE_NOISE[0] * np.abs(times) + _SHARE_NOISE[1]
        return max(float(posterior(guesses, off, table, times, noise)[0]), 0.0), True


def _line(samples: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return seconds once and for each element, neither below 0; relative errors count."""
    from scipy.optimize import nnls  # slow to import

    sizes, times = (np.array(column, float) for column in zip(*samples, strict=True))
    weight = 1.0 / (times + MICRO)
    rows = np.stack([weight, weight * sizes], axis=1)
    (once, each), _ = nnls(rows, weight * times)
    return float(once), float(each)


def _mean(times: Sequence[float]) -> float:
    return sum(times) / len(times) if times else 0.0
