"""Weights of few bits in blocks, against onnxruntime."""

import math

import numpy as np
import pytest

rng = np.random.default_rng(8)
CLOSE = {"rtol": 1e-5, "atol": 1e-4}  # sums of K products in another order; weights reach 10


def packed(rows: int, size: int, bits: int, block: int) -> list[np.ndarray]:
    blocks = math.ceil(size / block)
    b = rng.integers(0, 256, (rows, blocks, block * bits // 8)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.05, (rows, blocks)).astype(np.float32)
    zero_points = rng.integers(0, 256, (rows, math.ceil(blocks * bits / 8))).astype(np.uint8)
    return [b, scales, zero_points]


@pytest.mark.parametrize("accuracy", [0, 1, 4])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_matmul_n_bits_equals_onnxruntime(check, bits, block, accuracy) -> None:
    for size, rows, batch in ((80, 8, (1,)), (256, 16, (2, 3))):
        b, scales, zero_points = packed(rows, size, bits, block)
        a, bias = rng.normal(size=(*batch, size)).astype(np.float32), np.ones(rows, np.float32)
        attributes = {
            "K": size,
            "N": rows,
            "bits": bits,
            "block_size": block,
            "accuracy_level": accuracy,
        }
        check("MatMulNBits", [a, b, scales], attributes, constants=(1, 2), **CLOSE)
        inputs = [a, b, scales, zero_points, None, bias]
        check("MatMulNBits", inputs, attributes, constants=(1, 2, 3, 5), **CLOSE)


@pytest.mark.parametrize("accuracy", [0, 4])
def test_matmul_n_bits_takes_float_zero_points_groups_and_flat_scales(check, accuracy) -> None:
    size, rows, block = 64, 8, 16
    b, scales, _ = packed(rows, size, 4, block)
    a = rng.normal(size=(3, size)).astype(np.float32)
    zero = rng.uniform(0, 15, scales.shape).astype(np.float32)
    groups = rng.permutation(np.repeat(np.arange(size // block), block)).astype(np.int32)
    attributes = {"K": size, "N": rows, "block_size": block, "accuracy_level": accuracy}
    check("MatMulNBits", [a, b, scales, zero], attributes, constants=(1, 2, 3), **CLOSE)
    check("MatMulNBits", [a, b, scales, None, groups], attributes, constants=(1, 2, 4), **CLOSE)
    check("MatMulNBits", [a, b, scales.reshape(-1)], attributes, constants=(1, 2), **CLOSE)
