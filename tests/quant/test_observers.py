"""Observers, their histogram and the range search against exact counts and brute force."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.dtypes import INT8, INT16, UINT8, UINT16, QuantType
from qwrap.errors import ConfigError, InputError, NotCalibratedError
from qwrap.numerics import choose_qparams, fake_quantize, squared_error_integral
from qwrap.quant.histogram import DyadicHistogram
from qwrap.quant.observers import HistogramObserver, MinMaxObserver, Observer
from qwrap.quant.ranges import choose_ranges, choose_weight_range
from qwrap.quant.sampling import sample_stride

KINDS = [MinMaxObserver, HistogramObserver]
ACTIVATION = QuantSpec(dtype=UINT8, symmetric=False)
WEIGHT = QuantSpec(axis=0, narrow_range=True)
# No smaller ones: their product with a bin's inverse width could underflow.
magnitudes = st.floats(2.0**-60, 2.0**40, width=32)
numbers = st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda v: -v))
values = arrays(np.float32, array_shapes(max_dims=3), elements=numbers)


def observed(*batches: Tensor, kind: type[Observer] = HistogramObserver) -> Observer:
    observer = kind("x")
    for batch in batches:
        observer.observe(batch)
    return observer


def observed_whole(x: Tensor) -> Observer:
    return observed(x[:, None])  # rows of one value, which are not sampled


def contents(observer: Observer) -> dict[str, object]:
    """Everything the observer keeps that does not depend on how values came in batches."""
    state = observer.get_extra_state()
    del state["batches"], state["averages"]
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in state.items()}


def ranges(observer: Observer, spec: QuantSpec = ACTIVATION, **how: object) -> tuple[float, float]:
    low, high = choose_ranges([observer], [spec], **how)
    return low.item(), high.item()


def error(x: Tensor, ends: tuple[float, float], spec: QuantSpec) -> float:
    qparams = choose_qparams(torch.tensor(ends[0]), torch.tensor(ends[1]), spec)
    fake = fake_quantize(x, qparams.scale, qparams.zero_point, spec)
    return (fake.double() - x.double()).square().sum().item()


# Observers


@given(st.lists(values, min_size=1, max_size=4), st.sampled_from(KINDS))
@settings(deadline=None)
def test_low_and_high_are_the_exact_extremes(
    batches: list[np.ndarray], kind: type[Observer]
) -> None:
    observer = observed(*map(torch.from_numpy, batches), kind=kind)
    everything = np.concatenate([b.ravel() for b in batches])
    assert (observer.low, observer.high) == (everything.min(), everything.max())
    assert observer.count == everything.size


@given(st.lists(values, min_size=1, max_size=4), st.sampled_from(KINDS), st.randoms())
@settings(deadline=None)
def test_order_and_batch_size_do_not_matter(
    batches: list[np.ndarray], kind: type[Observer], random: object
) -> None:
    flat = [torch.from_numpy(b).flatten() for b in batches]  # so that a sample is one value
    pieces = [piece for batch in flat for piece in batch.split(3)]
    random.shuffle(pieces)
    assert contents(observed(*pieces, kind=kind)) == contents(observed(torch.cat(flat), kind=kind))


def test_zeros_seen_first_do_not_coarsen_the_histogram() -> None:
    observer = observed(torch.zeros(3), torch.tensor([0.25]), kind=HistogramObserver)
    assert observer.histogram.exponent == -1  # [-0.5, 0.5), as without the zeros


@given(values, values, st.sampled_from(KINDS))
@settings(deadline=None)
def test_merging_equals_one_pass(a: np.ndarray, b: np.ndarray, kind: type[Observer]) -> None:
    first, second = torch.from_numpy(a), torch.from_numpy(b)
    merged = observed(first, kind=kind)
    merged.merge(observed(second, kind=kind))
    merged.merge(kind("empty"))
    assert contents(merged) == contents(observed(first, second, kind=kind))


@given(values)
@settings(deadline=None)
def test_histogram_counts_are_those_of_exact_arithmetic(x: np.ndarray) -> None:
    histogram = observed(torch.from_numpy(x)).histogram
    width = 2.0 ** (int(histogram.exponent) - 11)
    index = np.floor(x.ravel().astype(np.float64) / width).astype(int) + 2048
    np.testing.assert_array_equal(histogram.counts[0, :-1], np.bincount(index, minlength=4096))
    assert histogram.counts[0, -1] == (x == 0).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_mask_values_nan_and_infinity_are_counted_and_left_out(kind: type[Observer]) -> None:
    least = torch.finfo(torch.float32).min
    x = torch.tensor([[1.0, -2.0, least], [math.nan, math.inf, 1e30]])
    observer = observed(x, torch.full((2, 2), least), kind=kind)
    assert (observer.low, observer.high) == (-2.0, 1.0)
    assert (observer.count, observer.masked, observer.nonfinite) == (2, 6, 2)
    clean = contents(observed(x[0, :2], kind=kind))
    assert contents(observer) == clean | {"seen": 10, "left_out": [6, 2]}


@pytest.mark.parametrize("kind", KINDS)
def test_empty_tensors_leave_no_trace_and_no_data_is_an_error(kind: type[Observer]) -> None:
    observer = observed(torch.empty(0, 3), torch.tensor(math.nan), kind=kind)
    assert observer.count == 0
    with pytest.raises(NotCalibratedError, match=r"'x' saw no usable value \(1 not finite, 0 of"):
        _ = observer.low
    with pytest.raises(NotCalibratedError, match="'x' saw no usable value"):
        choose_ranges([observer], [ACTIVATION], "minmax")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("kind", KINDS)
def test_other_types_are_seen_as_their_float32_values(
    kind: type[Observer], dtype: torch.dtype
) -> None:
    x = torch.tensor([[-3.0, 0.0], [0.5, 40.0]]).to(dtype)
    expected = observed(x.to(torch.float32).clone(), kind=kind)
    assert contents(observed(x.T, kind=kind)) == contents(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_saving_loading_and_copying(kind: type[Observer]) -> None:
    torch.manual_seed(0)
    observer = observed(torch.randn(40_000), kind=kind)
    file = io.BytesIO()
    torch.save(observer.state_dict(), file)
    file.seek(0)
    loaded = kind("x")
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (loaded, copy.deepcopy(observer).to(torch.float16)):
        before = contents(observer)
        assert contents(twin) == before
        twin.observe(torch.full((5,), 100.0))
        assert contents(observer) == before
    assert not list(observer.buffers())


def test_a_large_tensor_is_sampled_evenly_over_every_axis() -> None:
    x = torch.arange(24).to(torch.float32).expand(4, 1600, 24)  # 153600 values in 24 channels
    counts = observed(x).histogram.counts[0]
    assert counts[:-1].sum() == pytest.approx(x.numel(), rel=0.01)
    counts = counts[:-1].reshape(-1, 64).sum(1)[32:56]  # one bin per integer
    torch.testing.assert_close(counts, torch.full_like(counts, 6400), rtol=0.02, atol=0)


@given(st.integers(1, 10**8))
def test_the_sampling_stride_has_no_divisor_in_common_with_the_size(size: int) -> None:
    stride = sample_stride(size)
    assert math.gcd(stride, size) == 1 or size == 1
    assert stride == 1 or size > 255
    assert stride < 128


def test_different_statistics_are_not_merged() -> None:
    with pytest.raises(ConfigError, match="cannot merge HistogramObserver into MinMaxObserver"):
        MinMaxObserver().merge(HistogramObserver())
    with pytest.raises(ConfigError, match="histograms of 2048 and 1024 bins"):
        HistogramObserver().merge(HistogramObserver(bins=1024))
    with pytest.raises(ConfigError, match="power of two; got 1000"):
        DyadicHistogram(1000)


# Ranges of activations


@given(values, st.sampled_from([UINT8, INT8, UINT16]), st.booleans())
@settings(deadline=None)
def test_every_method_stays_within_what_was_seen(
    x: np.ndarray, dtype: QuantType, symmetric: bool
) -> None:
    observer = observed(torch.from_numpy(x))
    spec = QuantSpec(dtype=dtype, symmetric=symmetric)
    for method in ("minmax", "percentile", "mse"):
        low, high = ranges(observer, spec, method=method)
        assert min(observer.low.item(), 0) <= low <= high <= max(observer.high.item(), 0)


def test_percentile_100_and_minmax_are_the_extremes() -> None:
    torch.manual_seed(0)
    x = torch.randn(200_000)
    expected = (x.min().item(), x.max().item())
    assert ranges(observed(x), method="percentile", percentile=100) == expected
    assert ranges(observed(x, kind=MinMaxObserver), method="minmax") == expected


def test_percentile_cuts_planted_outliers_by_rank() -> None:
    x = torch.cat([torch.linspace(-1, 1, 10_000), torch.full((10,), 100.0)])
    cut = ranges(observed_whole(x), method="percentile", percentile=100 - 0.4)  # 20 on each side
    # The bins are 128 / 2048 wide, and the 20th value from below lies 0.004 above -1.
    assert cut == pytest.approx((-1, 1), abs=128 / 2048)
    kept = ranges(observed_whole(x), method="percentile", percentile=100 - 0.1)  # 5 on each side
    assert kept == (pytest.approx(-1, abs=128 / 2048), 100.0)


@pytest.mark.parametrize("percentile", [90, 99, 99.9])
def test_percentiles_are_numpys_within_a_bin(percentile: float) -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=30_000).astype(np.float32))
    observer = observed_whole(x)
    tail = (100 - percentile) / 2
    expected = np.percentile(x.numpy(), [tail, 100 - tail])
    width = 2.0 ** (int(observer.histogram.exponent) - 11)
    # One bin, and one gap between neighbouring values, which is wide in the tail of the last case.
    slack = width + 0.02 * (percentile > 99)
    low, high = ranges(observer, method="percentile", percentile=percentile)
    np.testing.assert_allclose([low, high], expected, rtol=0, atol=slack)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("normal", ACTIVATION),
        ("relu", ACTIVATION),
        ("normal", QuantSpec(dtype=INT8)),
        ("outliers", ACTIVATION),
        ("outliers", QuantSpec(dtype=INT8)),
        ("skewed", ACTIVATION),
        ("uniform", ACTIVATION),
        ("normal", QuantSpec(dtype=INT16)),
    ],
)
def test_mse_range_is_near_brute_force_and_never_worse_than_minmax(
    name: str, spec: QuantSpec
) -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=30_000)
    x = {
        "normal": x,
        "relu": np.maximum(x, 0),
        "outliers": np.append(x, [40, -25, 38]),
        "skewed": np.exp(x) - 0.2,
        "uniform": random.uniform(-0.1, 1, 30_000),
    }[name].astype(np.float32)
    data = torch.from_numpy(x)
    low, high = data.min().item(), data.max().item()
    grid = np.linspace(0.02, 1, 50)
    ends = [(low * a, high * b) for a in grid for b in (grid if not spec.symmetric else [a])]
    ends = ends[:: 1 if len(ends) < 100 else 3]
    brute = min(error(data, e, spec) for e in ends)
    found = error(data, ranges(observed_whole(data), spec), spec)
    # Bins are not single values and the ratios tried are some percent apart.
    assert found <= 1.03 * brute
    assert found <= 1.002 * error(data, (low, high), spec)


def test_mse_of_zeros_and_a_lone_value_is_that_value() -> None:
    low, high = ranges(observed(torch.zeros(10), torch.tensor([3.0])))
    assert (low, high) == (0.0, pytest.approx(3.0, rel=0.01))
    assert ranges(observed(torch.zeros(10))) == (0.0, 0.0)


def test_many_tensors_at_once_get_the_ranges_they_get_alone() -> None:
    torch.manual_seed(0)
    data = [torch.randn(500) * 3.0**i - (i % 3) for i in range(-20, 20)]
    observers = [observed(x.relu() if i % 4 else x) for i, x in enumerate(data)]
    specs = [ACTIVATION if i % 5 else QuantSpec(dtype=INT8) for i in range(40)]
    for method in ("percentile", "mse"):
        low, high = choose_ranges(observers, specs, method)
        alone = [ranges(o, s, method=method) for o, s in zip(observers, specs, strict=True)]
        # A sum over fewer columns may round differently and so take a neighbouring ratio.
        torch.testing.assert_close(low.tolist(), [a for a, _ in alone], rtol=0.1, atol=0)
        torch.testing.assert_close(high.tolist(), [b for _, b in alone], rtol=0.1, atol=0)


def test_squared_error_integral_is_that_of_a_fine_sum() -> None:
    spec = QuantSpec(dtype=UINT8, symmetric=False)
    qparams = choose_qparams(torch.tensor(-1.0), torch.tensor(2.0), spec)
    t = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 1e5  # up to 4: half is clipped
    for sign in (1, -1):
        x = (sign * t).to(torch.float32)
        fake = fake_quantize(x, qparams.scale, qparams.zero_point, spec)
        expected = sign * ((x.double() - fake.double()).square().sum() / 1e5)
        ours = squared_error_integral(
            torch.tensor([sign * 4.0], dtype=torch.float64),
            qparams.scale,
            qparams.zero_point,
            spec,
        )
        assert ours.item() == pytest.approx(expected.item(), rel=1e-5)  # x is rounded to float32


def test_wrong_methods_are_refused() -> None:
    observer = observed(torch.ones(3))
    with pytest.raises(ConfigError, match="no range method 'kl'; choose one of mse, percentile"):
        choose_ranges([observer], [ACTIVATION], "kl")
    with pytest.raises(ConfigError, match="percentile=101 must lie above 50"):
        choose_ranges([observer], [ACTIVATION], "percentile", 101)
    with pytest.raises(ConfigError, match="'x': method 'mse' needs a HistogramObserver"):
        choose_ranges([observed(torch.ones(3), kind=MinMaxObserver)], [ACTIVATION])


# Ranges of weights


@given(values.filter(lambda x: x.ndim > 1), st.integers(0, 1), st.sampled_from([INT8, UINT8]))
@settings(deadline=None)
def test_mse_weight_range_is_never_worse_than_minmax(
    x: np.ndarray, axis: int, dtype: QuantType
) -> None:
    weight = torch.from_numpy(x)
    spec = QuantSpec(dtype=dtype, axis=axis, narrow_range=dtype is INT8)
    cost = {}
    for method in ("mse", "minmax"):
        qparams = choose_qparams(*choose_weight_range(weight, spec, method), spec)
        fake = fake_quantize(weight, qparams.scale, qparams.zero_point, spec)
        cost[method] = (fake.double() - weight.double()).square().movedim(axis, 0).flatten(1).sum(1)
    # The search adds squares of float32 differences, which are off by 2^-24 each.
    assert (cost["mse"] <= cost["minmax"] * (1 + 1e-6)).all()


def test_mse_weight_range_is_that_of_brute_force_channel_by_channel() -> None:
    weight = torch.from_numpy(np.random.default_rng(2).normal(size=(6, 50, 3)).astype(np.float32))
    weight[3] *= 1000
    low, high = choose_weight_range(weight, WEIGHT)
    for channel, ends in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        data, spec = weight[channel], QuantSpec(narrow_range=True)
        tried = [
            error(data, (data.min().item() * r, data.max().item() * r), spec)
            for r in np.linspace(0.3, 1, 71)
        ]
        # Both grids are a percent or more apart, where the error is rough at this few values.
        assert error(data, ends, spec) <= 1.05 * min(tried)


def test_a_weight_without_axis_has_one_range_and_zero_channels_that_of_the_rest() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.0, 0.0]])
    low, high = choose_weight_range(weight, QuantSpec(), "minmax")
    assert (low.tolist(), high.tolist()) == ([-2.0], [1.0])
    low, high = choose_weight_range(weight, WEIGHT, "minmax")
    assert (low.tolist(), high.tolist()) == ([-2.0, -2.0], [1.0, 1.0])


def test_a_weight_with_nan_is_refused() -> None:
    with pytest.raises(InputError, match="must be finite"):
        choose_weight_range(torch.tensor([[math.nan, 1.0]]), WEIGHT)
    with pytest.raises(ConfigError, match="no range method 'percentile'"):
        choose_weight_range(torch.ones(2, 2), WEIGHT, "percentile")
