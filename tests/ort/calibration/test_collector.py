"""Histograms of arrays, bin for bin those of onnxruntime and numpy."""

from __future__ import annotations

import contextlib
import io
import time
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import calibrate as incumbent
from onnxruntime.quantization.quant_utils import smooth_distribution as incumbent_smooth

from qwrap.ort import calibrate
from qwrap.ort.calibration.bins import BinCounter, even_edges
from qwrap.ort.calibration.divergence import least_divergence
from qwrap.ort.calibration.histogram import MOST_BINS

SETTINGS = [
    ("entropy", False, 128, 128, 99.0, "same"),
    ("percentile", True, 2048, 128, 99.9, "same"),
    ("percentile", False, 2048, 128, 99.0, "same"),
    ("distribution", False, 512, 128, 99.0, "same"),
]


SCALES = (1, 0.5, 1.7, 7, 3)


def arrays(scale: float) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(int(scale * 10))
    normal = [(scale * rng.normal(size=(5, 90))).astype(np.float32) for _ in range(3)]
    return {
        "normal": normal,
        "relu": [np.maximum(x, 0) for x in normal],
        "constant": [np.full((3, 4), scale > 1.5, np.float32)] * 2,
        "far": [1000 + np.abs(x) for x in normal],
        "borders": [(scale * np.arange(-8, 9) / 8).astype(np.float32)],
        "negative": [-3 - np.abs(x) for x in normal],
    }


@pytest.mark.ort(93, 98, 99)
@pytest.mark.parametrize("setting", SETTINGS)
def test_histograms_are_those_of_onnxruntime_to_the_bit(setting: Any) -> None:
    ours = calibrate.HistogramCollector(*setting)
    theirs = incumbent.HistogramCollector(*setting)
    for scale in SCALES:
        ours.collect(arrays(scale))
        with contextlib.redirect_stdout(io.StringIO()):
            theirs.collect(arrays(scale))
    for name, wanted in theirs.get_histogram_dict().items():
        found = ours.get_histogram_dict()[name]
        assert len(found) == len(wanted)
        np.testing.assert_array_equal(found[1], wanted[1])
        np.testing.assert_array_equal(found[0][1:-1], wanted[0][1:-1])
        if setting[0] != "percentile" or not setting[1]:
            assert (found[0][0], found[0][-1]) == (wanted[0][0], wanted[0][-1])
        else:  # onnxruntime loses magnitudes below the first border, or that round beyond the last
            assert found[0][0] >= wanted[0][0]
            assert found[0].sum() == sum(x.size for s in SCALES for x in arrays(s)[name])
        assert found[1].dtype == wanted[1].dtype
        assert found[2:4] == wanted[2:4]


@pytest.mark.ort(99)
@pytest.mark.parametrize("setting", SETTINGS[1:])
def test_results_have_the_form_of_onnxruntimes(setting: Any) -> None:
    ours = calibrate.HistogramCollector(*setting)
    ours.collect(arrays(1))
    result = ours.compute_collection_result()
    for name, found in result.items():
        if setting[0] == "distribution":
            assert isinstance(found, calibrate.TensorData)
        else:
            assert len(found) == 4
            assert found[2] is ours.histogram_dict[name][0]


@pytest.mark.ort(98)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_order_of_batches_does_not_change_the_total(setting: Any) -> None:
    totals = []
    for scales in ((1, 5), (5, 1)):
        collector = calibrate.HistogramCollector(*setting)
        for scale in scales:
            collector.collect(arrays(scale))
        totals.append({n: int(h[0].sum()) for n, h in collector.histogram_dict.items()})
    assert totals[0] == totals[1]
    assert totals[0]["normal"] == 2700


@pytest.mark.ort(98, 99)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_histogram_that_begins_with_next_to_nothing_stays_small(setting: Any) -> None:
    """onnxruntime makes as many bins of the first width as are needed, whatever memory takes."""
    collector = calibrate.HistogramCollector(*setting)
    values = np.linspace(-1, 1, 1001, dtype=np.float32)
    collector.collect({"x": [1e-7 * values]})
    collector.collect({"x": [values]})
    hist, edges = collector.histogram_dict["x"][:2]
    assert hist.sum() == 2002
    assert len(hist) <= MOST_BINS + 2
    assert edges[-1] >= 1
    assert collector.compute_collection_result()


@pytest.mark.ort(99)
def test_one_histogram_is_merged_as_in_onnxruntime() -> None:
    values, more = np.arange(-4, 5, dtype=np.float32), np.arange(-9, 3, dtype=np.float32)
    results = []
    for module in (calibrate, incumbent):
        collector = module.HistogramCollector(*SETTINGS[0])
        with contextlib.redirect_stdout(io.StringIO()):
            collector.collect({"x": values})
        ends = more.min(), more.max(), np.array(9, np.float32)
        results.append(collector.merge_histogram(collector.histogram_dict["x"], more, *ends))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.ort(99)
