"""Quantized products of com.microsoft against onnxruntime: codes are equal bit for bit."""

import ml_dtypes
import numpy as np
import pytest
import torch

from qwrap import ops

rng = np.random.default_rng(7)
TYPES = [np.uint8, np.int8]
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # whether the bias is added with one rounding or two


def codes(dtype: type, *shape: int) -> np.ndarray:
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max + 1, shape).astype(dtype)


def scale(*shape: int, times: float = 1.0) -> np.ndarray:
    return np.asarray(times * rng.uniform(0.002, 0.05, shape), np.float32)


def floats(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("a", "b"), [(np.int16, np.int16), (np.uint16, np.uint16)])
def test_products_of_integers_equal_numpy(check, a, b) -> None:
    x, y = rng.integers(0, 1000, (2, 3, 4)).astype(a), rng.integers(0, 1000, (4, 5)).astype(b)
    wanted = x.astype(np.int64) @ y.astype(np.int64)
    kind = np.uint32 if a is np.uint16 else np.int32
    check("MatMulInteger16", [x, y], expected=[wanted.astype(kind)])


@pytest.mark.parametrize("dtype", TYPES)
def test_integer_arithmetic_equals_numpy(check, dtype) -> None:
    x, y, zx, zy = codes(dtype, 2, 3), codes(dtype, 3), codes(dtype), codes(dtype)
    wanted = (x.astype(np.int32) - zx) * (y.astype(np.int32) - zy)
    check("MulInteger", [x, zx, y, zy], expected=[wanted])
    check("MulInteger", [x, None, y], expected=[x.astype(np.int32) * y])
    kind = np.uint32 if dtype is np.uint8 else np.int32
    attributes = {"axes": [1], "keepdims": 0}
    check("ReduceSumInteger", [x], attributes, expected=[x.astype(kind).sum(1, dtype=kind)])


def test_products_as_floats_equal_onnxruntime(check) -> None:
    for a_type, b_type in ((np.uint8, np.uint8), (np.uint8, np.int8), (np.int8, np.int8)):
        a, b = codes(a_type, 2, 3, 9), codes(b_type, 9, 4)
        check("MatMulIntegerToFloat", [a, b, scale(), scale()])
        inputs = [a, b, scale(), scale(4), codes(a_type), codes(b_type, 4)]
        check("MatMulIntegerToFloat", inputs)
        check("MatMulIntegerToFloat", [*inputs, floats(4)], **CLOSE)
        batched = [a, codes(b_type, 2, 9, 4), scale(), scale(), codes(a_type), codes(b_type)]
        check("MatMulIntegerToFloat", batched)


@pytest.mark.parametrize("dtype", TYPES)
def test_dynamic_quantization_equals_onnxruntime(check, dtype) -> None:
    a, b = floats(2, 3, 9), codes(dtype, 9, 4)
    check("DynamicQuantizeMatMul", [a, b, scale()])
    check("DynamicQuantizeMatMul", [a, b, scale(), codes(dtype), floats(4)], **CLOSE)
    check("DynamicQuantizeMatMul", [a, b, scale(4), codes(dtype, 4), floats(4)], **CLOSE)
    check("DynamicQuantizeMatMul", [np.abs(a), b, scale(4), None, None])
    check("DynamicQuantizeMatMul", [np.zeros_like(a), b, scale(4), None, None])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("attributes", [{}, {"alpha": 0.7, "transB": 1}, {"transA": 1}])
def test_gemm_equals_onnxruntime(check, dtype, attributes) -> None:
    a = codes(dtype, 9, 5) if attributes.get("transA") else codes(dtype, 5, 9)
    b = codes(np.int8, 4, 9) if attributes.get("transB") else codes(np.int8, 9, 4)
    bias = rng.integers(-3000, 3000, 4).astype(np.int32)
    for shape in ((), (4,)):
        inputs = [a, scale(), codes(dtype), b, scale(*shape), codes(np.int8, *shape)]
        check("QGemm", inputs, attributes)
        check("QGemm", [*inputs, bias], attributes)
        check("QGemm", [*inputs, bias, scale(), codes(dtype)], attributes)
        check("QGemm", [*inputs, None, scale(times=10), codes(dtype)], attributes)


