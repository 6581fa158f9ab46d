"""Quantized operators of com.microsoft against onnxruntime: codes are equal bit for bit."""

import numpy as np
import pytest

rng = np.random.default_rng(6)
TYPES = [np.uint8, np.int8]


def codes(dtype: type, *shape: int) -> np.ndarray:
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max + 1, shape).astype(dtype)


def scale(low: float = 0.002, high: float = 0.05) -> np.ndarray:
    return np.array(rng.uniform(low, high), np.float32)


def every_pair(dtype: type) -> list[np.ndarray]:
    info = np.iinfo(dtype)
    values = np.arange(info.min, info.max + 1).astype(dtype)
    return [np.ascontiguousarray(v) for v in np.meshgrid(values, values)]


@pytest.mark.parametrize("dtype", TYPES)
def test_sums_and_products_of_all_pairs_equal_onnxruntime(check, dtype) -> None:
    a, b = every_pair(dtype)
    for _ in range(3):
        inputs = [a, scale(), codes(dtype), b, scale(), codes(dtype), scale(), codes(dtype)]
        check("QLinearAdd", inputs)
        check("QLinearMul", inputs)
    half, one = np.array(0.5, np.float32), np.array(1.0, np.float32)  # makes ties
    inputs = [a, half, codes(dtype), b, half, codes(dtype), one, codes(dtype)]
    check("QLinearAdd", inputs)
    check("QLinearMul", inputs)


@pytest.mark.parametrize("dtype", TYPES)
def test_sums_and_products_broadcast_and_need_no_zero_point(check, oracle, dtype) -> None:
    a, b, zero = codes(dtype, 2, 3, 4), codes(dtype, 3, 1), np.zeros((), dtype)
    for op_type in ("QLinearAdd", "QLinearMul"):
        x, y, z = scale(), scale(), scale()
        # onnxruntime itself does not take a missing zero point before the last.
        wanted = oracle(op_type, [a, x, zero, b, y, zero, z, zero], {})
        check(op_type, [a, x, None, b, y, None, z], expected=wanted)
        check(op_type, [a, x, zero, b, y, zero, z])


@pytest.mark.parametrize("dtype", TYPES)
def test_activations_of_all_codes_equal_onnxruntime(check, oracle, dtype) -> None:
    x = every_pair(dtype)[0][0]
    for _ in range(4):
        quantization = [scale(), codes(dtype), scale(), codes(dtype)]
        check("QLinearLeakyRelu", [x, *quantization], {"alpha": 0.2})
        check("QLinearSigmoid", [x, *quantization])
    zero = np.zeros((), dtype)
    for op_type in ("QLinearLeakyRelu", "QLinearSigmoid"):
        scales = scale(), scale()
        wanted = oracle(op_type, [x, scales[0], zero, scales[1], zero], {})
        # onnxruntime itself does not survive a missing zero point here.
        check(op_type, [x, scales[0], None, scales[1]], expected=wanted)


@pytest.mark.parametrize("dtype", TYPES)
def test_joining_tensors_equals_onnxruntime(check, dtype) -> None:
    x, y, condition = codes(dtype, 2, 3, 4), codes(dtype, 2, 5, 4), rng.random((2, 3, 1)) > 0.5
    triples = [x, scale(), codes(dtype), y, scale(), codes(dtype)]
    check("QLinearConcat", [scale(), codes(dtype), *triples], {"axis": 1})
    check("QLinearConcat", [triples[1], triples[2], *triples], {"axis": -2}, constants=(0, 1))
    triples[3] = codes(dtype, 2, 3, 4)
    check("QLinearWhere", [condition, *triples, scale(), codes(dtype)])


@pytest.mark.parametrize("dtype", TYPES)
def test_softmax_equals_onnxruntime(check, dtype) -> None:
    low = np.array(np.iinfo(dtype).min, dtype)
    for width, opset, axis in ((5, 13, -1), (40, 13, 1), (300, 13, 2), (7, 12, 1)):
        x = codes(dtype, 2, 6, width)
        attributes = {"axis": axis, "opset": opset}
        inputs = [x, scale(0.01, 0.2), codes(dtype), np.array(1 / 255, np.float32), low]
        check("QLinearSoftmax", inputs, attributes)
        check("QLinearSoftmax", [*inputs[:3], scale(), low], attributes)
        check("QLinearSoftmax", [*inputs[:2], None, np.array(1 / 256, np.float32), low], attributes)


POOLS = [
    {"kernel_shape": [2, 3]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1},
    {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 0, 1, 1], "ceil_mode": 1},
    {
        "kernel_shape": [3, 2],
        "strides": [2, 2],
        "pads": [1, 0, 1, 1],
        "ceil_mode": 1,
        "count_include_pad": 1,
    },
    {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"},
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels_last", [0, 1])
def test_average_pools_equal_onnxruntime(check, dtype, channels_last) -> None:
    x = codes(dtype, 2, 8, 7, 3) if channels_last else codes(dtype, 2, 3, 8, 7)
    inputs = [x, scale(), codes(dtype), scale(), codes(dtype)]
    layout = {"channels_last": channels_last}
    for attributes in POOLS:
        check("QLinearAveragePool", inputs, {**attributes, **layout})
    check("QLinearGlobalAveragePool", inputs, layout)
    if not channels_last:
        inputs[0] = codes(dtype, 2, 3, 9)
        check("QLinearAveragePool", inputs, {"kernel_shape": [3], "pads": [1, 1]})


@pytest.mark.parametrize("dtype", TYPES)
def test_mean_over_axes_equals_its_formula(check, dtype) -> None:
    x, sx, zx, sy, zy = codes(dtype, 2, 3, 4), scale(), codes(dtype), scale(), codes(dtype)
    info = np.iinfo(dtype)
    for axes, keepdims in (([1], 1), ([0, -1], 0)):
        mean = ((x.astype(np.float32) - zx) * sx).mean(tuple(axes), keepdims=bool(keepdims))
        wanted = np.clip(np.rint(mean / sy) + zy, info.min, info.max).astype(dtype)
        attributes = {"axes": axes, "keepdims": keepdims}
        check("QLinearReduceMean", [x, sx, zx, sy, zy], attributes, expected=[wanted])