def test_what_is_no_float_array_is_refused() -> None:
    collector = calibrate.HistogramCollector(*SETTINGS[1])
    with pytest.raises(ValueError, match="Unexpected type <class 'int'> for tensor='x'"):
        collector.collect({"x": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="only float32 or float16 is supported"):
        collector.collect({"x": np.zeros(3)})
    with pytest.raises(ValueError, match="only one element type"):
        collector.collect({"x": [np.zeros(3, np.float32), np.zeros(3, np.float16)]})
    with pytest.raises(ValueError, match="Please run collect"):
        collector.compute_collection_result()
    with pytest.raises(ValueError, match="Only 'entropy', 'percentile' or 'distribution'"):
        calibrate.HistogramCollector("mse", False, 1, 1, 1, "same").collect({})


@pytest.mark.ort(99)
def test_float64_arrays_are_counted_for_entropy() -> None:
    collector = calibrate.HistogramCollector(*SETTINGS[0])
    collector.collect({"x": np.random.default_rng(0).normal(size=1000)})
    low, high = collector.compute_entropy()["x"][:2]
    assert low.dtype == np.float64
    assert low < -2 < 2 < high


@pytest.mark.ort(98)
@given(
    bins=st.integers(1, 3000),
    reach=st.floats(2**-10, 2**20, width=32),
    shift=st.floats(-4, 4, width=32),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_values_at_borders_are_counted_as_by_numpy(
    bins: int, reach: float, shift: float, seed: int
) -> None:
    """Borders, their neighbours in float32, and values between: the same bins."""
    first, last = np.float32(shift * reach - reach), np.float32(shift * reach + reach)
    edges = even_edges(first, last, bins, np.dtype(np.float32))
    inside = np.random.default_rng(seed).uniform(first, last, 500).astype(np.float32)
    beside = [np.nextafter(edges, np.float32(s * np.inf), dtype=np.float32) for s in (-1, 1)]
    values = np.clip(np.concatenate([edges, *beside, inside]), edges[0], edges[-1])
    counts = np.zeros(len(edges) - 1, np.int64)
    BinCounter(edges, counts).add(torch.from_numpy(values))
    np.testing.assert_array_equal(counts, np.histogram(values, edges)[0])


@pytest.mark.ort(98)
def test_bins_over_nearly_all_doubles_are_even_and_count_what_lies_in_them() -> None:
    most = float(np.finfo(np.float64).max)
    edges = even_edges(-most, most, 4, np.dtype(np.float64))
    expected = [-most, -most / 2, 0, most / 2, most]
    np.testing.assert_allclose(edges, expected, rtol=2**-51)  # linspace rounds twice
    counter = BinCounter(edges, np.zeros(4, np.int64))
    counter.add(torch.tensor([-most, -1.0, 0.0, 1.0, most], dtype=torch.float64))
    assert counter.counts.tolist() == [1, 1, 2, 1]


@pytest.mark.ort(98)
def test_zeros_of_either_sign_are_one_value() -> None:
    edges = even_edges(np.float32(-1), np.float32(1), 4, np.dtype(np.float32))
    counts = np.zeros(4, np.int64)
    BinCounter(edges, counts).add(torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -2.0]))
    assert counts.tolist() == [2, 0, 2, 2]  # what lies beyond counts at the ends


@pytest.mark.ort(94, "G59")
@pytest.mark.parametrize(("bins", "levels"), [(2048, 128), (301, 31), (200, 128), (64, 64)])
@pytest.mark.parametrize("kind", ["normal", "relu", "outlier", "sparse"])
def test_the_search_is_that_of_the_formula(bins: int, levels: int, kind: str) -> None:
    """Against the search written out threshold by threshold."""
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.normal(size=4000),
        "relu": np.maximum(rng.standard_t(3, size=4000), 0),
        "outlier": np.append(rng.normal(size=500), 30),
        "sparse": rng.laplace(size=50),
    }[kind]
    reach = np.abs(values).max()
    hist = np.histogram(values, bins, range=(-reach, reach))[0]
    found = int(least_divergence(torch.from_numpy(hist)[None], levels)[0])
    divergences = [divergence(hist, side, levels) for side in candidates(bins, levels)]
    wanted = candidates(bins, levels)[int(np.argmin(divergences))]
    # Smoothing, which the formula leaves out, moves a divergence by less than 1e-3 of it.
    assert found == wanted or np.isclose(
        divergence(hist, found, levels), min(divergences), rtol=1e-3, atol=1e-6
    )


