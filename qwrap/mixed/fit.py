"""From the times of kernels and of whole files to what each choice and each conversion costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qwrap.mixed.attribution import Attribution, Share
from qwrap.mixed.choices import Assignment, Choice, Edge, Group
from qwrap.mixed.owners import Border
from qwrap.quant.placement.cost import dequantize_cost, integer_layout_cost, quantize_cost

FLOAT32 = "float32"
Pair = tuple[str, str]
Term = tuple[Any, ...]
Floats = npt.NDArray[np.float64]

MICRO, NANO = 1e-6, 1e-9
# How far off the parts may be, as a share and in seconds: what the times of whole files correct.
_PART_OFF = (0.08, 0.3 * MICRO)
_CONVERSION_OFF = (0.3, 0.5 * MICRO)
_GUESS_OFF = (0.6, 1.0 * MICRO)
_REST_OFF = (0.08, 5.0 * MICRO)
_WALL_NOISE = 0.015  # of the time of a whole file
_SHARE_NOISE = (0.1, 0.3 * MICRO)  # of the conversions of one tensor in one file
# Profiles against the clock: scale, seconds for each kernel, seconds for each run; how sure. In the
# time of a kernel is that of writing down its shapes, some 2 microseconds.
_CLOCK = ((1.0, -2.0 * MICRO, 5.0 * MICRO), (0.1, 1.5 * MICRO, 10.0 * MICRO))


@dataclass(frozen=True, slots=True)
class Timed:
    """What was measured of one file.

    Attributes:
        assignment: what it was made for.
        seconds: of one run.
        shares: of its kernels; None if only the whole was timed.
    """

    assignment: Assignment
    seconds: float
    shares: Attribution | None = None


@dataclass(slots=True)
class Parts:
    """The terms that a latency is the sum of.

    Attributes:
        seconds: (group, choice) -> seconds.
        edges: what conversions cost.
        constant: what every assignment pays.
        known: (tensor, pair) of the conversions that were measured; the others are guessed.
    """

    seconds: dict[tuple[str, Choice], float]
    edges: list[Edge]
    constant: float
    known: set[tuple[str, Pair]] = field(default_factory=set)

    def terms(self, assignment: Assignment) -> list[Term]:
        """Return the terms that an assignment pays, see ``value``."""
        found: list[Term] = [("constant",)]
        found += [("choice", name, choice) for name, choice in assignment.items()]
        for edge in self.edges:
            source, readers = types_at(edge.producer, edge.consumers, assignment)
            found += [
                ("edge", edge.tensor, (source, reader))
                for reader in readers
                if (source, reader) in edge.costs
            ]
        return found

    def values(self) -> dict[Term, float]:
        """Return every term with its seconds."""
        found: dict[Term, float] = {("constant",): self.constant}
        found |= {("choice", *key): value for key, value in self.seconds.items()}
        for edge in self.edges:
            found |= {("edge", edge.tensor, pair): cost for pair, cost in edge.costs.items()}
        return found

    def with_values(self, values: Mapping[Term, float]) -> Parts:
        """Return the same terms with other seconds."""
        edges = [
            Edge(
                edge.tensor,
                edge.producer,
                edge.consumers,
                {pair: values["edge", edge.tensor, pair] for pair in edge.costs},
            )
            for edge in self.edges
        ]
        seconds = {(name, c): values["choice", name, c] for name, c in self.seconds}
        return Parts(seconds, edges, values["constant",], self.known)


def types_at(
    producer: str | None, consumers: Iterable[str | None], assignment: Assignment
) -> tuple[str, list[str]]:
    """Return the type of a tensor's producer, and the other ones that its readers want."""
    source = FLOAT32 if producer is None else assignment[producer].activation
    wanted = [FLOAT32 if c is None else assignment[c].activation for c in consumers]
    return source, [kind for kind in dict.fromkeys(wanted) if kind != source]


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


def corrected(parts: Parts, timed: Sequence[Timed]) -> Parts:
    """Return parts whose sums fit the times of whole files better; none becomes negative.

    The mean of the posterior of independent normal priors around the parts, given sums with
    normal noise.
    """
    values = parts.values()
    terms = list(values)
    place = {term: i for i, term in enumerate(terms)}
    rows = np.zeros((len(timed), len(terms)))
    for row, each in zip(rows, timed, strict=True):
        for term in parts.terms(each.assignment):
            row[place[term]] += 1.0
    mean = np.array([values[term] for term in terms])
    off = np.array([_off(term, values[term], parts.known) for term in terms])
    measured = np.array([each.seconds for each in timed])
    noise = _WALL_NOISE * measured
    found = posterior(mean, off, rows, measured, noise)
    while (found < 0).any():  # what would be negative is 0, and the others make up for it
        mean, off = np.where(found < 0, 0.0, mean), np.where(found < 0, 0.0, off)
        found = posterior(mean, off, rows, measured, noise)
    return parts.with_values(dict(zip(terms, found.tolist(), strict=True)))


def posterior(
    mean: Floats, deviation: Floats, rows: Floats, observed: Floats, noise: Floats
) -> Floats:
    """Return the mean of normal variables, given ``rows @ variables`` with normal noise.

    Args:
        mean: [n], before.
        deviation: [n], standard deviations before.
        rows: [m, n].
        observed: [m].
        noise: [m], standard deviations.

    Source: Rasmussen and Williams, Gaussian Processes for Machine Learning, section 2.1.
    """
    spread = rows * deviation**2  # rows @ covariance
    inner = spread @ rows.T + np.diag(noise**2)
    result: Floats = mean + spread.T @ np.linalg.solve(inner, observed - rows @ mean)
    return result


def _off(term: Term, value: float, known: set[tuple[str, Pair]]) -> float:
    if term[0] == "edge":
        share, least = _CONVERSION_OFF if term[1:] in known else _GUESS_OFF
    else:
        share, least = _REST_OFF if term[0] == "constant" else _PART_OFF
    return share * value + least


def pairs_of(border: Border, groups: Mapping[str, Group]) -> list[Pair]:
    """Return the conversions that some assignment has on a tensor."""

    def kinds(name: str | None) -> list[str]:
        choices = () if name is None else groups[name].choices
        return [FLOAT32] if name is None else [choice.activation for choice in choices]

    wanted = [kind for consumer in border.consumers for kind in kinds(consumer)]
    pairs = [(a, b) for a in kinds(border.producer) for b in wanted if a != b]
    return list(dict.fromkeys(pairs))


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
    scale, each, once = posterior(mean, off, rows, measured, _WALL_NOISE * measured)
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
        times = [
            shares.groups[name].seconds if name in shares.groups else 0.0
            for assignment, shares in self.profiled
            if assignment[name] == choice
        ]
        own = sum(self.own.get((b.tensor, choice.activation), 0.0) for b in self.made[name])
        return _mean(times) + own


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
        off = _GUESS_OFF[0] * guesses + _GUESS_OFF[1]
        noise = _SHARE_NOISE[0] * np.abs(times) + _SHARE_NOISE[1]
        return max(float(posterior(guesses, off, table, times, noise)[0]), 0.0), True


def static_conversion(pair: Pair, elements: int) -> float:
    """Return seconds of a conversion, as the cost model of the placement has them."""
    source, reader = pair
    cost = 0.0
    if not source.startswith("float"):
        cost += dequantize_cost(elements)
    if not reader.startswith("float"):
        cost += quantize_cost(elements)
    if source.startswith("float") and reader.startswith("float"):
        cost = quantize_cost(elements)  # a Cast
    return (cost + integer_layout_cost(elements)) * NANO


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
