"""Ranges from the mean and the standard deviation alone."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.dtypes import QuantType
from qwrap.quant.ranges.rows import HistogramRows


def distribution_range(rows: HistogramRows, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the range that suits a normal distribution of the values' mean and deviation.

    Integers span the mean and as many deviations on each side as have the least squared error for
    normal values, within what was seen. Floats and code books get the scale at which the deviation
    of their numbers, each as likely as the next, is that of the values; the range may then go
    beyond what was seen. Functions of the user are taken for integers, one for each step.

    Args:
        rows: what was seen.
        spec: gives the type.

    Source: Banner et al., arXiv:1810.05723, section 3, for integers; onnxruntime's
    ``compute_scale_zp_float8`` for floats.
    """
    mean, deviation = moments(rows)
    if spec.dtype.levels is None:
        codes = max(2, int(spec.qmax - spec.qmin) + 1)  # of a function: one for each step
        reach = normal_clip(codes) * deviation
        return rows.within(mean - reach, mean + reach)
    scale = deviation / deviation_of(spec.dtype)
    return scale * spec.qmin, scale * spec.qmax


def moments(rows: HistogramRows) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each row, exact zeros included, ``[R]`` each.

    Of values evenly spread within each bin: a bin adds its width's square over 12.
    """
    left, right = rows.edges[:, :-1], rows.edges[:, 1:]
    total = rows.total.clamp(min=1)
    mean = (rows.counts * (left + right)).sum(1) / (2 * total)
    left, right = left - mean[:, None], right - mean[:, None]
    squares = (rows.counts * (left * left + left * right + right * right)).sum(1) / 3
    return mean, ((squares + rows.zeros * mean**2) / total).sqrt()


def deviation_of(dtype: QuantType) -> float:
    """Return the standard deviation of the numbers of a float type or code book.

    As in onnxruntime, a float's two zeros count twice, where it has two.
    """
    numbers = torch.tensor(dtype.levels, dtype=torch.float64)
    if not dtype.codebook and not dtype.name.endswith("uz"):
        numbers = torch.cat([numbers, torch.zeros(1, dtype=torch.float64)])
    return numbers.std(correction=0).item()


@functools.lru_cache(maxsize=64)
def normal_clip(codes: int) -> float:
    """Return the end, in deviations, of the best range for normal values.

    That which has the least squared error of ``codes`` numbers, evenly spaced from end to end.

    Source: the minimum of the exact error; Banner et al. approximate it.
    """
    ends = 0.5, 12.0
    while ends[1] - ends[0] > 1e-6:  # the error has one minimum: keep the thirds around it
        left, right = (ends[0] + (ends[1] - ends[0]) * part for part in (1 / 3, 2 / 3))
        ends = (
            (ends[0], right)
            if _normal_error(left, codes) < _normal_error(right, codes)
            else (left, ends[1])
        )
    return sum(ends) / 2


def _normal_error(end: float, codes: int) -> float:
    """Return the squared error of a standard normal variable."""
    numbers = torch.linspace(-end, end, codes, dtype=torch.float64)
    middles = (numbers[:-1] + numbers[1:]) / 2
    density = (-(middles**2) / 2).exp() / math.sqrt(2 * math.pi)
    below = torch.special.ndtr(middles)
    # Sums over cells by parts, from the integrals of 1 and t up to the middles: the first is
    # `below`, the second minus `density`. All values and their squares add up to 0 and 1.
    jumps = numbers.diff()
    return float(1 + end**2 - 2 * (jumps * (density + middles * below)).sum())