def candidates(bins: int, levels: int) -> range:
    return range(-(-(levels - bins % 2) // 2), bins // 2 + 1)


def divergence(hist: np.ndarray, side: int, levels: int) -> float:
    """The divergence of one threshold, smoothed, as MXNet computes it."""
    start, end = len(hist) // 2 - side, len(hist) - len(hist) // 2 + side
    inside = hist[start:end].astype(float)
    p = inside.copy()
    p[0] += hist[:start].sum()
    p[-1] += hist[end:].sum()
    size = len(inside) // levels
    q = np.zeros_like(p)
    for group in range(levels):
        stop = len(p) if group == levels - 1 else (group + 1) * size
        piece = slice(group * size, stop)
        if (p[piece] > 0).any():
            q[piece] = inside[piece].sum() / (p[piece] > 0).sum()
    q[p == 0] = 0
    smooth_p, smooth_q = calibrate.smooth_distribution(p), calibrate.smooth_distribution(q)
    if smooth_p is None or smooth_q is None:
        return np.inf
    return float(scipy.stats.entropy(smooth_p, smooth_q))


@pytest.mark.ort("G59")
def test_the_search_takes_milliseconds_a_tensor() -> None:
    """onnxruntime's takes about a second at 2048 bins."""
    rng = np.random.default_rng(0)
    counts = np.stack([np.histogram(rng.normal(size=3000), 2048)[0] for _ in range(32)])
    times = []
    for _ in range(3):
        start = time.perf_counter()
        least_divergence(torch.from_numpy(counts), 128)
        times.append(time.perf_counter() - start)
    assert min(times) / 32 < 0.02  # 0.5 ms where nothing else runs


@pytest.mark.ort(99)
def test_one_threshold_is_that_of_all() -> None:
    collector = calibrate.HistogramCollector("entropy", False, 512, 128, 99, "same")
    collector.collect(arrays(1))
    for name, found in collector.compute_entropy().items():
        alone = collector.get_entropy_threshold(collector.histogram_dict[name], 128)
        assert alone == found[:2]
    collector.num_quantized_bins = 1
    with pytest.raises(ValueError, match="num_quantized_bins=1: a range has 2 at least"):
        collector.compute_entropy()


@pytest.mark.ort(102)
def test_divergence_is_that_of_scipy_and_onnxruntime() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.random((5, 3)).astype(np.float32), rng.random((5, 3)).astype(np.float32)
    theirs = [incumbent.entropy(p, q), incumbent.entropy(p, q, base=2, axis=1)]
    ours = [calibrate.entropy(p, q), calibrate.entropy(p, q, base=2, axis=1)]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
        assert a.dtype == b.dtype == np.float32
    np.testing.assert_allclose(ours[0], scipy.stats.entropy(p, q), rtol=1e-5)
    p[0, 0] = q[1, 1] = 0  # onnxruntime takes 0 log 0 for infinite
    np.testing.assert_allclose(calibrate.rel_entr(p, q), scipy.special.rel_entr(p, q), rtol=1e-5)
    np.testing.assert_allclose(calibrate.entropy(p, q), scipy.stats.entropy(p, q), rtol=1e-5)
    with pytest.raises(ValueError, match="must be a positive number"):
        calibrate.entropy(p, q, base=0)
    with pytest.raises(ValueError, match="qk is None"):
        calibrate.entropy(p, None)  # type: ignore[arg-type]


@pytest.mark.ort(102)
def test_smoothing_is_that_of_onnxruntime() -> None:
    counts = np.array([0, 3, 0, 7, 1])
    np.testing.assert_allclose(
        calibrate.smooth_distribution(counts), incumbent_smooth(counts), rtol=1e-6
    )
    assert calibrate.smooth_distribution(np.zeros(3)) is None
    with pytest.raises(ValueError, match="1 of 4 bins hold values"):
        calibrate.smooth_distribution(np.array([0, 0, 0, 1]), eps=0.5)


@pytest.mark.ort(103)
@pytest.mark.parametrize("method", ["entropy", "percentile", "distribution"])
def test_histograms_are_plotted_if_asked(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plt = pytest.importorskip("matplotlib.pyplot", reason="plots need matplotlib")
    shown: list[str] = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gca().get_title()))
    collector = calibrate.HistogramCollector(method, False, 512, 128, 99, "same")
    collector.collect({"x": [np.arange(9, dtype=np.float32)]})
    collector.compute_collection_result()
    assert not shown
    monkeypatch.setenv("QUANTIZATION_DEBUG", "1")
    collector.compute_collection_result()
    assert shown == ["Tensor value V.S. Counts"]
    plt.close("all")
