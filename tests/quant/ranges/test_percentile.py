"""Percentile ranges against ranks of the values themselves, and onnxruntime's."""

import numpy as np
import pytest
import torch
from onnxruntime.quantization.calibrate import HistogramCollector

from qwrap.config import QuantSpec
from qwrap.quant.observe.observers import HistogramObserver
from qwrap.quant.ranges import choose_ranges

ASYMMETRIC = QuantSpec(dtype="uint8", symmetric=False)
SYMMETRIC = QuantSpec(dtype="int8")


def observed(x: np.ndarray) -> HistogramObserver:
    observer = HistogramObserver("x")
    for piece in torch.from_numpy(x.astype(np.float32)).split(8192):  # no more, to be seen whole
        observer.observe(piece)
    return observer


def kept(x: np.ndarray, percentile: float, spec: QuantSpec = ASYMMETRIC) -> tuple[float, float]:
    (ends,) = choose_ranges([observed(x)], [spec], ["percentile"], [percentile])
    return ends[0].item(), ends[1].item()


@pytest.mark.parametrize("spec", [ASYMMETRIC, SYMMETRIC], ids=["asymmetric", "symmetric"])
def test_percentile_100_keeps_the_exact_extremes(spec: QuantSpec) -> None:
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    assert kept(x, 100, spec) == (x.min(), x.max())


def test_planted_outliers_are_cut_by_rank() -> None:
    x = np.append(np.linspace(-1, 1, 10_000), np.full(10, 100.0))
    # The bins are 128 / 2048 wide, and the 20th value from below lies 0.004 above -1.
    assert kept(x, 100 - 0.4) == pytest.approx((-1, 1), abs=128 / 2048)  # 20 on each side
    assert kept(x, 100 - 0.1) == (pytest.approx(-1, abs=128 / 2048), 100.0)  # 5 on each side


def test_a_symmetric_type_loses_the_largest_magnitudes_alone() -> None:
    x = np.concatenate([np.linspace(-1, 1, 10_000), np.full(30, -100.0)])
    spared = kept(x, 100 - 0.2, SYMMETRIC)  # 20 of the 30 are cut, and none on the other side
    assert spared == (pytest.approx(-100, abs=128 / 2048), 1.0)
    assert kept(x, 100 - 0.4, SYMMETRIC) == pytest.approx((-1, 1), abs=128 / 2048)  # 40


@pytest.mark.parametrize("percentile", [90, 99, 99.9])
def test_percentiles_are_numpys_within_a_bin(percentile: float) -> None:
    x = np.random.default_rng(0).normal(size=30_000)
    tail = (100 - percentile) / 2
    # One bin of 8 / 2048, and one gap between values, which is wide in the tail of the last case.
    slack = 0.004 + 0.02 * (percentile > 99)
    expected = np.percentile(x, [tail, 100 - tail])
    np.testing.assert_allclose(kept(x, percentile), expected, rtol=0, atol=slack)
    largest = np.percentile(np.abs(x), percentile)
    symmetric = kept(x, percentile, SYMMETRIC)
    np.testing.assert_allclose(symmetric, [-largest, largest], rtol=0, atol=slack)


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_exact_zeros_lie_at_zero_whatever_the_width_of_their_bin(share: float) -> None:
    x = np.random.default_rng(1).uniform(size=10_000)
    x[: int(share * x.size)] = 0
    x = np.append(x, 1000.0)  # bins of a half: the zeros share theirs with half of the others
    low, high = kept(x, 61)  # nearly a fifth off each side
    assert low == 0
    assert high == pytest.approx((0.805 - share) / (1 - share), abs=0.01)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("percentile", [99, 99.99])
def test_it_is_onnxruntimes_percentile_within_a_bin(symmetric: bool, percentile: float) -> None:
    x = np.random.default_rng(2).standard_t(4, size=50_000).astype(np.float32)
    collector = HistogramCollector("percentile", symmetric, 4096, 128, percentile, "same")
    collector.collect({"x": x})
    theirs = [float(end) for end in collector.compute_collection_result()["x"][:2]]
    ours = kept(x, percentile, SYMMETRIC if symmetric else ASYMMETRIC)
    width = 2 * np.abs(x).max() / 4096
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2 * width)
