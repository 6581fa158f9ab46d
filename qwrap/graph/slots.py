"""Numbers for channels: equal ones have to be scaled alike, some must not be scaled at all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of the slots.

    Attributes:
        classes: slot -> its class, -1 for those that must not be scaled; int64 ``[S]``.
        count: how many classes there are, -1 left out.
        runs: slots that were made together, each as first and one behind the last.
        reasons: for each of ``runs``, why some of it must not be scaled; "" for nothing.
    """

    classes: Numbers
    count: int
    runs: list[tuple[int, int]]
    reasons: list[str]


class Slots:
    """One number for each channel of each tensor that something divides."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, int]] = []
        self._size = 0
        self._pairs: list[tuple[Numbers, Numbers]] = []
        self._pins: list[tuple[Numbers, str]] = []
        self._pinned: set[int] = set()

    def fresh(self, count: int) -> Numbers:
        """Return ``count`` new ones, int64."""
        start, self._size = self._size, self._size + count
        self._runs.append((start, self._size))
        return np.arange(start, self._size, dtype=np.int64)

    def unite(self, first: Numbers, second: Numbers) -> None:
        """Let slots be scaled alike; the two broadcast against each other."""
        pair = np.broadcast_arrays(first, second)
        self._pairs.append((pair[0].ravel(), pair[1].ravel()))

    def pin(self, slots: Numbers, reason: str) -> None:
        """Let slots, and whatever is scaled like them, never be scaled."""
        pinned = np.unique(slots)
        self._pins.append((pinned, reason))
        self._pinned.update(pinned.tolist())

    def stays(self, slots: Numbers) -> bool:
        """Whether all of these have been pinned themselves by now."""
        return self._pinned.issuperset(np.unique(slots).tolist())

    def settle(self) -> Settled:
        """Return which slots are scaled alike, and why others are not."""
        components = self._components()
        reason_of = np.full(components.max(initial=-1) + 1, -1, np.int64)
        for index in reversed(range(len(self._pins))):  # the first reason is what is told
            reason_of[components[self._pins[index][0]]] = index
        found = reason_of[components]
        reasons = []
        for start, stop in self._runs:
            pinned = found[start:stop]
            first = pinned[pinned >= 0]
            reasons.append(self._pins[first.min()][1] if first.size else "")
        free, classes = np.unique(components[found < 0], return_inverse=True)
        settled = np.full(self._size, -1, np.int64)
        settled[found < 0] = classes
        return Settled(settled, free.size, self._runs, reasons)

    def _components(self) -> Numbers:
        if not self._size:
            return np.zeros(0, np.int64)
        from scipy.sparse import coo_array  # slow to import
        from scipy.sparse.csgraph import connected_components

        first = np.concatenate([a for a, _ in self._pairs] or [np.zeros(0, np.int64)])
        second = np.concatenate([b for _, b in self._pairs] or [np.zeros(0, np.int64)])
        shape = self._size, self._size
        links = coo_array((np.ones(first.size, np.int8), (first, second)), shape=shape).tocsr()
        labels = connected_components(links, directed=False)[1]
        return np.asarray(labels, np.int64)
