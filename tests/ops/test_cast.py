"""Conversions between all element types, against onnxruntime; where it has no kernel, ml_dtypes."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper

from qwrap.errors import InputError, UnsupportedOpError
from qwrap.ops.cast import bit_cast, cast, cast_like, convert
from qwrap.ops.minifloat import to_float8

SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0]
NUMBERS = np.array(
    [*SPECIAL, *np.linspace(-20, 20, 161), 300.7, 447, 456, 464, 465, 480, 61440, 6e4, 7e4, 1e-3],
    np.float32,
)
SMALL = np.array([*np.linspace(-20, 20, 161), 100.4, 127.0, -127.0], np.float32)
FLOATS8 = [
    (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
    (TensorProto.FLOAT8E4M3FNUZ, ml_dtypes.float8_e4m3fnuz),
    (TensorProto.FLOAT8E5M2, ml_dtypes.float8_e5m2),
    (TensorProto.FLOAT8E5M2FNUZ, ml_dtypes.float8_e5m2fnuz),
]
INTEGERS = [
    *(TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16),
    *(TensorProto.INT32, TensorProto.UINT32, TensorProto.INT64, TensorProto.UINT64),
]
SUB_BYTE = [TensorProto.INT4, TensorProto.UINT4, TensorProto.INT2, TensorProto.UINT2]
NUMERIC = [
    *(*INTEGERS, *SUB_BYTE, TensorProto.BOOL, TensorProto.FLOAT, TensorProto.DOUBLE),
    *(TensorProto.FLOAT16, TensorProto.BFLOAT16, *(t for t, _ in FLOATS8)),
]


def cast_node(source: str, target: str, to: int, **attributes: object) -> object:
    return helper.make_node("Cast", [source], [target], to=to, **attributes)


@pytest.mark.parametrize(("source", "to"), [*itertools.product(NUMERIC, NUMERIC)])
def test_cast_between_any_two_types_equals_onnxruntime(check_model, source: int, to: int) -> None:
    if {source, to} & set(SUB_BYTE) and {source, to} & {t for t, _ in FLOATS8}:
        pytest.skip("onnxruntime has no such kernel")
    unsigned = source in (TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64)
    x = np.abs(SMALL) if unsigned else SMALL
    nodes = [
        cast_node("x", "a", source),
        cast_node("a", "b", to),
        cast_node("b", "y", TensorProto.FLOAT),
    ]
    check_model(nodes, {"x": x}, {"y": TensorProto.FLOAT}, 25)


@pytest.mark.parametrize(("to", "saturate"), [*itertools.product([t for t, _ in FLOATS8], [0, 1])])
@pytest.mark.parametrize("source", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_cast_to_float8_equals_onnxruntime(check_model, to: int, saturate: int, source: int):
    nodes = [
        cast_node("x", "a", source),
        cast_node("a", "b", to, saturate=saturate),
        cast_node("b", "y", TensorProto.FLOAT),
    ]
    # Not saturating, onnxruntime makes 448 of 480 and NaN of 61440, where ONNX says NaN and Inf.
    x = NUMBERS if saturate else np.setdiff1d(NUMBERS, [480, 61440])
    check_model(nodes, {"x": x}, {"y": TensorProto.FLOAT}, 19)


@given(x=arrays(np.float32, 50, elements=st.floats(width=32)))
def test_float8_without_saturation_equals_ml_dtypes(x: np.ndarray) -> None:
    for data_type, dtype in FLOATS8:
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = x.astype(dtype).astype(np.float32)
        got = to_float8(torch.from_numpy(x), data_type, saturate=False).float().numpy()
        np.testing.assert_array_equal(got, wanted)


@given(x=arrays(np.float32, 50, elements=st.floats(width=32)))
def test_float4_and_float6_equal_ml_dtypes(x: np.ndarray) -> None:
    for data_type, dtype in (
        (TensorProto.FLOAT4E2M1, ml_dtypes.float4_e2m1fn),
        (TensorProto.FLOAT6E2M3, ml_dtypes.float6_e2m3fn),
        (TensorProto.FLOAT6E3M2, ml_dtypes.float6_e3m2fn),
    ):
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = x.astype(dtype).astype(np.float32)
        got = convert(torch.from_numpy(x), data_type).numpy()
        np.testing.assert_array_equal(got, wanted)
        number = ~np.isnan(x)  # NaN becomes a zero, whose sign is of no account
        np.testing.assert_array_equal(np.signbit(got)[number], np.signbit(wanted)[number])


@pytest.mark.parametrize("round_mode", ["up", "down", "nearest"])
@pytest.mark.parametrize("saturate", [0, 1])
def test_cast_to_e8m0_equals_onnxruntime(check_model, round_mode: str, saturate: int) -> None:
    powers = np.array([2.0**-149, 2.0**-127, 1.5 * 2.0**-127, 2.0**127, 1.6 * 2.0**127])
    x = np.concatenate((NUMBERS, powers)).astype(np.float32)
    nodes = [
        cast_node("x", "a", TensorProto.FLOAT8E8M0, round_mode=round_mode, saturate=saturate),
        cast_node("a", "y", TensorProto.FLOAT),
    ]
    check_model(nodes, {"x": x}, {"y": TensorProto.FLOAT}, 25)


WORDS = ["1", "-7", "1e5", " 2.5", "INF", "+inf", "-INF", "NaN", "nan", "0.1"]


@pytest.mark.parametrize(
    "to", [TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16]
)
def test_text_to_floats_equals_onnxruntime(check_model, to: int) -> None:
    nodes = [cast_node("x", "a", to), cast_node("a", "y", TensorProto.DOUBLE)]
    check_model(nodes, {"x": np.array(WORDS, object)}, {"y": TensorProto.DOUBLE}, 13)


@pytest.mark.parametrize("to", [*INTEGERS, TensorProto.BOOL])
def test_text_to_integers_equals_onnxruntime(check_model, to: int) -> None:
    words = np.array([["1", "0", "300"], ["70000", " 4", "2.5"]], object)
    check_model([cast_node("x", "y", to)], {"x": words}, {"y": to}, 13)


def test_largest_integers_survive_text(check_model) -> None:
    node = [cast_node("x", "y", TensorProto.UINT64)]
    words = np.array(["18446744073709551615"], object)
    check_model(node, {"x": words}, {"y": TensorProto.UINT64}, 13)


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, np.int8, np.int64, np.uint16, np.bool_]
)
def test_numbers_to_text_equal_onnxruntime(check_model, dtype: type) -> None:
    numbers = [1 / 3, 0.1, 1e5, 123456789.0, 5.0, 0.0, -0.0, 1e-7, 1e22, np.nan, np.inf, -np.inf]
    if not np.issubdtype(dtype, np.floating):
        numbers = [0, 1, 100]
    with np.errstate(over="ignore"):
        x = np.array(numbers).astype(dtype)
    node = [cast_node("x", "y", TensorProto.STRING)]
    check_model(node, {"x": x}, {"y": TensorProto.STRING}, 13)


@pytest.mark.parametrize("to", [TensorProto.FLOAT, TensorProto.INT32])
def test_words_that_are_no_number_are_refused(to: int) -> None:
    with pytest.raises(InputError, match="cannot cast text to a number"):
        cast(np.array(["one"], object), to=to)


def test_cast_like_takes_the_type_of_its_second_input() -> None:
    x = torch.tensor([1.4, -3.0, 9.0])
    assert cast_like(x, torch.ones(1, dtype=torch.float8_e5m2)).dtype == torch.float8_e5m2
    # An int4 travels as int8: only the type that inference found tells.
    like_int4 = cast_like(x, torch.ones(1, dtype=torch.int8), element_type=TensorProto.INT4)
    assert like_int4.tolist() == [1, -3, -7]
    assert cast_like(x, np.array(["text"], object)).tolist() == ["1.4", "-3", "9"]


CODES = np.arange(256, dtype=np.uint8)


def test_bit_cast_keeps_every_pattern() -> None:
    codes = torch.from_numpy(CODES)
    for data_type, dtype in FLOATS8:
        wanted = CODES.view(dtype).astype(np.float32)
        got = bit_cast(codes, to=data_type)
        np.testing.assert_array_equal(got.float().numpy(), wanted)
        assert torch.equal(bit_cast(got, to=TensorProto.UINT8), codes)


def test_bit_cast_of_four_bits_equals_ml_dtypes() -> None:
    nibbles = np.arange(16, dtype=np.uint8)
    codes = torch.from_numpy(nibbles)
    for data_type, dtype in (
        (TensorProto.INT4, ml_dtypes.int4),
        (TensorProto.FLOAT4E2M1, ml_dtypes.float4_e2m1fn),
    ):
        got = bit_cast(codes, to=data_type)
        np.testing.assert_array_equal(got.numpy(), nibbles.view(dtype).astype(np.float32))
        assert torch.equal(bit_cast(got, to=TensorProto.UINT4), codes)


@pytest.mark.parametrize(
    ("dtype", "to"),
    [
        (np.float32, TensorProto.INT32),
        (np.float64, TensorProto.INT64),
        (np.int16, TensorProto.FLOAT16),
        (np.bool_, TensorProto.UINT8),
        (np.int64, TensorProto.UINT64),
    ],
)
def test_bit_cast_equals_the_oracle(check, dtype: type, to: int) -> None:
    check("BitCast", 26, [np.array([[0, 1], [1, 3]]).astype(dtype)], {"to": to})


def test_bit_cast_refuses_another_width() -> None:
    with pytest.raises(UnsupportedOpError, match="the widths must be equal"):
        bit_cast(torch.ones(2), to=TensorProto.INT64)


def test_a_cast_between_floats_has_a_gradient() -> None:
    x = torch.ones(3, requires_grad=True)
    cast(x, to=TensorProto.DOUBLE).sum().backward()
    assert torch.equal(x.grad, torch.ones(3))
