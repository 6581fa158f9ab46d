"""Rounding to nearest against the incumbent's native quantizers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnxruntime.capi._pybind_state as native
import pytest
import torch
from onnxruntime.quantization.quant_utils import pack_bytes_to_4bit

from qwrap.nbits.blocks import BlockFormat
from qwrap.nbits.packing import operator_arrays, pack, pair_arrays, unpack
from qwrap.nbits.rtn import round_half_away, round_to_nearest

pytestmark = pytest.mark.ort(280, 281, 282, 283, 285)

Array = np.ndarray[Any, np.dtype[Any]]
QUANTIZERS = {
    2: native.quantize_matmul_2bits,
    4: native.quantize_matmul_4bits,
    8: native.quantize_matmul_8bits,
}
HALVES = np.array([0.5, -0.5, 1.5, 2.5, -3.5, 7.0, -8.0, 0.0] * 32)


def made(k: int, n: int, dtype: type) -> Array:
    """``[K, N]`` with columns of zeros, of one sign, constant, of halves between codes."""
    weight = np.random.default_rng(k + n).normal(size=(k, n)).astype(dtype)
    weight[:, 0], weight[:, 1] = 0, 1
    weight[:, 2], weight[:, 3] = np.abs(weight[:, 2]), -np.abs(weight[:, 3])
    weight[:, 4] = HALVES[:k]
    weight[:, 5] *= 1e-4
    return weight


def incumbent_operator(weight: Array, bits: int, block: int, symmetric: bool) -> list[Array]:
    (k, n), count = weight.shape, -(-weight.shape[0] // block)
    padded = np.pad(weight, ((0, count * block - k), (0, 0)))
    codes = np.zeros((n, count, block * bits // 8), np.uint8)
    scales = np.zeros((n, count), weight.dtype)
    zero_points = np.zeros((n, -(-count * bits // 8)), np.uint8)
    QUANTIZERS[bits](codes, padded, scales, zero_points, block, n, k, symmetric)
    return [codes, scales, zero_points]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_blocks_are_the_native_quantizers_bit_for_bit(
    bits: int, block: int, symmetric: bool, dtype: type
) -> None:
    for k in (256, 200, 40, 7):
        weight = made(k, 24, dtype)
        codes, scales, zero_points = incumbent_operator(weight, bits, block, symmetric)
        form = BlockFormat(bits, block, symmetric)
        ours = operator_arrays(round_to_nearest(torch.from_numpy(weight.T), form))
        np.testing.assert_array_equal(ours["scale"], scales)
        assert ours["codes"].shape == codes.shape
        if k * bits % 8:  # the incumbent completes the last byte with codes of earlier values
            known = np.where(np.arange(block) < k, unpack(codes, bits), 0)
            codes = pack(known.astype(np.uint8), bits)
        np.testing.assert_array_equal(ours["codes"], codes)
        if not symmetric:
            np.testing.assert_array_equal(ours["zero_point"], zero_points)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 24, 32, 64, 128, 200])
def test_blocked_pairs_are_the_native_quantizers_bit_for_bit(
    block: int, symmetric: bool, dtype: type
) -> None:
    for k, n in ((256, 24), (201, 31), (40, 8), (11, 7)):
        weight, count = made(k, n, dtype), -(-k // block)
        codes, scales = np.zeros((k * n + 1) // 2, np.uint8), np.zeros((count, n), dtype)
        zero_points = np.zeros((count * n + 1) // 2, np.uint8)
        native.quantize_qdq_matmul_4bits(codes, weight, scales, zero_points, block, n, k, symmetric)
        form = BlockFormat(4, block, symmetric)
        ours = pair_arrays(round_to_nearest(torch.from_numpy(weight.T), form, around_zero=True))
        np.testing.assert_array_equal(ours["scale"], scales)
        flat = ours["codes"].astype(np.int8).view(np.uint8).reshape(-1) & 15
        np.testing.assert_array_equal(flat, unpack(codes, 4, k * n))
        if not symmetric:
            flat = ours["zero_point"].astype(np.uint8).reshape(-1)
            np.testing.assert_array_equal(flat, unpack(zero_points, 4, count * n))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_error_is_at_most_half_a_stored_scale(bits: int, symmetric: bool) -> None:
    weight = torch.from_numpy(made(200, 24, np.float32).T)
    blocks = round_to_nearest(weight, BlockFormat(bits, 32, symmetric))
    scale = blocks.scale.repeat_interleave(32, 1)[:, :200]
    zero = 2 ** (bits - 1) if symmetric else blocks.zero_point.repeat_interleave(32, 1)[:, :200]
    error = ((blocks.codes.float() - zero) * scale - weight).abs() / scale.abs().clamp(1e-30)
    # Symmetric codes end one step short on one side: a value there is wrong by up to a step.
    # Asymmetric ones end half a step short, where the zero point was rounded that way.
    assert error.max() <= 1 + 1e-3
    assert (error <= 0.5 + 1e-3).float().mean() > 0.8


def test_bfloat16_codes_are_the_nearest_for_the_scale_that_is_stored() -> None:
    weight = torch.from_numpy(made(256, 24, np.float32).T).bfloat16()
    blocks = round_to_nearest(weight, BlockFormat(8, 64))
    assert blocks.scale.dtype == torch.bfloat16
    scale = blocks.scale.float().repeat_interleave(64, 1)
    zero = blocks.zero_point.repeat_interleave(64, 1).float()
    inside = (blocks.codes > 0) & (blocks.codes < 255)
    error = ((blocks.codes.float() - zero) * scale - weight.float()).abs()
    assert (error <= 0.5 * scale * (1 + 1e-3))[inside].all()


def test_one_block_per_output_is_asked_for_by_0() -> None:
    weight = torch.from_numpy(made(40, 8, np.float32).T)
    whole, named = (round_to_nearest(weight, BlockFormat(4, size, True)) for size in (0, 40))
    assert whole.scale.shape == (8, 1)
    assert torch.equal(whole.codes, named.codes)


def test_a_number_just_below_a_half_is_rounded_down() -> None:
    below = torch.tensor([0.49999997, 0.5, 1.5, -0.49999997, -0.5, 2.5])
    assert round_half_away(below).tolist() == [0, 1, 2, 0, -1, 3]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_packed_comes_back(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 5, 13)).astype(np.uint8)
    packed = pack(codes, bits, fill=1)
    assert packed.shape == (3, 5, -(-13 * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits, 13), codes)
    np.testing.assert_array_equal(unpack(packed, bits)[..., 13:], 1)


@pytest.mark.ort("G62")
def test_packing_is_20_times_as_fast_as_a_loop_over_bytes() -> None:
    """onnxruntime's ``pack_bytes_to_4bit`` takes 50 ms and more for a million values."""
    codes = np.random.default_rng(0).integers(0, 16, 1_000_000).astype(np.uint8)
    raw, shortest = codes.tobytes(), []
    for task in (lambda: pack(codes, 4), lambda: pack_bytes_to_4bit(raw)):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            task()
            times.append(time.perf_counter() - start)
        shortest.append(min(times))
    assert bytes(pack_bytes_to_4bit(raw)) == pack(codes, 4).tobytes()
    assert shortest[1] > 20 * shortest[0]
