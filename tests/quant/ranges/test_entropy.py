"""Entropy ranges against a plain loop over every threshold, group and bin."""

import numpy as np
import pytest
import torch
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.quant.ranges.entropy import entropy_range
from qwrap.quant.ranges.rows import HistogramRows

ASYMMETRIC = QuantSpec(dtype="uint8", symmetric=False)
SYMMETRIC = QuantSpec(dtype="int8")


def rows_of(values: np.ndarray, bins: int) -> HistogramRows:
    """The histogram of each row of ``values``, zeros apart, over [-8, 8)."""
    width = 8 / bins
    counts = np.stack([
        np.bincount(np.floor(row / width).astype(int) + bins, minlength=2 * bins + 1)
        for row in values
    ])
    counts[:, -1] = (values == 0).sum(1)
    ends = torch.from_numpy(values.min(1)), torch.from_numpy(values.max(1))
    exponent = torch.full((len(values),), 3, dtype=torch.int32)
    return HistogramRows.of(torch.from_numpy(counts), exponent, *ends)


def entropy(rows: HistogramRows, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    ((_, side),) = rows.by_side()
    return entropy_range(side, spec)


def divergence(within: np.ndarray, left: float, right: float, levels: int) -> float:
    """KL(P || Q) of one threshold, bin by bin."""
    reference = within.astype(float)
    reference[0] += left
    reference[-1] += right
    size = len(within)
    spread = np.zeros(size)
    for group in range(levels):
        start, stop = group * size // levels, (group + 1) * size // levels
        filled = [k for k in range(start, stop) if reference[k] > 0]
        for k in filled:
            spread[k] = max(within[start:stop].sum() / len(filled), 1e-4 * (not within[k]))
    if not within.any():
        return np.inf
    p, q = reference / reference.sum(), spread / within.sum()
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


def brute_force(counts: np.ndarray, levels: int, *, two_sided: bool, widest: int) -> int | None:
    """The threshold in bins, None where there is none."""
    middle = len(counts) // 2 if two_sided else 0
    best, least = None, np.inf
    for reach in range(-(-levels // (1 + two_sided)), widest + 1):
        start, stop = middle - reach * two_sided, middle + reach
        tails = counts[:start].sum(), counts[stop:].sum()
        found = divergence(counts[start:stop], *tails, levels)
        if found < least:
            best, least = reach, found
    return best


def samples(kind: str, rows: int, size: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    drawn = {
        "normal": lambda: random.normal(0, 1.2, (rows, size)),
        "laplace": lambda: random.laplace(0, 0.6, (rows, size)),
        "relu": lambda: np.maximum(random.normal(0, 1.5, (rows, size)), 0),
        "negative": lambda: -np.abs(random.normal(0, 1.5, (rows, size))),
        "sparse": lambda: random.choice([-7.0, -0.1, 0.1, 0.3, 5.0], (rows, size)),
    }[kind]()
    return drawn.clip(-7.99, 7.99).astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "laplace", "relu", "negative", "sparse"])
@pytest.mark.parametrize("dtype", ["uint4", "int4", "uint2", "int5"])
def test_the_threshold_is_that_of_brute_force(kind: str, dtype: str) -> None:
    spec = QuantSpec(dtype=dtype, symmetric=dtype.startswith("i"))
    values = samples(kind, 11, 400, seed=3)
    rows = rows_of(values, 64)
    one_sided = kind in ("relu", "negative")
    codes = 2**spec.dtype.bits
    levels = codes // 2 if one_sided and spec.symmetric else codes
    for row, low, high in zip(range(11), *entropy(rows, spec), strict=True):
        counts = rows.counts[row].numpy()
        if one_sided:
            counts = counts[:64][::-1] if kind == "negative" else counts[64:]
        largest = np.abs(values[row]).max()
        best = brute_force(counts, levels, two_sided=not one_sided, widest=int(largest * 8) + 1)
        reach = best / 8
        assert low.item() == max(-reach, values[row].min())
        assert high.item() == min(reach, values[row].max())


@pytest.mark.parametrize("kind", ["normal", "relu"])
@pytest.mark.parametrize("spec", [ASYMMETRIC, SYMMETRIC], ids=["asymmetric", "symmetric"])
def test_eight_bits_match_brute_force_at_many_bins(kind: str, spec: QuantSpec) -> None:
    values = samples(kind, 1, 20_000, seed=5)
    rows = rows_of(values, 256)
    two_sided = kind == "normal"
    levels = 256 if two_sided or not spec.symmetric else 128
    counts = rows.counts[0].numpy() if two_sided else rows.counts[0, 256:].numpy()
    largest = np.abs(values).max()
    best = brute_force(counts, levels, two_sided=two_sided, widest=int(largest * 32) + 1)
    _, high = entropy(rows, spec)
    assert high.item() == (largest if best is None else min(best / 32, values.max()))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint12"])
def test_more_codes_than_bins_keep_the_extremes(dtype: str) -> None:
    spec = QuantSpec(dtype=dtype, symmetric=dtype.startswith("i"))
    values = samples("laplace", 2, 5000, seed=9)
    low, high = entropy(rows_of(values, 512), spec)
    assert low.tolist() == values.min(1).tolist()
    assert high.tolist() == values.max(1).tolist()


def test_zeros_alone_have_the_range_zero() -> None:
    low, high = entropy(rows_of(np.zeros((1, 5), dtype=np.float32), 64), SYMMETRIC)
    assert (low.item(), high.item()) == (0, 0)


@pytest.mark.parametrize("spec", [ASYMMETRIC, SYMMETRIC], ids=["asymmetric", "symmetric"])
def test_it_cuts_the_tails_that_minmax_keeps(spec: QuantSpec) -> None:
    values = samples("laplace", 1, 200_000, seed=11)
    low, high = entropy(rows_of(values, 2048), spec)
    assert -low.item() == high.item() < 0.9 * np.abs(values).max()
