"""Ranges that lose the least information: the Kullback-Leibler divergence of TensorRT."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from qwrap.config import QuantSpec
from qwrap.quant.ranges.rows import HistogramRows

_TRACE = 1e-4


class Sweep(NamedTuple):
    """The thresholds tried, and how the bins of each are grouped.

    Attributes:
        bins: of the histogram.
        starts: ``[T]`` first bin within the threshold.
        ends: ``[T]`` bin after the last.
        first: ``[T]`` bins in the first group.
        last: ``[T]`` bins in the last group.
        sizes: of all groups between these, from the smallest to the largest.
        groups: ``[T, levels - 2]``, those groups: where they are in a table ``[sizes, bins]``, by
            size and first bin.
    """

    starts: Tensor
    ends: Tensor
    first: Tensor
    last: Tensor
    sizes: range
    groups: Tensor


def entropy_range(rows: HistogramRows, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the range whose codes keep the most of the values' distribution.

    For every threshold from one bin for each code outwards, P is the histogram with all that lies
    beyond added to the bins at the ends, and Q is that within, summed to as many groups as there
    are codes, and spread evenly over those bins of a group that P is not empty in. The threshold
    with the least divergence of P from Q wins, of equal ones the smallest. Where Q is empty and P
    has what lies beyond, Q counts as ``_TRACE`` of a value, as onnxruntime smooths it: a lone
    value far out must not forbid all thresholds that leave it out.

    Thresholds are the same on both sides, as in onnxruntime; the range ends at the extremes where
    these are nearer. Without values on one side of 0, the other is swept alone, with all codes of
    an asymmetric type, or half of those of a symmetric one. Groups differ by one bin at most in
    size, as in NVIDIA's pytorch-quantization. Exact zeros, which have no error, are left out.

    A type with more codes than the histogram has bins, as those of 16 bits are, loses nothing at
    any threshold: the range is that of the extremes. Float types and code books count as integers
    of as many bits.

    Args:
        rows: what was seen, on one side of 0 or on both.
        spec: says how many codes there are.

    Source: Migacz, "8-bit inference with TensorRT", GTC 2017; onnxruntime's
    ``HistogramCollector.get_entropy_threshold``.
    """
    counts = rows.counts if rows.two_sided or rows.first == 0 else rows.counts.flip(1)
    sweep = _sweep(counts.shape[1], _codes(spec, rows.two_sided), rows.two_sided)
    threshold = _threshold(counts, rows, sweep)
    return rows.within(-threshold, threshold)


def _codes(spec: QuantSpec, two_sided: bool) -> int:
    """Return how many codes a swept range has."""
    evenly = spec.dtype.levels is None
    codes = max(2, int(spec.qmax - spec.qmin) + 1) if evenly else 2**spec.dtype.bits
    return codes if two_sided or not spec.symmetric else codes // 2


def _threshold(counts: Tensor, rows: HistogramRows, sweep: Sweep) -> Tensor:
    """Return the best thresholds ``[R]`` in real units, infinite where none is better."""
    if not sweep.starts.numel():
        return torch.full_like(rows.width, torch.inf)
    # The first threshold that leaves nothing out is the last one of interest.
    largest = torch.maximum(-rows.low, rows.high)
    widest = (largest / rows.width).floor() + 1
    tried = (sweep.ends - sweep.starts) // (1 + rows.two_sided)
    divergence = _divergences(counts, sweep).masked_fill_(tried > widest[:, None], torch.inf)
    least, index = divergence.min(1)
    return torch.where(least.isfinite(), tried[index] * rows.width, torch.inf)


