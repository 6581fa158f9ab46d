"""Parts of a latency, moved to where their sums fit the times of whole files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qwrap.mixed.cost.parts import MICRO, Pair, Parts, Term, Timed

Floats = npt.NDArray[np.float64]

# How far off the parts may be, as a share and in seconds: what the times of whole files correct.
_PART_OFF = (0.08, 0.3 * MICRO)
_CONVERSION_OFF = (0.3, 0.5 * MICRO)
GUESS_OFF = (0.6, 1.0 * MICRO)
_REST_OFF = (0.08, 5.0 * MICRO)
_ALL_OFF = 0.08  # all groups of one choice, or all conversions of one kind, as a share
WALL_NOISE = 0.015  # of the time of a whole file


def corrected(parts: Parts, timed: Sequence[Timed]) -> Parts:
    """Return parts whose sums fit the times of whole files better; none becomes negative.

    The mean of the posterior of normal priors around the parts, given sums with normal noise. A
    part may be off by itself, and all of one choice, or of one kind of conversion, may be off
    together: what a kernel finds in the caches depends on what runs beside it.
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
    noise = WALL_NOISE * measured
    together = _together(terms, _ALL_OFF * mean)
    found = posterior(mean, off, rows, measured, noise, together)
    while (found < 0).any():  # what would be negative is 0, and the others make up for it
        mean, off = np.where(found < 0, 0.0, mean), np.where(found < 0, 0.0, off)
        together = np.where(found < 0, 0.0, together)
        found = posterior(mean, off, rows, measured, noise, together)
    return parts.with_values(dict(zip(terms, found.tolist(), strict=True)))


def _together(terms: Sequence[Term], off: Floats) -> Floats:
    """Return [kinds, terms]: how far the terms of each kind may be off together."""
    kinds = list(dict.fromkeys(term[-1] for term in terms))
    return np.array([[x if t[-1] == k else 0.0 for t, x in zip(terms, off, strict=True)]
                     for k in kinds])  # fmt: skip


def posterior(
    mean: Floats,
    deviation: Floats,
    rows: Floats,
    observed: Floats,
    noise: Floats,
    together: Floats | None = None,
) -> Floats:
    """Return the mean of normal variables, given ``rows @ variables`` with normal noise.

    Args:
        mean: [n], before.
        deviation: [n], standard deviations before, of each variable by itself.
        rows: [m, n].
        observed: [m].
        noise: [m], standard deviations.
        together: [k, n], what one standard deviation of each of k common causes adds.

    Source: Rasmussen and Williams, Gaussian Processes for Machine Learning, section 2.1.
    """
    spread = rows * deviation**2  # rows @ covariance
    if together is not None:
        spread += (rows @ together.T) @ together
    inner = spread @ rows.T + np.diag(noise**2)
    result: Floats = mean + spread.T @ np.linalg.solve(inner, observed - rows @ mean)
    return result


def _off(term: Term, value: float, known: set[tuple[str, Pair]]) -> float:
    if term[0] == "edge":
        share, least = _CONVERSION_OFF if term[1:] in known else GUESS_OFF
    else:
        share, least = _REST_OFF if term[0] == "constant" else _PART_OFF
    return share * value + least