@pytest.mark.parametrize(
    ("x_type", "w_type"), [(np.uint8, np.uint8), (np.uint8, np.int8), (np.int8, np.int8)]
)
@pytest.mark.parametrize("channels_last", [0, 1])
def test_convolution_equals_onnxruntime(check, x_type, w_type, channels_last) -> None:
    x = codes(x_type, 2, 7, 6, 4) if channels_last else codes(x_type, 2, 4, 7, 6)
    bias = rng.integers(-3000, 3000, 8).astype(np.int32)
    y = [scale(times=20), codes(x_type)]
    for attributes in (
        {"group": 2, "pads": [1, 1, 1, 1]},
        {"group": 2, "strides": [2, 1], "pads": [1, 0, 0, 2], "kernel_shape": [3, 2]},
        {"group": 1, "dilations": [2, 2], "pads": [2, 2, 2, 1]},
        {"group": 4, "auto_pad": "SAME_UPPER", "strides": [2, 2]},
    ):
        kernel = attributes.get("kernel_shape", [3, 3])
        w = codes(w_type, 8, 4 // attributes["group"], *kernel)
        same = np.full(8, codes(w_type)) if w_type is np.uint8 else np.zeros(8, w_type)
        attributes = {**attributes, "channels_last": channels_last}
        check("QLinearConv", [x, scale(), codes(x_type), w, scale(), codes(w_type), *y], attributes)
        channels = [w, scale(8), same, *y, bias]
        check("QLinearConv", [x, scale(), codes(x_type), *channels], attributes)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
def test_quantizing_and_dequantizing_equal_onnxruntime(check, dtype) -> None:
    x = 20 * floats(2, 3, 8)
    check("QuantizeLinear", [x, scale(times=10), codes(dtype)])
    check("QuantizeLinear", [x, scale(3, times=10), codes(dtype, 3)], {"axis": 1})
    check("DequantizeLinear", [codes(dtype, 2, 3, 8), scale(), codes(dtype)])
    check("DequantizeLinear", [codes(dtype, 2, 3, 8), scale(8), codes(dtype, 8)], {"axis": -1})
    check("DequantizeLinear", [codes(dtype, 2, 3, 8), scale()])


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4])
def test_codes_of_4_bits_equal_onnxruntime(check, dtype) -> None:
    x, zero = 20 * floats(2, 3, 8), np.array(3, dtype)
    step, low = scale(times=100), -8 if dtype is ml_dtypes.int4 else 0
    wanted = np.clip(np.rint(x / step) + 3, low, low + 15).astype(dtype)
    # onnxruntime computes these codes, but cannot hand them out.
    check("QuantizeLinear", [x, step, zero], constants=(2,), expected=[wanted])
    values = rng.integers(0, 8, (2, 3, 8)).astype(dtype)
    check("DequantizeLinear", [values, scale(), zero], constants=(0, 2))


def test_gradients_pass_through_dynamic_quantization() -> None:
    operator = ops.find("com.microsoft", "DynamicQuantizeMatMul", 1)
    assert operator is not None
    a = torch.randn(3, 4, requires_grad=True)
    b, b_scale = torch.randint(-128, 128, (4, 5), dtype=torch.int8), torch.tensor(0.1)
    operator.function(a, b, b_scale).sum().backward()
    torch.testing.assert_close(a.grad, (0.1 * b.float()).sum(1).expand(3, 4))


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("per_column", [False, True])
def test_quantized_lstm_equals_onnxruntime(check, direction, per_column) -> None:
    d = 2 if direction == "bidirectional" else 1
    shape = (d, 16) if per_column else (d,)
    weights = [codes(np.int8, d, 3, 16), codes(np.int8, d, 4, 16)]
    quantization = [
        scale(*shape),
        np.zeros(shape, np.int8),
        scale(*shape),
        np.zeros(shape, np.int8),
    ]
    states = [floats(d, 2, 4), floats(d, 2, 4)]
    # A hidden state between two codes may go the other way: 1/255 of a gate's weight of up to 6.
    every = {"outputs": (0, 1, 2), "rtol": 0, "atol": 0.025}
    attributes = {"direction": direction, "hidden_size": 4}
    inputs = [floats(5, 2, 3), *weights, None, None, None, None, None, *quantization]
    check("DynamicQuantizeLSTM", inputs, attributes, **every)
    inputs[3:8] = [floats(d, 32), np.array([5, 3], np.int32), *states, floats(d, 12)]
    check("DynamicQuantizeLSTM", inputs, {**attributes, "clip": 0.5}, **every)
