"""How much one distribution tells of another, and the bins that keep most of a histogram."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwrap.ort.errors import QuantizationError

Array = NDArray[Any]

_TINY = 1e-30  # so that the logarithm of nothing, times nothing, is nothing
_ROWS = 32  # histograms at a time: what fits into a cache is twice as fast
_TRACE = 1e-4  # what an empty bin counts as, where the other distribution is not empty


def rel_entr(pk: Array, qk: Array) -> Array:
    """Return ``pk * log(pk / qk)`` element by element: 0 where ``pk`` is, infinite where undefined.

    The same as ``scipy.special.rel_entr``.
    """
    result = np.full(pk.shape, np.inf, dtype=pk.dtype)
    result[(pk == 0) & (qk >= 0)] = 0
    both = (pk > 0) & (qk > 0)
    result[both] = pk[both] * np.log(pk[both] / qk[both])
    return result


def entropy(pk: Array, qk: Array, base: float | None = None, axis: int = 0) -> Array:
    """Return the divergence of ``qk`` from ``pk``, both made to sum to 1, in float32.

    The same as ``scipy.stats.entropy(pk, qk)``.

    Args:
        pk: weights of the distribution that is to be told.
        qk: weights of the one that tells it.
        base: of the logarithm, e if None.
        axis: along which the weights lie.

    Raises:
        QuantizationError: ``base`` is not positive, or ``qk`` is None.
    """
    if base is not None and base <= 0:
        raise QuantizationError(f"base={base} must be a positive number or `None`.")
    if qk is None:
        raise QuantizationError("qk is None")
    p, q = np.broadcast_arrays(np.asarray(pk, np.float32), np.asarray(qk, np.float32))
    p = p / p.sum(axis=axis, keepdims=True)
    q = q / q.sum(axis=axis, keepdims=True)
    total = rel_entr(p, q).sum(axis=axis)
    return np.asarray(total if base is None else total / np.log(base), np.float32)


def smooth_distribution(p: Array, eps: float = _TRACE) -> Array | None:
    """Return ``p`` with ``eps`` in its empty entries, taken evenly from the others.

    Args:
        p: counts or weights.
        eps: what an empty entry gets.

    Returns:
        float32 of the same sum, None if all entries are empty.

    Raises:
        QuantizationError: so many are empty that others would become negative.
    """
    empty = p == 0
    filled = p.size - int(empty.sum())
    if not filled:
        return None
    share = eps * (p.size - filled) / filled
    smooth = np.where(empty, eps, p.astype(np.float32) - np.float32(share)).astype(np.float32)
    if share >= 1 or (smooth <= 0).any():
        raise QuantizationError(
            f"{filled} of {p.size} bins hold values, too few to smooth them by eps={eps}"
        )
    return smooth


def least_divergence(counts: Tensor, levels: int) -> Tensor:
    """Return how many bins to keep on each side of the middle, ``[R]``, of every histogram.

    For every number of bins from half of ``levels`` outwards, P is what lies within, with all that
    lies beyond added to the bins at the ends, and Q is what lies within, summed to ``levels``
    groups of as many bins, the last with the remainder, and spread evenly over those bins of a
    group that P is not empty in. The number with the least divergence of Q from P wins, of equal
    ones the smallest. The first number with nothing beyond is the last one looked at.

    Args:
        counts: ``[R, N]``, 0 in the middle.
        levels: groups, 2 or more.

    Returns:
        Bins kept on each side, int64; ``N // 2`` where there are too few to choose from. Where N is
        odd the bin in the middle is kept as well.

    Source: Migacz, "8-bit inference with TensorRT", GTC 2017, in the form of Apache MXNet's
    ``_get_optimal_threshold``. onnxruntime's form of it also spreads Q over empty bins, leaves
    the remainder of the last group empty, and rounds Q to integers.
    """
    bins = counts.shape[1]
    sides = torch.arange(-(-(levels - bins % 2) // 2), bins // 2 + 1)
    if len(sides) < 2:
        return torch.full((len(counts),), bins // 2)
    sizes = (2 * sides + bins % 2) // levels
    best = []
    for rows in torch.split(counts.to(torch.float64), _ROWS):
        sums = _Sums(rows)
        found = [sums.divergences(sides[sizes == s], int(s), levels) for s in torch.unique(sizes)]
        too_wide = sides > _reach(rows).clamp(min=int(sides[0]))[:, None]
        divergences = torch.cat(found, 1).masked_fill_(too_wide, torch.inf)
        best.append(sides[divergences.argmin(1)])
    return torch.cat(best)


def _reach(counts: Tensor) -> Tensor:
    """Return how many bins on each side of the middle hold all values, ``[R]``."""
    bins = counts.shape[1]
    away = torch.arange(bins) - bins // 2
    needed = torch.where(away < 0, -away, away + 1 - bins % 2)
    return torch.where(counts > 0, needed, 0).amax(1)


class _Sums:
    """Sums before each bin of histograms, ``[R, N + 1]``: of counts, filled bins and terms."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts
        self.below, self.filled, self.spread = (
            torch.cat([torch.zeros_like(x[:, :1]), x.cumsum(1)], 1)
            for x in (counts, (counts > 0).to(counts.dtype), torch.special.xlogy(counts, counts))
        )

    def divergences(self, sides: Tensor, size: int, levels: int) -> Tensor:
        """Return the divergence for each number of bins a side, ``[R, S]``; groups have ``size``.

        With p the bins of P, G and m the sum and the filled bins of each group, W the sum of P
        there, S that of all G and T that of P, it is ``(sum p log p - sum W log(G / m)) / T +
        log(S / T)``. W is G but in the outer groups.
        """
        bins = self.counts.shape[1]
        starts = bins // 2 - sides
        ends = bins - starts
        last = starts + (levels - 1) * size
        below = self.below
        total, within = below[:, -1:], below[:, ends] - below[:, starts]
        told = self._inner(starts, last - size, size)
        lost = self.spread[:, ends] - self.spread[:, starts]
        for beyond, left, right, end in (
            (below[:, starts], starts, starts + size, starts),
            (total - below[:, ends], last, ends, ends - 1),
        ):
            at_end = self.counts[:, end]
            group = below[:, right] - below[:, left]
            filled = self.filled[:, right] - self.filled[:, left]
            filled = filled + ((at_end == 0) & (beyond > 0))
            mean = torch.where(group > 0, group / filled.clamp(min=1), _TRACE)
            told = told + torch.special.xlogy(group + beyond, mean)
            both = at_end + beyond
            lost = lost + torch.special.xlogy(both, both) - torch.special.xlogy(at_end, at_end)
        result = (lost - told) / total + (within / total).log()
        return torch.where(within > 0, result, torch.inf)

    def _inner(self, first: Tensor, last: Tensor, size: int) -> Tensor:
        """Return the sum of ``G log(G / m)`` over the groups after ``first`` up to ``last``.

        Groups that begin ``size`` bins apart are summed for all thresholds at once.
        """
        low, high = int(first.min()), int(last.max()) + 1  # where groups begin
        low_end, high_end = low + size, high + size
        group = self.below[:, low_end:high_end] - self.below[:, low:high]
        filled = self.filled[:, low_end:high_end] - self.filled[:, low:high]
        terms = group.div(filled.clamp_(min=1)).clamp_(min=_TINY).log_().mul_(group)
        terms = torch.nn.functional.pad(terms, (0, -(high - low) % size))
        summed = terms.view(len(terms), -1, size).cumsum(1).flatten(1)
        return summed[:, last - low] - summed[:, first - low]
