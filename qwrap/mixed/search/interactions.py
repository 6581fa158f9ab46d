"""Losses of groups, corrected by what was measured of whole assignments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qwrap.mixed.choices import Assignment, Choice
from qwrap.mixed.search.linear import LinearCost

Key = tuple[str, Choice]

DOUBT = 0.5  # standard deviation of a loss in its place among others, as a share of it
NOISE = 0.05  # the same of what is measured of an assignment: the sum is a model
LEAST = 1e-3  # of the mean loss: groups that seem to lose nothing may be found to lose so much


class LossModel:
    """Losses that add up, starting from those of groups alone and learning from assignments.

    What groups lose together is not what they lose one by one: errors are amplified, cancel, or
    hide behind one another. The loss t of each group and choice is taken as normal with the mean
    that was found alone and a deviation in proportion to it; of each measured assignment the sum
    of its losses is known. The conditional mean given these is what ``losses`` returns: where a
    sum is off, the groups that lose most, and about which other sums say least, are corrected most.

    Args:
        alone: (name of the group, choice) -> loss of the group alone.

    Source: linear regression with a normal prior, Rasmussen and Williams, Gaussian Processes for
    Machine Learning (2006), section 2.1.
    """

    def __init__(self, alone: Mapping[Key, float]) -> None:
        self._column = {key: i for i, key in enumerate(alone)}
        self._alone = np.maximum(np.array([*alone.values()], dtype=np.float64), 0.0)
        self._exact = np.array([choice.is_float for _, choice in alone])
        self._rows: list[NDArray[np.float64]] = []
        self._found: list[float] = []

    def observe(self, assignment: Assignment, loss: float) -> None:
        """Take in, in place, what a whole assignment was found to lose."""
        row = np.zeros(len(self._column))
        row[[self._column[key] for key in assignment.items()]] = 1.0
        self._rows.append(row)
        self._found.append(loss)

    def losses(self) -> LinearCost:
        """Return the loss of each group and choice, as far as is known by now."""
        values = self._corrected()
        return LinearCost(
            name="loss", of={key: float(values[i]) for key, i in self._column.items()}
        )

    def _corrected(self) -> NDArray[np.float64]:
        if not self._rows:
            return self._alone
        rows, found = np.array(self._rows), np.array(self._found)
        mean = self._alone * _scale(rows @ self._alone, found)
        floor = LEAST * mean[~self._exact].mean() if not self._exact.all() else 0.0
        deviation = np.where(self._exact, 0.0, DOUBT * np.maximum(mean, floor))
        spread = rows * deviation
        noise = np.square(NOISE * found) + np.square(floor)
        gain = np.linalg.lstsq(spread @ spread.T + np.diag(noise), found - rows @ mean, rcond=None)
        corrected = mean + deviation * (spread.T @ gain[0])
        return np.asarray(np.maximum(corrected, 0.0))


def _scale(predicted: NDArray[np.float64], found: Sequence[float] | NDArray[np.float64]) -> float:
    """Return the factor that most assignments lose more, or less, than the sum.

    Two that lose as predicted are taken for granted, lest one or two say it of all.
    """
    ratios = [f / p for f, p in zip(found, predicted, strict=True) if p > 0 and f > 0]
    return float(np.median([1.0, 1.0, *ratios]))
