"""The nearest of a table of numbers, against exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qwrap.codebook
from qwrap.codebook import MOST_COMPARED, as_tensor, middles_of, nearest

float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
tables = st.lists(float32, min_size=2, max_size=12, unique=True).map(lambda v: tuple(sorted(v)))


def nearest_by_fractions(x: float, levels: tuple[float, ...]) -> int:
    return min(range(len(levels)), key=lambda i: (abs(Fraction(x) - Fraction(levels[i])), i))


@pytest.mark.parametrize("most_compared", [0, MOST_COMPARED])
@given(levels=tables, xs=st.lists(float32, min_size=1, max_size=12))
def test_nearest_is_the_nearest_level_and_of_two_the_lower(
    most_compared: int, levels: tuple[float, ...], xs: list[float]
) -> None:
    middles = middles_of(levels)
    around = [np.nextafter(np.float32(m), np.float32(s)) for m in middles for s in (-9e37, 9e37)]
    values = [*xs, *levels, *middles, *(float(v) for v in around if np.isfinite(v))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwrap.codebook, "MOST_COMPARED", most_compared)
        found = nearest(torch.tensor(values, dtype=torch.float32), middles)
    assert found.tolist() == [nearest_by_fractions(x, levels) for x in values]


def test_a_middle_that_float32_cannot_hold_is_rounded_down() -> None:
    # 1 + 2^-24 is the middle: 1 is nearer to 1, and the next float32 is the upper level.
    assert middles_of((1.0, 1.0 + 2**-23)) == (1.0,)
    # Float64 would round this middle up to 0.5, which is nearer to 1 than to -2^-60.
    assert middles_of((-(2.0**-60), 1.0)) == (float(np.nextafter(np.float32(0.5), np.float32(0))),)


def test_a_table_becomes_a_tensor_once() -> None:
    with torch.inference_mode():
        first = as_tensor((0.0, 0.125), torch.device("cpu"))
    assert as_tensor((0.0, 0.125), torch.device("cpu")) is first
    assert not first.is_inference()  # or autograd could not use it later


def test_values_need_not_lie_in_order() -> None:
    steps = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    middles = middles_of(tuple(k / 40 for k in range(-60, 60)))
    assert len(middles) > MOST_COMPARED
    assert torch.equal(nearest(steps.t(), middles), nearest(steps, middles).t())
