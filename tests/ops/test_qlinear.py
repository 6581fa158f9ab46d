"""Products of codes against onnxruntime, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwrap.ops.bitwise import bit_shift
from qwrap.ops.qlinear import matmul_integer, qlinear_matmul

rng = np.random.default_rng(11)


def codes(dtype: type, *shape: int) -> np.ndarray:
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max + 1, shape).astype(dtype)


def scales(*shape: int) -> np.ndarray:
    return rng.uniform(0.005, 0.02, shape).astype(np.float32)


SIGNS = [(np.uint8, np.int8), (np.uint8, np.uint8), (np.int8, np.int8)]


@pytest.mark.parametrize(("left", "right"), SIGNS)
@pytest.mark.parametrize("terms", [5, 2000])  # beyond some 258 terms float32 is not exact
def test_integer_products_equal_onnxruntime(check, left: type, right: type, terms: int) -> None:
    a, b = codes(left, 2, 3, terms), codes(right, 2, terms, 4)
    check("MatMulInteger", 10, [a, b], {})
    check("MatMulInteger", 10, [a, b, codes(left), codes(right)], {})
    check("MatMulInteger", 10, [a[0], b[0], codes(left), codes(right, 4)], {})


def test_a_zero_point_per_row_belongs_to_the_row() -> None:
    a, b = torch.from_numpy(codes(np.uint8, 3, 5)), torch.from_numpy(codes(np.uint8, 5, 2))
    zero_point = torch.tensor([1, 2, 3], dtype=torch.uint8)
    wanted = (a.long() - zero_point.long()[:, None]) @ b.long()
    assert torch.equal(matmul_integer(a, b, zero_point).long(), wanted)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_integer_convolutions_equal_onnxruntime(check, dtype: type) -> None:
    x, w = codes(np.uint8, 1, 4, 7, 6), codes(dtype, 6, 2, 3, 2)
    attributes = {"group": 2, "strides": [2, 1], "pads": [1, 0, 2, 1]}
    check("ConvInteger", 10, [x, w, codes(np.uint8)], attributes)
    attributes = {"group": 2, "auto_pad": "SAME_UPPER", "kernel_shape": [3, 2]}
    check("ConvInteger", 10, [x, w, codes(np.uint8), codes(dtype)], attributes)
    check("ConvInteger", 10, [codes(np.uint8, 1, 40, 9), codes(np.int8, 2, 40, 9)], {})


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_quantized_convolutions_equal_onnxruntime(check, dtype: type) -> None:
    x, w, bias = codes(dtype, 2, 4, 7, 6), codes(np.int8, 6, 2, 3, 2), codes(np.int16, 6)
    ends = [scales()[()] * 30, codes(dtype)]
    one = [x, scales(), codes(dtype), w, scales(), np.zeros((), np.int8)]
    each = [x, scales(), codes(dtype), w, scales(6), np.zeros(6, np.int8)]
    attributes = {"group": 2, "pads": [1, 1, 1, 1], "dilations": [2, 1]}
    check("QLinearConv", 10, [*one, np.array(ends[0]), ends[1]], attributes)
    check("QLinearConv", 10, [*each, np.array(ends[0]), ends[1], bias.astype(np.int32)], attributes)


@pytest.mark.parametrize(("left", "right"), SIGNS)
@pytest.mark.parametrize("opset", [10, 21])
def test_quantized_products_equal_onnxruntime(check, left, right, opset: int) -> None:
    a, b = codes(left, 2, 3, 50), codes(right, 2, 50, 4)
    output = [np.array(0.1, np.float32), codes(left)]
    check(
        "QLinearMatMul",
        opset,
        [a, scales(), codes(left), b, scales(), codes(right), *output],
        {},
    )
    columns = [a[0], scales(), codes(left), b[0], scales(4), codes(right, 4), *output]
    check("QLinearMatMul", opset, columns, {})


def test_products_of_8_bit_floats_are_those_of_their_values() -> None:
    a = torch.tensor([[1.0, -2.0], [0.5, 3.0]]).to(torch.float8_e4m3fn)
    b = torch.tensor([[2.0, 1.0], [4.0, 0.5]]).to(torch.float8_e4m3fn)
    half, zero = torch.tensor(0.5), torch.zeros((), dtype=torch.float8_e4m3fn)
    y = qlinear_matmul(a, half, zero, b, half, zero, torch.tensor(0.25), zero)
    assert torch.equal(y.float(), (a.float() @ b.float()).to(torch.float8_e4m3fn).float())


def test_dynamic_quantization_equals_onnxruntime(check) -> None:
    for x in (
        rng.normal(size=(3, 5)).astype(np.float32),
        np.array([1.0, 2.1, 1.3], np.float32),
        np.array([-1.0, -2.1], np.float32),
        np.zeros(4, np.float32),
    ):
        check("DynamicQuantizeLinear", 11, [x], {}, 3)


BITS = [np.int8, np.uint8, np.int16, np.int32, np.int64]


@pytest.mark.parametrize("dtype", BITS)
def test_bitwise_operators_equal_onnxruntime(check, dtype: type) -> None:
    a, b = codes(dtype, 2, 3, 4), codes(dtype, 4)
    check("BitwiseAnd", 18, [a, b], {})
    check("BitwiseOr", 18, [a, b], {})
    check("BitwiseXor", 18, [a, b], {})
    check("BitwiseNot", 18, [a], {})


@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
def test_shifts_of_unsigned_integers_equal_onnxruntime(check, direction: str) -> None:
    x, by = codes(np.uint8, 20), rng.integers(0, 12, 20).astype(np.uint8)
    check("BitShift", 11, [x, by], {"direction": direction})


@settings(max_examples=50)
@given(x=st.integers(-(2**31), 2**31 - 1), by=st.integers(-40, 40))
def test_shifts_of_signed_integers_keep_the_sign(x: int, by: int) -> None:
    too_far = not 0 <= by < 32
    right = x >> (31 if too_far else by)
    left = 0 if too_far else ((x << by) + 2**31) % 2**32 - 2**31
    values = torch.tensor([x], dtype=torch.int32), torch.tensor([by], dtype=torch.int32)
    assert bit_shift(*values, direction="RIGHT").item() == right
    assert bit_shift(*values, direction="LEFT").item() == left
