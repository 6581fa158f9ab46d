"""Statistics per channel, on any device, however samples are put into batches."""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwrap.errors import ConfigError, InputError
from qwrap.quant.observe import histogram, observers
from qwrap.quant.observe.histogram import CHANNEL_BINS
from qwrap.quant.observe.observers import HistogramObserver, MinMaxObserver, Observer

KINDS = [MinMaxObserver, HistogramObserver]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Of one sample; the last two are long enough to be sampled, with and without rest.
SHAPES = [(), (5,), (3, 4), (2, 0), (3, 10, 11), (4, 256)]
# Ends of the scale, both zeros, and what is left out in some type or in all.
ODD = [0.0, -0.0, 1e-45, -1e-45, 1.0, -2.0, 6e4, -65504.0, 9e29, -9e29, 1e30, -3.4e38]
ODD += [float("nan"), float("inf"), float("-inf")]


def observed(
    batches: Iterable[Tensor], kind: type[Observer] = HistogramObserver, axis: int | None = None
) -> Observer:
    observer = kind("x", axis)
    for batch in batches:
        observer.observe(batch)
    return observer


def state(observer: Observer, *left_aside: str) -> dict[str, Any]:
    """What was seen, in a form that does not tell absent counts from 0."""
    found = {k: v for k, v in observer.get_extra_state().items() if k not in left_aside}
    found = {k: v.cpu().numpy().tobytes() if isinstance(v, Tensor) else v for k, v in found.items()}
    return found | {"left_out": (observer.masked, observer.nonfinite)}


@st.composite
def sample_sets(draw: st.DrawFn, shapes: Iterable[tuple[int, ...]] = SHAPES) -> Tensor:
    """Some samples along axis 0, of very different magnitudes, with odd values among them."""
    shape = draw(st.sampled_from(list(shapes)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 9))
    x = rng.normal(size=(count, *shape)) * 2.0 ** rng.integers(
        -70, 90, (count,) + (1,) * len(shape)
    )
    flat = x.reshape(-1)
    for value in draw(st.lists(st.sampled_from(ODD), max_size=4)) if flat.size else []:
        flat[rng.integers(flat.size)] = value
    return torch.from_numpy(x).to(torch.float32).to(draw(st.sampled_from(DTYPES)))


@given(sample_sets(), st.sampled_from(KINDS), st.sampled_from([None, 1, -1]), st.data())
@settings(deadline=None, max_examples=150)
def test_any_split_into_batches_and_observers_in_any_order_gives_equal_bits(
    x: Tensor, kind: type[Observer], axis: int | None, data: st.DataObject
) -> None:
    axis = None if x.ndim < 2 else axis
    order = data.draw(st.permutations(range(len(x))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(x)), max_size=4)))
    batches = torch.tensor_split(x[order], cuts)
    owners = [data.draw(st.integers(0, 2)) for _ in batches]
    parts = [
        observed([b for b, o in zip(batches, owners, strict=True) if o == part], kind, axis)
        for part in range(3)
    ]
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    aside = ("batches", "averages")
    assert state(parts[0], *aside) == state(observed([x], kind, axis), *aside)


