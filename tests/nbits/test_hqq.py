"""HQQ against what it minimises, rounding to nearest, and onnxruntime's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.quantization import matmul_nbits_quantizer as incumbent
from torch import Tensor

from qwrap.errors import ConfigError
from qwrap.nbits.blocks import BlockFormat
from qwrap.nbits.hqq import NORM, hqq, shrink
from qwrap.nbits.rtn import round_to_nearest
from qwrap.nbits.split import dequantize
from qwrap.numerics import sqnr

pytestmark = pytest.mark.ort(293)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norms(error: Tensor, size: int) -> Tensor:
    return error.abs().pow(NORM).unflatten(1, (-1, size)).sum(2)


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_it_is_better_than_nearest_rounding_and_onnxruntime_on_gaussian_weights(
    bits: int, size: int
) -> None:
    weight = gaussian(64, 512)
    own = sqnr(weight, dequantize(hqq(weight, BlockFormat(bits, size))))
    assert own > sqnr(weight, dequantize(round_to_nearest(weight, BlockFormat(bits, size)))) + 0.1
    config = incumbent.HQQWeightOnlyQuantConfig(block_size=size, bits=bits)
    codes, scale, zero = incumbent.HQQWeightOnlyQuantizer(config).quantize_internal(
        weight, bits=bits, group_size=size
    )
    theirs = (codes.unflatten(1, (-1, size)) - zero[..., None]) * scale[..., None]
    assert own > sqnr(weight, theirs.flatten(1)) - 0.05  # its own choice is the last, not the best


@given(seed=st.integers(0, 999), bits=st.sampled_from([2, 4, 8]), steps=st.integers(0, 30))
def test_no_block_ever_gets_worse_by_the_norm_that_is_minimised(
    seed: int, bits: int, steps: int
) -> None:
    weight = gaussian(3, 96, seed=seed).pow(3)
    form = BlockFormat(bits, 32)
    start, end = (weight - dequantize(hqq(weight, form, steps=n)) for n in (0, steps))
    # The zero points are rounded to float32 again on the way to a matrix.
    assert (norms(end, 32) <= norms(start, 32) * (1 + 1e-4) + 1e-4).all()


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_are_the_formulas_of_the_paper(steps: int) -> None:
    weight, beta = 20 * gaussian(64, 32), 2.0
    low, high = weight.aminmax(dim=1, keepdim=True)
    scale = (high - low) / 15
    zero_point = -low / scale
    tried = []
    for _ in range(steps):
        codes = (weight / scale + zero_point).round().clamp(0, 15)
        sparse = shrink(weight - (codes - zero_point) * scale, beta, NORM)
        zero_point = (codes - (weight - sparse) / scale).mean(1, keepdim=True)
        tried.append(zero_point)
        beta *= 1.5
    found = hqq(weight, BlockFormat(4, 32), steps=steps, beta=2.0, kappa=1.5).zero_point
    assert found is not None
    is_last = torch.isclose(found, tried[-1], rtol=1e-4, atol=1e-4)
    assert is_last.float().mean() > 0.2  # where none of those before was better


def test_shrinking_minimises_what_it_says() -> None:
    x, y = torch.linspace(-2, 2, 41), torch.linspace(-3, 3, 60001)
    for beta in (2.0, 10.0):
        costs = y.abs() + beta / 2 * (y - x[:, None]).square()
        torch.testing.assert_close(shrink(x, beta, 1.0), y[costs.argmin(1)], rtol=0, atol=1e-3)
        costs = y.abs().pow(NORM) + beta / 2 * (y - x[:, None]).square()
        found = shrink(x, beta / NORM, NORM)
        # The slope is taken at x and not at the minimum, which lies nearer to 0.
        assert ((found - y[costs.argmin(1)]).abs() < 0.1)[x.abs() >= 1].all()


def test_weights_on_a_grid_with_any_zero_point_are_exact() -> None:
    codes = torch.stack([torch.randperm(32) // 2 for _ in range(6)]).float()
    weight = (codes - torch.linspace(-20, 30, 6)[:, None]) * 0.125
    blocks = hqq(weight, BlockFormat(4, 32))
    assert torch.equal(blocks.codes, codes.to(torch.uint8))
    torch.testing.assert_close(dequantize(blocks), weight, rtol=1e-5, atol=1e-5)


@pytest.mark.ort("G22")
def test_the_axis_says_what_blocks_lie_along() -> None:
    # onnxruntime's reads its setting of this name nowhere.
    weight = gaussian(64, 48)
    outputs, inputs = hqq(weight, BlockFormat(4, 16), axis=0), hqq(weight, BlockFormat(4, 16))
    assert outputs.scale.shape == (48, 4)
    assert inputs.scale.shape == (64, 3)
    assert torch.equal(outputs.codes, hqq(weight.t(), BlockFormat(4, 16)).codes)
    assert sqnr(weight.t(), dequantize(outputs)) > 20


@pytest.mark.parametrize("size", [0, 16, 64])
def test_the_last_block_may_be_cut_off(size: int) -> None:
    weight = gaussian(5, 80)
    blocks = hqq(weight, BlockFormat(4, size))
    assert blocks.codes.shape == weight.shape
    assert blocks.scale.shape == (5, -(-80 // (size or 80)))
    last = hqq(weight[:, 64:], BlockFormat(4, 16))
    if size == 64:  # what fills it up counts for nothing
        torch.testing.assert_close(blocks.scale[:, -1:], last.scale)
        torch.testing.assert_close(blocks.zero_point[:, -1:], last.zero_point)


@pytest.mark.parametrize("value", [0.0, 3.0, -0.5])
def test_a_constant_block_is_exact(value: float) -> None:
    weight = torch.full((2, 32), value)
    assert torch.equal(dequantize(hqq(weight, BlockFormat(4, 32))), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_suit_scales_as_they_are_stored(dtype: torch.dtype) -> None:
    weight = gaussian(16, 64).to(dtype)
    blocks = hqq(weight, BlockFormat(4, 32))
    assert blocks.zero_point is not None
    assert blocks.scale.dtype == blocks.zero_point.dtype == dtype
    scale, zero_point = (
        v.double().repeat_interleave(32, 1) for v in (blocks.scale, blocks.zero_point)
    )
    error = ((blocks.codes - zero_point) * scale - weight.double()).abs()
    inside = (blocks.codes > 0) & (blocks.codes < 15)
    assert (error <= 0.5001 * scale)[inside].all()


@pytest.mark.parametrize(
    "wrong", [{"axis": 2}, {"norm": 0.0}, {"norm": 1.5}, {"beta": 0}, {"kappa": 0.9}, {"steps": -1}]
)
def test_it_refuses_what_means_nothing(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        hqq(gaussian(2, 32), BlockFormat(4, 32), **wrong)
