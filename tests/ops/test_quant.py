"""QuantizeLinear and DequantizeLinear against onnxruntime."""

import numpy as np
import pytest

rng = np.random.default_rng(5)
X = rng.uniform(-20, 20, (2, 3, 8)).astype(np.float32)
SCALE = np.array(0.125, np.float32)
SCALES = np.array([0.1, 0.03, 0.25], np.float32)
TYPES = [np.uint8, np.int8, np.uint16, np.int16]


def codes(dtype: type, *shape: int) -> np.ndarray:
    info = np.iinfo(dtype)
    return rng.integers(info.min // 2, info.max // 2, shape).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_quantizing_equals_onnxruntime(check, dtype) -> None:
    check("QuantizeLinear", 21, [X, SCALE, codes(dtype)], {})
    check("QuantizeLinear", 21, [X, SCALES, codes(dtype, 3)], {"axis": -2})
    blocks = rng.uniform(0.1, 0.2, (2, 3, 2)).astype(np.float32)
    check("QuantizeLinear", 21, [X, blocks, codes(dtype, 2, 3, 2)], {"axis": 2, "block_size": 4})


@pytest.mark.parametrize("dtype", [*TYPES, np.int32])
def test_dequantizing_equals_onnxruntime(check, dtype) -> None:
    zero = (lambda *shape: np.zeros(shape, dtype)) if dtype is np.int32 else codes
    zero_point = np.zeros((), dtype) if dtype is np.int32 else codes(dtype)
    zero_points = zero(3) if dtype is np.int32 else codes(dtype, 3)
    check("DequantizeLinear", 21, [codes(dtype, 2, 3, 8), SCALE, zero_point], {})
    check("DequantizeLinear", 23, [codes(dtype, 2, 3, 8), SCALES, zero_points], {})
    blocks = rng.uniform(0.1, 0.2, (2, 3, 3)).astype(np.float32)
    attributes = {"axis": 2, "block_size": 3}
    check("DequantizeLinear", 21, [codes(dtype, 2, 3, 8), blocks], attributes)


def test_older_opsets_equal_onnxruntime(check) -> None:
    check("QuantizeLinear", 10, [X, SCALE], {})
    check("QuantizeLinear", 13, [X, SCALES, codes(np.int8, 3)], {"axis": 1})
    check("DequantizeLinear", 10, [codes(np.uint8, 5), SCALE, codes(np.uint8)], {})
    check("DequantizeLinear", 13, [codes(np.int8, 2, 3, 4), SCALES], {"axis": 1})


def test_integers_are_quantized_like_floats(check) -> None:
    check("QuantizeLinear", 13, [codes(np.int32, 9) // 2**22, SCALE, codes(np.int8)], {})
