"""The choice of a histogram's values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwrap.quant.observe.sampling import sample, sample_stride


@given(st.integers(1, 10**8), st.integers(1, 5000))
def test_the_stride_has_no_divisor_in_common_with_the_size(size: int, channels: int) -> None:
    stride = sample_stride(size, channels)
    assert math.gcd(stride, size) == 1 or size == 1
    assert stride == 1 or size > 255
    assert stride < 128
    assert stride == 1 or size / stride > channels  # 16 and more but for sizes of many divisors


def test_a_large_tensor_is_sampled_evenly_over_every_axis() -> None:
    x = torch.arange(24).expand(40, 32, 24)
    counts = sample(x).values.bincount()
    # Of each row every channel gets its share up to one value: 768 / 3 / 24 is 10.67.
    assert counts.sum() == 40 * (768 // sample_stride(768))
    assert counts.max() - counts.min() <= 40


@pytest.mark.parametrize("size", [256, 1000, 5000])
def test_over_many_samples_every_position_comes_up_about_as_often(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    stride, hits = sample_stride(size), torch.zeros(size)
    for _ in range(stride):
        # The remainder tells the position; the rest makes rows different. All is exact in float64.
        rows = torch.randint(2**40, (400, 1), generator=generator) * size + torch.arange(size)
        taken = sample(rows.to(torch.float64)).values
        hits += (taken % size).to(torch.int64).bincount(minlength=size)
    # Some starts reach a position that others do too: up to twice the least share.
    assert hits.min() > 0.4 * hits.mean()
    assert hits.max() < 2.1 * hits.mean()


def test_a_sample_gives_the_same_values_in_any_company() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 40, 50)
    whole = sample(x).values.view(6, -1)
    for i, row in enumerate(x):
        assert torch.equal(sample(row[None]).values, whole[i])
        assert torch.equal(sample(torch.stack((x[0] + 1, row))).values.view(2, -1)[1], whole[i])


def test_where_a_sample_starts_does_not_hang_on_the_last_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 2000)
    nearby = torch.nextafter(x, torch.full_like(x, torch.inf))
    same = (starts(x) == starts(nearby)).float().mean()
    assert same > 0.99  # 16 values a row, each of which crosses a step of 2^-7 once in 2^16


def starts(x: Tensor) -> Tensor:
    """The position of each row's first sampled value."""
    taken = sample(x).values.view(len(x), -1)[:, 0]
    return (x == taken[:, None]).to(torch.uint8).argmax(1)


def test_channels_are_those_of_the_values_taken() -> None:
    x = torch.arange(5).view(1, 5, 1, 1).expand(3, 5, 20, 30)
    for axis, view in ((1, x), (-1, x.movedim(1, -1)), (0, x.transpose(0, 1))):
        taken = sample(view.to(torch.float32), axis)
        assert torch.equal(taken.rows, taken.values.to(torch.int64))
    taken = sample(torch.arange(5).view(1, 5).expand(3, 5).to(torch.float32), 1)
    assert (taken.weight, taken.rows.tolist()) == (1, list(range(5)) * 3)


def test_a_scalar_and_short_rows_are_taken_whole() -> None:
    assert sample(torch.tensor(3.0)).values.tolist() == [3.0]
    x = torch.randn(1000, 255)
    assert torch.equal(sample(x).values, x.view(-1))
