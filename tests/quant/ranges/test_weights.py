"""Ranges of weights, per tensor, channel and block, against brute force over the weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.dtypes import codebook_type
from qwrap.errors import ConfigError, InputError
from qwrap.numerics import choose_qparams, fake_quantize, scale_shape, spread
from qwrap.quant.ranges import choose_weight_range

NORMAL_FLOAT = codebook_type("nf2", [-1, -0.35, 0, 0.4, 1])
SPECS = [
    QuantSpec(axis=0, narrow_range=True),
    QuantSpec(axis=1, narrow_range=True),
    QuantSpec(),
    QuantSpec(dtype="uint8", symmetric=False, axis=0),
    QuantSpec(dtype="uint8", symmetric=False, axis=0, restricted=True),
    QuantSpec(dtype="int4", axis=1, block_size=2),
    QuantSpec(dtype="uint4", symmetric=False, axis=0, block_size=3),
    QuantSpec(dtype="int3", axis=0, power_of_two=True),
    QuantSpec(dtype="int2", axis=1),
    QuantSpec(dtype="int8", axis=0, reduce_range=True),
    QuantSpec(dtype="int16", axis=1),
    QuantSpec(dtype="float8e4m3fn", axis=0),
    QuantSpec(dtype="float8e5m2fnuz"),
    QuantSpec(dtype="float4e2m1", axis=1, block_size=2, scale_type="float8e8m0"),
    QuantSpec(dtype="float4e2m1", axis=0, block_size=2, scale_type="float8e4m3fn"),
    QuantSpec(dtype="uint4", symmetric=False, axis=1, block_size=2, scale_type="float8e4m3fn"),
    QuantSpec(dtype="int4", axis=1, block_size=2, scale_type="float16"),
    QuantSpec(dtype=NORMAL_FLOAT, axis=0),
]
magnitudes = st.floats(2.0**-20, 2.0**20, width=32)
numbers = st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda v: -v))
weights = arrays(np.float32, array_shapes(min_dims=2, max_dims=3), elements=numbers)


def errors(weight: Tensor, spec: QuantSpec, ends: tuple[Tensor, Tensor]) -> Tensor:
    """Squared errors, of the shape of the scale."""
    qparams = choose_qparams(*ends, spec)
    fake = fake_quantize(weight, qparams.scale, qparams.zero_point, spec)
    squares = (fake.double() - weight.double()).square()
    index = torch.arange(qparams.scale.numel()).reshape(scale_shape(weight.shape, spec))
    index = spread(index, weight.shape, spec).expand(weight.shape)
    sums = torch.zeros(qparams.scale.numel(), dtype=torch.float64)
    return sums.index_add(0, index.flatten(), squares.flatten()).reshape(qparams.scale.shape)


@given(weights, st.sampled_from(SPECS))
@settings(deadline=None, max_examples=80)
def test_mse_is_never_worse_than_minmax_for_any_scale(x: np.ndarray, spec: QuantSpec) -> None:
    weight = torch.from_numpy(x)
    ends = {m: choose_weight_range(weight, spec, m) for m in ("mse", "minmax")}
    for low, high in ends.values():
        assert low.shape == high.shape == scale_shape(weight.shape, spec)
        assert low.dtype == high.dtype == torch.float32
    cost = {method: errors(weight, spec, found) for method, found in ends.items()}
    # The search adds squares of float32 differences, which are off by 2^-24 of the values each.
    slack = 1e-12 * weight.double().square().max()
    assert (cost["mse"] <= cost["minmax"] * (1 + 1e-6) + slack).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_minmax_is_that_of_the_values_of_each_scale(spec: QuantSpec) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 7, 2)).astype(np.float32))
    low, high = choose_weight_range(weight, spec, "minmax")
    spread_low, spread_high = (spread(end, weight.shape, spec) for end in (low, high))
    assert (spread_low <= weight).all()
    assert (weight <= spread_high).all()
    # Every end is one of the values, or 0 in the incomplete block at the end.
    assert set(low.flatten().tolist()) | set(high.flatten().tolist()) <= {
        0.0,
        *weight.flatten().tolist(),
    }


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(axis=0, narrow_range=True),
        QuantSpec(dtype="int4", axis=0),
        QuantSpec(dtype="int2", axis=0),
        QuantSpec(dtype="float4e2m1", axis=0),
        QuantSpec(dtype=NORMAL_FLOAT, axis=0),
    ],
    ids=str,
)
def test_mse_is_near_brute_force_channel_by_channel(spec: QuantSpec) -> None:
    random = np.random.default_rng(2)
    weight = torch.from_numpy(random.laplace(size=(6, 300, 3)).astype(np.float32))
    weight[3] *= 1000
    weight[4, 0, 0] = 40
    low, high = choose_weight_range(weight, spec)
    found = errors(weight, spec, (low, high))
    ends = weight.flatten(1).amin(1), weight.flatten(1).amax(1)
    tried = [errors(weight, spec, (ends[0] * r, ends[1] * r)) for r in np.linspace(0.08, 1, 93)]
    # Both grids are a percent or more apart, where the error is rough at this few values.
    assert (found <= 1.05 * torch.stack(tried).amin(0)).all()


def test_a_weight_larger_than_a_chunk_has_the_range_of_its_parts() -> None:
    weight = torch.randn(3, 200_000, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(dtype="int4", axis=0)
    low, high = choose_weight_range(weight, spec)
    for row, ends in zip(weight, zip(low, high, strict=True), strict=True):
        alone = choose_weight_range(row[None], spec)
        assert (alone[0].item(), alone[1].item()) == (ends[0].item(), ends[1].item())
    whole = choose_weight_range(torch.cat([weight[:1], weight[:1]], 1), QuantSpec(dtype="int4"))
    assert (whole[0].item(), whole[1].item()) == (low[0].item(), high[0].item())


def test_channels_of_zeros_have_the_widest_range() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.0, 0.0]])
    low, high = choose_weight_range(weight, QuantSpec(), "minmax")
    assert (low.tolist(), high.tolist()) == ([-2.0], [1.0])
    for method in ("minmax", "mse"):
        low, high = choose_weight_range(weight, QuantSpec(axis=0), method)
        assert low[0] == low[1] < 0
        assert high[0] == high[1] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_have_the_ranges_of_their_float32_values(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    spec = QuantSpec(dtype="int4", axis=1, block_size=1)
    for ours, expected in zip(
        choose_weight_range(weight, spec), choose_weight_range(weight.float(), spec), strict=True
    ):
        assert torch.equal(ours, expected)


def test_wrong_weights_and_methods_are_refused() -> None:
    spec = QuantSpec(axis=0)
    for method in ("mse", "minmax"):
        with pytest.raises(InputError, match="must be finite"):
            choose_weight_range(torch.tensor([[math.nan, 1.0]]), spec, method)
    with pytest.raises(ConfigError, match="no range method 'percentile' for weights"):
        choose_weight_range(torch.ones(2, 2), spec, "percentile")
