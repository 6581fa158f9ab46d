"""Histograms whose bins stay where they are while their range grows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwrap.ort.calibration.bins import even_edges

Array = NDArray[Any]

MOST_BINS = 1 << 16
"""More than that are joined, three to one; a first batch of next to nothing would make millions."""


class RealHistogram(NamedTuple):
    """Counts over ``[-threshold, threshold]``, the tuple that onnxruntime's collector keeps.

    Attributes:
        hist: int64 ``[N]``.
        edges: float32 or float64 ``[N + 1]``.
        low: smallest value seen.
        high: largest value seen.
        threshold: half of the range.
    """

    hist: Array
    edges: Array
    low: Any
    high: Any
    threshold: Any


class AbsoluteHistogram(NamedTuple):
    """Counts of magnitudes, the tuple that onnxruntime's collector keeps.

    Attributes:
        hist: int64 ``[N]``.
        edges: float32 or float64 ``[N + 1]``.
        low: smallest value seen, with its sign.
        high: largest value seen.
    """

    hist: Array
    edges: Array
    low: Any
    high: Any


Histogram = RealHistogram | AbsoluteHistogram


def covering(old: RealHistogram | None, low: Any, high: Any, bins: int) -> RealHistogram:
    """Return a histogram with the counts of ``old`` that has room for values between the ends.

    The first one has ``bins`` bins. Later ones have as many more, of the same width, on each side
    as are needed.

    Args:
        old: what was counted, None for nothing; not modified.
        low: smallest value to come; a number or array without dimensions, of the values' type.
        high: largest value to come.
        bins: how many to begin with.
    """
    threshold = np.maximum(np.abs(low), np.abs(high))
    if old is None:
        edges = even_edges(-threshold, threshold, bins, edge_type(threshold))
        return RealHistogram(_empty(edges), edges, low, high, threshold)
    grown = old._replace(hist=old.hist.copy(), low=min(old.low, low), high=max(old.high, high))
    if threshold <= old.threshold:
        return grown
    if old.threshold == 0:  # zeros alone, in the bin in the middle
        edges = even_edges(-threshold, threshold, len(old.hist), edge_type(threshold))
        return grown._replace(edges=edges, threshold=threshold)
    hist, edges, threshold = _widened(grown.hist, old.threshold, threshold)
    return grown._replace(hist=hist, edges=edges, threshold=threshold)


def _widened(hist: Array, reached: Any, threshold: Any) -> tuple[Array, Array, Any]:
    """Return counts and borders with whole bins added on both sides, and how far they reach."""
    dtype = edge_type(threshold)
    reached, threshold = dtype.type(reached), dtype.type(threshold)
    while len(hist) * (float(threshold) / float(reached)) > MOST_BINS:
        padded = np.pad(hist, len(hist) % 3)
        reached = dtype.type(reached * (len(padded) / len(hist)))
        hist = padded.reshape(-1, 3).sum(1)
    width = 2 * reached / len(hist)
    more = int((threshold - reached) // width + 1)
    reached = more * width + reached
    return np.pad(hist, more), even_edges(-reached, reached, len(hist) + 2 * more, dtype), reached


def reaching(
    old: AbsoluteHistogram | None, low: Any, high: Any, least: Any, bins: int
) -> AbsoluteHistogram:
    """Return a histogram with the counts of ``old`` that has room for magnitudes of values.

    The first one has ``bins`` bins from the smallest magnitude to the largest. Later ones have as
    many more, of the same width, as are needed; what is below the first border then counts in the
    first bin.

    Args:
        old: what was counted, None for nothing; not modified.
        low: smallest value to come; a number or array without dimensions, of the values' type.
        high: largest value to come.
        least: smallest magnitude to come.
        bins: how many to begin with.
    """
    largest = np.maximum(np.abs(low), np.abs(high))
    if old is None:
        edges = even_edges(least, largest, bins, edge_type(largest))
        return AbsoluteHistogram(_empty(edges), edges, low, high)
    hist, edges = _lengthened(old.hist, old.edges, largest)
    return AbsoluteHistogram(hist, edges, min(old.low, low), max(old.high, high))


def _lengthened(hist: Array, edges: Array, largest: Any) -> tuple[Array, Array]:
    """Return counts and borders with whole bins added at the end."""
    largest = edges.dtype.type(largest)
    width = edges[1] - edges[0]
    while len(hist) + (float(largest) - float(edges[-1])) / float(width) > MOST_BINS:
        more = -len(hist) % 3
        edges = np.append(edges, edges[-1] + width * np.arange(1, more + 1, dtype=edges.dtype))
        hist = np.pad(hist, (0, more)).reshape(-1, 3).sum(1)
        edges = edges[::3]
        width = edges[1] - edges[0]
    if largest <= edges[-1]:
        return hist.copy(), edges
    added = np.arange(edges[-1] + width, largest + width, width, dtype=np.float64)
    edges = np.append(edges, added.astype(edges.dtype))
    return np.pad(hist, (0, len(edges) - 1 - len(hist))), edges


def _empty(edges: Array) -> Array:
    return np.zeros(len(edges) - 1, np.int64)


def edge_type(value: Any) -> np.dtype[Any]:
    """Return the type of borders: that of the values, or float32 where that is too coarse."""
    return np.dtype(np.float64 if value.dtype == np.float64 else np.float32)
