"""Ranges that keep a given share of the values."""

from __future__ import annotations

import torch
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.quant.ranges.rows import HistogramRows


def percentile_range(
    rows: HistogramRows, spec: QuantSpec, percentile: float
) -> tuple[Tensor, Tensor]:
    """Return the range that keeps ``percentile`` percent of the values, exact zeros among them.

    An asymmetric type loses half of the rest off each side. A symmetric one, whose range ends at
    the larger magnitude, loses all of it off the largest magnitudes. Both are what onnxruntime's
    percentile calibration does, on the histogram of values or of magnitudes; within a bin, where
    that takes an edge, values are taken to lie evenly.

    Args:
        rows: what was seen.
        spec: says whether the type is symmetric.
        percentile: above 50, at most 100.
    """
    total = rows.total
    if spec.symmetric:
        kept = total * (percentile / 100)
        largest = _quantiles(*_magnitudes(rows), kept[:, None])[:, 0]
        ends = -largest, largest
    else:
        cut = total * ((100 - percentile) / 200)
        low, high = _quantiles(*_with_zeros(rows), torch.stack([cut, total - cut], 1)).unbind(1)
        ends = low, high
    return rows.within(*ends)


def _with_zeros(rows: HistogramRows) -> tuple[Tensor, Tensor]:
    """Return counts and edges with a bin of no width for the zeros."""
    middle = -rows.first
    counts, edges = rows.counts, rows.edges
    counts = torch.cat([counts[:, :middle], rows.zeros[:, None], counts[:, middle:]], 1)
    zero = torch.zeros_like(rows.zeros)[:, None]
    return counts, torch.cat([edges[:, :middle], zero, zero, edges[:, middle + 1 :]], 1)


def _magnitudes(rows: HistogramRows) -> tuple[Tensor, Tensor]:
    """Return counts and edges of the magnitudes, zeros first in a bin of no width."""
    middle = -rows.first
    above, below = rows.counts[:, middle:], rows.counts[:, :middle].flip(1)
    counts = above + below if rows.two_sided else torch.cat([above, below], 1)
    edges = rows.width[:, None] * torch.arange(counts.shape[1] + 1, dtype=torch.float64)
    largest = torch.maximum(-rows.low, rows.high)
    edges = torch.minimum(edges, largest[:, None])
    zero = torch.zeros_like(rows.zeros)[:, None]
    return torch.cat([rows.zeros[:, None], counts], 1), torch.cat([zero, edges], 1)


def _quantiles(counts: Tensor, edges: Tensor, ranks: Tensor) -> Tensor:
    """Return the values ``[R, K]`` below which lie ``ranks`` ``[R, K]`` of the values."""
    below = counts.cumsum(1)
    index = torch.searchsorted(below, ranks).clamp_(max=counts.shape[1] - 1)
    inside = counts.gather(1, index)
    part = 1 - (below.gather(1, index) - ranks) / inside.clamp(min=1)
    left = edges.gather(1, index)
    return left + part * (edges.gather(1, index + 1) - left)