@given(sample_sets(), st.sampled_from(KINDS), st.sampled_from([None, 1, -1]))
@settings(deadline=None, max_examples=100)
def test_what_runs_on_a_device_gives_the_bits_of_the_cpu(
    x: Tensor, kind: type[Observer], axis: int | None
) -> None:
    axis = None if x.ndim < 2 else axis
    expected = observed(x.split(2), kind, axis)
    with pytest.MonkeyPatch.context() as patch:
        for module in (observers, histogram):
            patch.setattr(module, "can_be_read", lambda _: False)
        found = observed(x.split(2), kind, axis)
    assert state(found) == state(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_observing_never_looks_at_values_on_a_device(
    kind: type[Observer], axis: int | None, dtype: torch.dtype
) -> None:
    """On the meta device there are none: whoever asks for one gets an error."""
    observer = kind("x", axis)
    for shape in ((3, 4, 5, 300), (3, 4, 5, 300), (3, 4, 0, 300)):
        observer.observe(torch.empty(shape, dtype=dtype, device="meta"))
    other = kind("x", axis)
    other.observe(torch.empty((3, 4, 5, 300), dtype=dtype, device="meta"))
    observer.merge(other)
    assert all(t.is_meta for t in observer.get_extra_state().values() if isinstance(t, Tensor))


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_statistic_follows_its_tensor_to_another_device(
    kind: type[Observer], axis: int | None
) -> None:
    observer = observed([torch.ones(2, 3)], kind, axis)
    observer.observe(torch.ones(2, 3, device="meta"))
    assert all(t.is_meta for t in observer.get_extra_state().values() if isinstance(t, Tensor))


@given(sample_sets([(5,), (3, 4), (2, 3, 5)]), st.integers(0, 3))
@settings(deadline=None)
def test_channels_have_the_exact_ends_and_counts_of_their_values(x: Tensor, axis: int) -> None:
    axis %= x.ndim
    observer = observed([x] * 2, axis=axis)
    if not observer.count:
        return
    limit = 6e4 if x.dtype == torch.float16 else 1e30
    columns = x.to(torch.float32).numpy().astype(np.float64)
    columns = np.moveaxis(columns, axis, 0).reshape(x.shape[axis], -1)
    for channel, column in enumerate(columns):
        usable = column[np.abs(column) < limit]
        low, high = (usable.min(), usable.max()) if usable.size else (0, 0)
        assert (observer.low[channel], observer.high[channel]) == (low, high)
        largest = max(-low, high)
        top = max(int(np.frexp(largest)[1]), -60) if largest else -60
        assert observer.histogram.exponent[channel] == top
        index = np.floor(usable * 2.0 ** (8 - top)).astype(int) + 256
        counts = observer.histogram.counts[channel]
        np.testing.assert_array_equal(counts[:-1], 2 * np.bincount(index, minlength=512))
        assert counts[-1] == 2 * (usable == 0).sum()


def test_histograms_per_channel_take_less_memory() -> None:
    observer = observed([torch.randn(2, 3, 4)], axis=1)
    assert observer.histogram.counts.shape == (3, 2 * CHANNEL_BINS + 1)
    assert observed([torch.randn(2, 3, 4)]).histogram.counts.shape == (1, 4097)


def test_moving_averages_start_at_the_first_batch_and_move_by_their_share() -> None:
    batches = torch.tensor([[-1.0, 2.0], [-3.0, 4.0], [torch.nan, torch.inf], [0.0, 1.0]])
    for axis in (None, 0):
        observer = MinMaxObserver("x", axis, ema=0.25)
        for batch in batches:
            observer.observe(batch if axis is None else batch[None])
        # -1 -> -1.5 -> (nothing usable) -> -1.125, and 2 -> 2.5 -> 2.125
        assert (observer.ema_low.item(), observer.ema_high.item()) == (-1.125, 2.125)
        assert (observer.low.item(), observer.high.item()) == (-3.0, 4.0)


def test_the_masks_of_float16_models_are_no_data_and_their_large_values_are() -> None:
    x = torch.tensor([1.0, -5e4, -65504.0])
    half, full = observed([x.half()]), observed([x])
    assert (half.low.item(), half.masked) == (torch.tensor(-5e4).half().item(), 1)
    assert (full.low.item(), full.masked) == (-65504.0, 0)


def test_extremes_of_float64_are_rounded_to_float32_and_huge_ones_are_masks() -> None:
    x = torch.tensor([1 / 3, -2 / 3, 1e300], dtype=torch.float64)
    observer = observed([x])
    assert (observer.low.item(), observer.high.item()) == (np.float32(-2 / 3), np.float32(1 / 3))
    assert (observer.count, observer.masked, observer.nonfinite) == (2, 1, 0)


def test_a_tensor_that_lacks_the_axis_or_changes_its_channels_is_refused() -> None:
    observer = observed([torch.ones(2, 3)], axis=1)
    with pytest.raises(InputError, match=r"tensor 'x': shape \(3,\) has no axis 1"):
        observer.observe(torch.ones(3))
    with pytest.raises(InputError, match="'x': 4 channels along axis 1, but 3 before"):
        observer.observe(torch.ones(2, 4))
    with pytest.raises(ConfigError, match="'x': cannot merge 4 channels into 3"):
        observer.merge(observed([torch.ones(2, 4)], axis=1))
    with pytest.raises(ConfigError, match="HistogramObserver along axis 1 into Hist"):
        HistogramObserver("x").merge(observer)


@pytest.mark.parametrize("axis", [None, 1])
def test_inference_mode_may_come_and_go(axis: int | None) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(2, 3, 300) * 4**i for i in range(4)]
    observer = HistogramObserver("x", axis)
    for i, batch in enumerate(batches):
        with torch.inference_mode(i % 2 == 0):
            observer.observe(batch * 1)
    assert state(copy.deepcopy(observer)) == state(observed(batches, axis=axis))
    observer.merge(copy.deepcopy(observer))


def test_integers_and_booleans_are_seen_as_numbers() -> None:
    assert observed([torch.tensor([True, False])]).high == 1
    assert observed([torch.tensor([-7, 3])]).low == -7