@functools.lru_cache(maxsize=8)
def _sweep(bins: int, levels: int, two_sided: bool) -> Sweep:
    """Return the thresholds of histograms of ``bins`` bins, with 0 at an end or in the middle."""
    if two_sided:
        least = -(-levels // 2)
        reach = torch.arange(least, max(least, bins // 2 + 1))
        starts, ends = bins // 2 - reach, bins // 2 + reach
    else:
        ends = torch.arange(levels, max(levels, bins + 1))
        starts = torch.zeros_like(ends)
    steps = torch.arange(levels + 1)
    borders = starts[:, None] + steps * (ends - starts)[:, None] // levels
    counted = borders.diff(dim=1)
    inner = counted[:, 1:-1]
    sizes = range(int(inner.min()), int(inner.max()) + 1) if inner.numel() else range(1, 2)
    groups = (inner - sizes[0]) * bins + borders[:, 1:-2]
    return Sweep(starts, ends, counted[:, 0], counted[:, -1], sizes, groups)


def _divergences(counts: Tensor, sweep: Sweep) -> Tensor:
    """Return the divergence of every threshold ``[R, T]`` for counts ``[R, N]``.

    With p the bins of P, G and m the sum and the non-empty bins of each group, W the sum of P
    there, S the sum of all G and T that of P, the divergence is
    ``(sum p log p - sum W log(G / m)) / T + log(S / T)``. In all groups but the outer two, W is G,
    so that their terms depend on their bins alone and are looked up.
    """
    below = _summed(counts)
    filled = _summed((counts > 0).to(counts.dtype))
    total = below[:, -1:]
    inner = _group_terms(below, filled, sweep)
    spread = _xlogx(counts)
    starts, ends = sweep.starts, sweep.ends
    borders = _summed(spread)
    information = borders[:, ends] - borders[:, starts] - inner
    outside = below[:, starts], total - below[:, ends]
    outer = ((starts, starts + sweep.first, starts), (ends - sweep.last, ends, ends - 1))
    for beyond, (left, right, end) in zip(outside, outer, strict=True):
        at_end = counts[:, end]
        group = below[:, right] - below[:, left]
        bins = filled[:, right] - filled[:, left] + ((at_end == 0) & (beyond > 0))
        information += _xlogx(at_end + beyond) - spread[:, end]
        mean = torch.where(group > 0, group / bins.clamp(min=1), _TRACE)
        information -= torch.special.xlogy(group + beyond, mean)
    within = below[:, ends] - below[:, starts]
    divergence = information / total + (within / total).log()
    return torch.where(within > 0, divergence, torch.inf)


def _group_terms(below: Tensor, filled: Tensor, sweep: Sweep) -> Tensor:
    """Return the sum of ``G log(G / m)`` over all groups but the outer two, ``[R, T]``."""
    sizes, groups = sweep.sizes, sweep.groups
    bins = below.shape[1] - 1
    if groups.numel() < len(sizes) * bins:
        left = groups % bins
        right = left + groups // bins + sizes[0]
        sums = [  # row by row, for the sake of memory
            _spread(b[right] - b[left], f[right] - f[left]).sum(1)
            for b, f in zip(below, filled, strict=True)
        ]
        return torch.stack(sums)
    # Thresholds share their groups: each is computed once, and the rows side by side.
    table = below.new_zeros(len(sizes), bins, below.shape[0])
    for size, row in zip(sizes, table, strict=True):
        terms = _spread(below[:, size:] - below[:, :-size], filled[:, size:] - filled[:, :-size])
        row[: bins + 1 - size] = terms.T
    return embedding_bag(groups, table.flatten(0, 1), mode="sum").T


def _spread(groups: Tensor, filled: Tensor) -> Tensor:
    """Return ``G log(G / m)``."""
    result: Tensor = torch.special.xlogy(groups, groups / filled.clamp_(min=1))
    return result


def _summed(values: Tensor) -> Tensor:
    """Return the sums before each bin, and of all, ``[R, N + 1]``."""
    return torch.cat([torch.zeros_like(values[:, :1]), values.cumsum(1)], 1)


def _xlogx(values: Tensor) -> Tensor:
    result: Tensor = torch.special.xlogy(values, values)
    return result
