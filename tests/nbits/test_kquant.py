"""K-quants against brute force, rounding to nearest, and onnxruntime's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.quantization.neural_compressor import weight_only as incumbent
from torch import Tensor

from qwrap.nbits.blocks import BlockFormat
from qwrap.nbits.kquant import k_quant
from qwrap.nbits.rtn import round_to_nearest
from qwrap.nbits.split import dequantize
from qwrap.numerics import sqnr

pytestmark = pytest.mark.ort(295)


def drawn(*shape: int, seed: int = 0, kind: str = "gaussian") -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return {"gaussian": values, "heavy": values.pow(3), "positive": values.abs() + 3}[kind]


def weighted_errors(weight: Tensor, rounded: Tensor, size: int) -> Tensor:
    blocks, error = weight.unflatten(1, (-1, size)), (rounded - weight).unflatten(1, (-1, size))
    importance = blocks.square().mean(2, keepdim=True).sqrt() + blocks.abs()
    return (importance * error.square()).sum(2)


def of_onnxruntime(weight: Tensor, bits: int, size: int) -> Tensor:
    codes, scale, zero_point = incumbent.quant_tensor_k_quant_cpu(weight.numpy(), bits, size)
    values = (codes - zero_point) * scale
    return torch.from_numpy(values.reshape(weight.shape).astype(np.float32))


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "positive"])
@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_it_is_better_than_nearest_rounding_and_onnxruntime(
    bits: int, size: int, kind: str
) -> None:
    # onnxruntime's is worse than nearest rounding on Gaussian weights with 4 bits in blocks of 32,
    # and far worse where all weights of a block have one sign.
    weight = drawn(64, 512, kind=kind)
    own = sqnr(weight, dequantize(k_quant(weight, BlockFormat(bits, size))))
    assert own > sqnr(weight, dequantize(round_to_nearest(weight, BlockFormat(bits, size))))
    assert own > sqnr(weight, of_onnxruntime(weight, bits, size))


@given(seed=st.integers(0, 999), bits=st.sampled_from([2, 4, 8]))
def test_no_block_is_worse_than_rounded_to_nearest(seed: int, bits: int) -> None:
    weight = drawn(4, 128, seed=seed, kind="heavy")
    own = weighted_errors(weight, dequantize(k_quant(weight, BlockFormat(bits, 32))), 32)
    plain = weighted_errors(weight, dequantize(round_to_nearest(weight, BlockFormat(bits, 32))), 32)
    assert (own <= plain * (1 + 1e-4) + 1e-10).all()  # sums in another order


def test_it_comes_near_the_best_scale_and_zero_point_there_are() -> None:
    weight = drawn(1, 64 * 32).reshape(64, 32)
    own = weighted_errors(weight, dequantize(k_quant(weight, BlockFormat(2, 32))), 32)[:, 0]
    low, high = weight.amin(1), weight.amax(1)
    best = torch.full((64,), torch.inf)
    for share in np.linspace(0.3, 1.3, 201):
        scale = (share * (high - low) / 3)[:, None]
        for zero_point in range(4):
            codes = (weight / scale + zero_point).round().clamp(0, 3)
            rounded = (codes - zero_point) * scale
            best = torch.minimum(best, weighted_errors(weight, rounded, 32)[:, 0])
    assert (own < 1.6 * best).all()
    assert own.mean() < 1.06 * best.mean()


def test_weights_on_a_grid_are_exact() -> None:
    codes = torch.stack([torch.randperm(32) // 2 for _ in range(16)]).float()
    weight = (codes - torch.arange(16.0)[:, None]) * 0.125
    blocks = k_quant(weight, BlockFormat(4, 32))
    assert blocks.zero_point is not None
    assert torch.equal(blocks.codes, codes.to(torch.uint8))
    assert blocks.zero_point.flatten().tolist() == list(range(16))
    assert torch.equal(dequantize(blocks), weight)


@pytest.mark.parametrize("value", [0.0, 3.0, -0.5])
def test_a_constant_block_is_exact(value: float) -> None:
    weight = torch.full((2, 32), value)
    torch.testing.assert_close(dequantize(k_quant(weight, BlockFormat(4, 32))), weight)


def test_blocks_are_found_alike_alone_and_among_many() -> None:
    weight = drawn(40, 2048)
    whole = k_quant(weight, BlockFormat(4, 32))
    alone = k_quant(weight[-1:, -64:], BlockFormat(4, 32))
    assert torch.equal(whole.codes[-1:, -64:], alone.codes)
    assert torch.equal(whole.scale[-1:, -2:], alone.scale)


def test_what_fills_up_the_last_block_counts_for_nothing() -> None:
    weight = drawn(40, 80)
    weight[:, -1] *= 5
    whole, alone = k_quant(weight, BlockFormat(4, 64)), k_quant(weight[:, 64:], BlockFormat(4, 16))
    assert torch.equal(whole.codes[:, 64:], alone.codes)
    torch.testing.assert_close(whole.scale[:, 1:], alone.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_are_always_zero_points_and_scales_have_the_type_of_the_weight(
    dtype: torch.dtype,
) -> None:
    weight = drawn(8, 80).to(dtype)
    blocks = k_quant(weight, BlockFormat(4, 32, symmetric=True))
    assert blocks.zero_point is not None
    assert blocks.zero_point.dtype == torch.uint8
    assert blocks.scale.dtype == dtype
    assert blocks.scale.shape == blocks.zero_point.shape == (8, 3)
    assert not blocks.format.symmetric
    assert sqnr(weight.float(), dequantize(blocks).float()) > 20
