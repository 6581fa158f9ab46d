"""Weights of few bits in blocks, against onnxruntime."""

import math

import ml_dtypes
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


@pytest.mark.parametrize("kind", [0, 1])
def test_matmul_bnb_4_equals_onnxruntime(check, oracle, kind) -> None:
    rows, size, block = 8, 48, 32
    b = rng.integers(0, 256, rows * size // 2).astype(np.uint8)
    absmax = rng.uniform(0.5, 2, rows * size // block).astype(np.float32)
    a = rng.normal(size=(2, 3, size)).astype(np.float32)
    attributes = {"K": size, "N": rows, "block_size": block, "quant_type": kind}
    check("MatMulBnb4", [a, b, absmax], attributes, constants=(1, 2), **CLOSE)
    # onnxruntime's CPU kernel leaves a part of this product empty.
    (weight,) = oracle("MatMulBnb4", [np.eye(size, dtype=np.float32), b, absmax], attributes)
    a = rng.normal(size=(3, rows)).astype(np.float32)
    attributes["transB"] = 0
    check("MatMulBnb4", [a, b, absmax], attributes, expected=[a @ weight.T], **CLOSE)


INDICES = np.array([[0, 3, -1], [5, 2, 0]])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_of_packed_tables_equal_onnxruntime(check, bits) -> None:
    data = rng.integers(0, 256, (6, 64 * bits // 8)).astype(np.uint8)
    scales = rng.uniform(0.1, 1, (6, 4)).astype(np.float32)
    zero_points = rng.integers(0, 256, (6, 4 * bits // 8)).astype(np.uint8)
    attributes = {"bits": bits, "block_size": 16}
    check("GatherBlockQuantized", [data, INDICES, scales], attributes, constants=(0, 2))
    inputs = [data, INDICES, scales, zero_points]
    check("GatherBlockQuantized", inputs, attributes, constants=(0, 2, 3))


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4])
def test_slices_of_4_bit_tables_equal_onnxruntime(check, dtype) -> None:
    low = -8 if dtype is ml_dtypes.int4 else 0
    data = rng.integers(low, low + 16, (6, 40)).astype(dtype)
    scales = rng.uniform(0.1, 1, (6, 3)).astype(np.float32)
    zero_points = rng.integers(low, low + 16, (6, 3)).astype(dtype)
    attributes = {"block_size": 16, "quantize_axis": -1}
    constants = (0, 2, 3)
    check("GatherBlockQuantized", [data, INDICES, scales], attributes, constants=(0, 2))
    inputs = [data, INDICES, scales, zero_points]
    check("GatherBlockQuantized", inputs, attributes, constants=constants)
    attributes = {"block_size": 16, "quantize_axis": 0, "gather_axis": 1}
    inputs = [data.T.copy(), INDICES, scales.T.copy(), zero_points.T.copy()]
    check("GatherBlockQuantized", inputs, attributes, constants=constants)
    inputs[1] = INDICES.astype(np.int32)
    check("GatherBlockQuantized", inputs, {**attributes, "gather_axis": 0}, constants=constants)
