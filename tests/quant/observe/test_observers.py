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
from qwrap.errors import ConfigError, NotCalibratedError
from qwrap.quant.observe.histogram import DyadicHistogram
from qwrap.quant.observe.observers import HistogramObserver, MinMaxObserver, Observer
from qwrap.quant.observe.sampling import sample_stride
from qwrap.quant.ranges import choose_ranges

KINDS = [MinMaxObserver, HistogramObserver]
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
        choose_ranges([observer], [QuantSpec()], ["minmax"], [100])


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
