"""Codes of arrays, against onnxruntime's tool."""

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import onnxruntime.quantization.quant_utils as incumbent
import pytest
from hypothesis import given, settings
from numbers_of_codes import (
    FLOAT8,
    INTEGERS,
    booleans,
    elapsed,
    onnx_types,
    same,
    values16,
    values32,
)
from onnx import TensorProto, numpy_helper

from qwrap.ort import quant_utils


@pytest.mark.ort(118)
def test_ties_go_to_the_even_code() -> None:
    ties = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 300], np.float32)
    codes = quant_utils.quantize_nparray(TensorProto.INT8, ties, np.float32(1), np.int8(0))
    assert codes.tolist() == [0, 2, 2, 0, -2, 127]


@pytest.mark.ort(118, 44, 45, 46, 47)
@given(x=values32 | values16, onnx_type=onnx_types, zero=st.integers(0, 7), data=st.data())
@settings(deadline=None)
def test_codes_are_the_incumbents(x, onnx_type, zero, data) -> None:
    scale = np.array(data.draw(st.floats(2**-6, 100, width=16)), x.dtype)
    zero_point = np.array(zero, incumbent.ONNX_TYPE_TO_NP_TYPE[onnx_type])
    low, high = data.draw(st.sampled_from([(None, None), (0, 5)]))
    ours = quant_utils.quantize_nparray(onnx_type, x, scale, zero_point, low, high)
    theirs = incumbent.quantize_nparray(onnx_type, x, scale, zero_point, low, high)
    assert same(ours, theirs)


@pytest.mark.ort(118)
def test_nan_has_no_code() -> None:
    with pytest.raises(ValueError, match="NaN"):
        quant_utils.quantize_nparray(
            TensorProto.INT8, np.array([np.nan], np.float32), np.float32(1), np.int8(0)
        )
    with pytest.raises(ValueError, match="Unexpected data type 1 requested"):
        quant_utils.quantize_nparray(TensorProto.FLOAT, np.ones(1, np.float32), 1.0, 0)


@pytest.mark.ort(48, 119)
@given(x=values32 | values16, scale=st.floats(2**-6, 100, width=16))
@settings(max_examples=25, deadline=None)  # the incumbent builds a model for each array
def test_codes_of_float8_are_the_incumbents(x, scale) -> None:
    scale, zero = np.array(scale, x.dtype), np.array(0, ml_dtypes.float8_e4m3fn)
    ours = quant_utils.quantize_nparray(FLOAT8, x, scale, zero)
    assert same(ours, incumbent.quantize_nparray(FLOAT8, x, scale, zero))


@pytest.mark.ort(119)
def test_codes_of_float8_saturate_and_have_no_zero_point() -> None:
    x = np.array([1e5, -1e5, 465.0], np.float32)
    zero = np.array(0, ml_dtypes.float8_e4m3fn)
    codes = quant_utils.quantize_nparray(FLOAT8, x, np.float32(1), zero)
    assert codes.astype(np.float32).tolist() == [448, -448, 448]
    with pytest.raises(NotImplementedError, match="null for float 8"):
        quant_utils.quantize_nparray(FLOAT8, x, np.float32(1), np.int8(1))


@pytest.mark.ort(48)
@pytest.mark.parametrize("constant", [0.0, 0.1, -3.0])
def test_one_number_only_is_kept_by_float8(constant: float) -> None:
    """It has no spread: the incumbent divides by 0, or by a rounding error."""
    data = np.full(7, constant, np.float32)
    _, scale, codes = quant_utils.quantize_data(data, FLOAT8, True)
    assert (codes.astype(np.float32) * scale == data).all()


@pytest.mark.ort(121)
@given(x=values32 | values16, onnx_type=onnx_types, symmetric=booleans, reduced=booleans)
@settings(deadline=None)
def test_quantized_data_has_the_incumbents_bits(x, onnx_type, symmetric, reduced) -> None:
    if x.dtype == np.float16:
        x[..., 0] = 100  # small scales of float16 differ on purpose
    ours = quant_utils.quantize_data(x, onnx_type, symmetric, reduced)
    theirs = incumbent.quantize_data(x, onnx_type, symmetric, reduced)
    assert all(map(same, ours, theirs))


@pytest.mark.ort(121, 67)
def test_ends_of_a_range_are_replaced_and_widened() -> None:
    x = np.linspace(-1, 1, 9, dtype=np.float32)
    for settings_ in ({"rmin_override": -2.0}, {"rmax_override": 5.0}, {"min_real_range": 10.0}):
        ours = quant_utils.compute_data_quant_params(x, TensorProto.UINT8, False, **settings_)
        theirs = incumbent.compute_data_quant_params(x, TensorProto.UINT8, False, **settings_)
        assert all(map(same, ours, theirs))


@pytest.mark.ort(121)
def test_data_must_be_an_array_and_codes_of_a_type() -> None:
    with pytest.raises(TypeError, match="given as an array"):
        quant_utils.compute_data_quant_params([1.0], TensorProto.INT8, True)
    with pytest.raises(ValueError, match="qType=1"):
        quant_utils.quantize_data(np.ones(2, np.float32), TensorProto.FLOAT, True)


@pytest.mark.ort(127)
@pytest.mark.parametrize("onnx_type", [*INTEGERS, FLOAT8])
def test_no_data_has_scale_one(onnx_type: int) -> None:
    zero, scale, codes = quant_utils.quantize_data(np.zeros((0,), np.float32), onnx_type, True)
    assert (float(zero), float(scale), codes.size) == (0.0, 1.0, 0)


@pytest.mark.ort(126, 47)
@given(codes=st.binary(max_size=33))
@settings(deadline=None)
def test_packed_codes_are_the_incumbents(codes: bytes) -> None:
    assert quant_utils.pack_bytes_to_4bit(codes) == incumbent.pack_bytes_to_4bit(codes)


@pytest.mark.ort("G62", 126)
def test_millions_of_codes_are_packed_in_a_second() -> None:
    """The incumbent packs byte by byte, and quantizes block by block and column by column."""
    codes = np.random.default_rng(2).integers(0, 16, 500_000, np.uint8).tobytes()
    ours, theirs = elapsed(quant_utils.pack_bytes_to_4bit, codes, times=5), 0.0
    theirs = elapsed(incumbent.pack_bytes_to_4bit, codes, times=1)
    assert ours < theirs / 20
    weight = np.random.default_rng(3).normal(size=(256, 64)).astype(np.float32)
    zero, scale = quant_utils.compute_scale_zp_blocked(weight, TensorProto.INT8, 0, 16, True)
    tensor = numpy_helper.from_array(weight, "w")
    arguments = (tensor, TensorProto.INT8, zero, scale, 0, "q", 16)
    ours = elapsed(quant_utils.quantize_onnx_initializer, *arguments, times=5)
    assert ours < elapsed(incumbent.quantize_onnx_initializer, *arguments, times=1) / 5


@pytest.mark.ort(126)
@pytest.mark.parametrize("axis", range(-4, 4))
def test_axes_are_counted_from_the_front(axis: int) -> None:
    assert quant_utils.normalize_axis(axis, 3) == incumbent.normalize_axis(axis, 3)
