"""Ranges chosen from histograms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwrap.ort.calibration.divergence import least_divergence
from qwrap.ort.calibration.histogram import Histogram, RealHistogram
from qwrap.ort.errors import QuantizationError

Array = NDArray[Any]
Range = tuple[Array, Array]

LEAST_BINS = 512  # from which a mean and a deviation can be told


def percentile_ends(histogram: Histogram, percentile: float, *, symmetric: bool) -> tuple[Any, Any]:
    """Return ends between which ``percentile`` percent of the values lie, to the width of a bin.

    They are the borders of the bins in which that share is reached.

    Args:
        histogram: of magnitudes if the ends are to be equally far from 0.
        percentile: 0 to 100; of the rest, half is below and half above if not ``symmetric``.
        symmetric: whether the ends are to be equally far from 0.
    """
    below = np.cumsum(histogram.hist)
    share = percentile / 100 if symmetric else 1 - (100 - percentile) / 200
    right = histogram.edges[_reaching(below, share) + 1]
    return (-right if symmetric else histogram.edges[_reaching(below, 1 - share)]), right


def _reaching(below: Array, share: float) -> int:
    """Return the first bin up to which ``share`` of all values lie."""
    wanted = share * float(below[-1])
    wanted -= 1e-12 * wanted  # the product may be rounded up from a whole number
    return min(int(np.searchsorted(below, wanted)), len(below) - 1)


def entropy_ranges(histograms: list[RealHistogram], levels: int, *, symmetric: bool) -> list[Range]:
    """Return the ranges whose ``levels`` groups of bins keep most of each distribution.

    Args:
        histograms: of any numbers of bins; those of as many are searched together.
        levels: groups, see ``least_divergence``.
        symmetric: whether the ends are to be equally far from 0, else none is beyond its extreme.
    """
    if levels < 2:
        raise QuantizationError(f"num_quantized_bins={levels}: a range has 2 at least")
    kept = np.empty(len(histograms), np.int64)
    sizes = np.array([len(histogram.hist) for histogram in histograms])
    for size in np.unique(sizes):
        alike = np.flatnonzero(sizes == size)
        counts = _without_spike(torch.from_numpy(np.stack([histograms[i].hist for i in alike])))
        kept[alike] = least_divergence(counts, levels).numpy()
    return [
        within(h, h.edges[size // 2 - side], h.edges[size - size // 2 + side], symmetric=symmetric)
        for h, size, side in zip(histograms, sizes, kept, strict=True)
    ]


def _without_spike(counts: Tensor) -> Tensor:
    """Return counts ``[R, N]`` whose bin of zero is no higher than the next ones on both sides.

    Zero is a code of every quantizer and loses nothing, but a ReLU's zeros, spread over the group
    of the bins beside them, outweigh all other losses: thresholds shrank to a tenth of the range.

    Source: NVIDIA's pytorch-quantization, whose entropy calibrator replaces the bin of zero too.
    """
    middle = counts.shape[1] // 2
    if not 0 < middle < counts.shape[1] - 1:
        return counts
    beside = torch.maximum(counts[:, middle - 1], counts[:, middle + 1])
    result = counts.clone()
    result[:, middle] = torch.minimum(counts[:, middle], beside)
    return result


def within(histogram: Histogram, left: Any, right: Any, *, symmetric: bool) -> Range:
    """Return the range without what lies beyond the extremes, in the type of the values."""
    low, high = histogram.low, histogram.high
    if symmetric:
        high = np.maximum(np.abs(low), np.abs(high))
        low = -high
    dtype = high.dtype
    ends = np.clip(left, low, high), np.clip(right, low, high)
    return np.asarray(ends[0], dtype), np.asarray(ends[1], dtype)


def mean_and_deviation(hist: Array, edges: Array, power: float = 1) -> Range:
    """Return mean and standard deviation of values, or of their powers, from their histogram.

    Every value counts as the middle of its bin; signs outlive powers.

    Args:
        hist: counts.
        edges: borders of the bins; the result has their type.
        power: of the values, above 0.

    Raises:
        QuantizationError: it is not.
    """
    if power <= 0:
        raise QuantizationError(f"power={power} <= 0 is invalid.")
    middles = (edges[:-1] * 0.5 + edges[1:] * 0.5).astype(np.float64)
    values = middles if power == 1 else np.sign(middles) * np.abs(middles) ** power
    total = max(hist.sum(), 1)  # of an empty tensor, mean and deviation are 0
    mean = (hist * values).sum() / total
    variance = (hist * values**2).sum() / total - mean**2
    deviation = np.sqrt(np.maximum(variance, 0))
    return np.array(mean, edges.dtype), np.array(deviation, edges.dtype)
