"""Scales and zero points, against onnxruntime's tool and formulas worked by hand."""

import hypothesis.strategies as st
import numpy as np
import onnxruntime.quantization.quant_utils as incumbent
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from numbers_of_codes import FLOAT8, INTEGERS, booleans, finite32, onnx_types, same
from onnx import TensorProto

from qwrap.ort import quant_utils
from qwrap.ort.numbers.weight_params import channel_params


@pytest.mark.ort(113)
@pytest.mark.parametrize(
    ("onnx_type", "low", "high"),
    list(zip(INTEGERS, (-128, 0, -32768, 0, -8, 0), (127, 255, 32767, 65535, 7, 15), strict=True)),
)
def test_codes_span_their_type(onnx_type: int, low: int, high: int) -> None:
    qmin, qmax = quant_utils.get_qmin_qmax_for_qType(onnx_type)
    assert (int(qmin), int(qmax)) == (low, high)


@pytest.mark.ort(113, 114, 11)
@pytest.mark.parametrize("onnx_type", INTEGERS)
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_of_codes_are_the_incumbents(onnx_type: int, reduced: bool, symmetric: bool) -> None:
    ours = quant_utils.get_qmin_qmax_for_qType(onnx_type, reduced, symmetric)
    theirs = incumbent.get_qmin_qmax_for_qType(onnx_type, reduced, symmetric)
    assert all(map(same, ours, theirs))


@pytest.mark.ort(113)
def test_ranges_of_float8_and_of_no_codes_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="float 8"):
        quant_utils.get_qmin_qmax_for_qType(FLOAT8)
    with pytest.raises(ValueError, match="Unexpected data type 7"):
        quant_utils.get_qmin_qmax_for_qType(TensorProto.INT64)


@pytest.mark.ort(126, "G30")
@pytest.mark.parametrize("onnx_type", INTEGERS)
def test_a_range_of_signed_codes_does_not_overflow(onnx_type: int) -> None:
    """The incumbent subtracts in int8, and gets -1 for 255."""
    qmin, qmax = quant_utils.get_qmin_qmax_for_qType(onnx_type)
    assert quant_utils.get_qrange_for_qType(onnx_type) == int(qmax) - int(qmin)
    with np.errstate(over="ignore"):
        assert incumbent.get_qrange_for_qType(TensorProto.INT8) == -1


@pytest.mark.ort(115, 116, 67)
@given(
    ends=st.tuples(finite32, finite32),
    onnx_type=onnx_types,
    symmetric=st.booleans(),
    least=st.none() | st.floats(0, 10, width=32),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@settings(deadline=None)
def test_scales_and_zero_points_have_the_incumbents_bits(
    ends, onnx_type, symmetric, least, dtype
) -> None:
    low, high = (np.array(end, dtype) for end in sorted(ends))
    codes = incumbent.get_qmin_qmax_for_qType(onnx_type, symmetric=symmetric)
    ours = quant_utils.compute_scale_zp(low, high, *codes, symmetric, least)
    theirs = incumbent.compute_scale_zp(low, high, *codes, symmetric, least)
    assert all(map(same, ours, theirs))


@pytest.mark.ort(115)
@given(
    x=arrays(np.float32, (2, 7), elements=finite32), onnx_type=onnx_types, symmetric=st.booleans()
)
@settings(deadline=None)
def test_scales_of_many_ranges_are_those_of_each(x, onnx_type, symmetric) -> None:
    low, high = x.min(0), x.max(0)
    codes = quant_utils.get_qmin_qmax_for_qType(onnx_type, symmetric=symmetric)
    zeros, scales = quant_utils.compute_scale_zp(low, high, *codes, symmetric)
    for i in range(7):
        theirs = incumbent.compute_scale_zp(low[i], high[i], *codes, symmetric)
        assert same(zeros[i], theirs[0])
        assert same(scales[i], theirs[1])


@pytest.mark.ort(115)
def test_an_asymmetric_range_worked_by_hand() -> None:
    codes = quant_utils.get_qmin_qmax_for_qType(TensorProto.UINT8)
    zero, scale = quant_utils.compute_scale_zp(np.float32(-1), np.float32(3), *codes)
    assert scale == np.float32(4 / 255)
    assert zero == 64  # 1 / (4 / 255) is 63.75


@pytest.mark.ort(116)
@pytest.mark.parametrize(
    ("onnx_type", "zero"), list(zip(INTEGERS, (0, 128, 0, 32768, 0, 8), strict=True))
)
def test_a_symmetric_range_has_the_middle_code_for_zero(onnx_type: int, zero: int) -> None:
    codes = quant_utils.get_qmin_qmax_for_qType(onnx_type, symmetric=True)
    found, scale = quant_utils.compute_scale_zp(np.float32(-1), np.float32(3), *codes, True)
    assert found == zero
    assert scale == np.float32(6 / (int(codes[1]) - int(codes[0])))


@pytest.mark.ort(117)
def test_a_range_of_no_width_has_scale_one() -> None:
    codes = quant_utils.get_qmin_qmax_for_qType(TensorProto.INT8)
    zeros = np.zeros(4, np.float32)
    zero, scale = quant_utils.compute_data_quant_params(zeros, TensorProto.INT8, False)
    assert (int(zero), float(scale)) == (0, 1.0)
    assert all(
        map(
            same,
            quant_utils.compute_scale_zp(zeros[0], np.float32(1e-40), *codes),
            incumbent.compute_scale_zp(zeros[0], np.float32(1e-40), *codes),
        )
    )


@pytest.mark.ort(49, 125)
def test_small_weights_of_float16_do_not_vanish() -> None:
    """The incumbent gives them scale 1, with which all of them become 0."""
    weight = np.array([-0.004, 0.001, 0.004], np.float16)
    _, scale, codes = quant_utils.quantize_data(weight, TensorProto.INT8, True)
    assert scale.dtype == np.float16
    assert np.abs(codes * scale.astype(np.float32) - weight).max() <= float(scale) / 2
    assert not incumbent.quantize_data(weight, TensorProto.INT8, True)[2].any()


@pytest.mark.ort(122)
@pytest.mark.parametrize(("qmin", "qmax"), [(1, 255), (-128, -1)])
def test_codes_without_zero_are_refused(qmin: int, qmax: int) -> None:
    with pytest.raises(ValueError, match="qmin <= 0 <= qmax"):
        quant_utils.compute_scale_zp(np.float32(0), np.float32(1), np.int16(qmin), np.int16(qmax))


@pytest.mark.ort("G35", 134)
@pytest.mark.parametrize("ends", [(-1.0, 3.0), (-1, 3), (np.float32(-1), 3.0)])
def test_python_numbers_are_ranges_too(ends: tuple[float, float]) -> None:
    """The incumbent asks them for their ``dtype``: AttributeError."""
    codes = quant_utils.get_qmin_qmax_for_qType(TensorProto.UINT8)
    expected = quant_utils.compute_scale_zp(np.float32(-1), np.float32(3), *codes)
    assert all(map(same, quant_utils.compute_scale_zp(*ends, *codes), expected))
    with pytest.raises(AttributeError, match="dtype"):
        incumbent.compute_scale_zp(-1.0, 3.0, *codes)


@pytest.mark.ort(115)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_range_that_is_not_finite_is_refused(bad: float) -> None:
    codes = quant_utils.get_qmin_qmax_for_qType(TensorProto.UINT8)
    with pytest.raises(ValueError, match="not finite"):
        quant_utils.compute_scale_zp(np.float32(0), np.float32(bad), *codes)


@pytest.mark.ort(53)
@given(
    ends=st.tuples(finite32, finite32),
    codes=st.sampled_from([(0, 255), (0, 127)]),
    least=st.none() | st.floats(0, 10, width=32),
)
@settings(deadline=None)
def test_restricted_zero_points_are_the_incumbents(ends, codes, least) -> None:
    low, high = (np.float32(end) for end in sorted(ends))
    ours = quant_utils.snap_zero_point_to_uint8(low, high, *codes, least)
    theirs = incumbent.snap_zero_point_to_uint8(low, high, *codes, least)
    assert all(map(same, ours, theirs))


@pytest.mark.ort(53, 125, "G42")
def test_a_restricted_scale_of_float16_is_a_float16() -> None:
    """The incumbent writes float32 scales beside float16 tensors; sessions refuse the model."""
    ends = np.float16(-1), np.float16(2)
    assert quant_utils.snap_zero_point_to_uint8(*ends)[1].dtype == np.float16
    assert incumbent.snap_zero_point_to_uint8(*ends)[1].dtype == np.float32


@pytest.mark.ort(48, 119)
@given(std=finite32.filter(lambda v: v > 0))
@settings(deadline=None)
def test_the_scale_of_float8_is_a_ratio_of_spreads(std) -> None:
    ours = quant_utils.compute_scale_zp_float8(FLOAT8, np.float32(std))
    theirs = incumbent.compute_scale_zp_float8(FLOAT8, np.float32(std))
    assert all(map(same, ours, theirs))


@pytest.mark.ort(119)
def test_what_float8_cannot_do_is_refused() -> None:
    data = np.array([1.0, np.nan], np.float32)
    with pytest.raises(RuntimeError, match="look for NaN"):
        quant_utils.quantize_data(data, FLOAT8, True)
    with pytest.raises(RuntimeError, match="Unsupported option reduce_range=True for float 8"):
        quant_utils.quantize_data(np.ones(2, np.float32), FLOAT8, True, reduce_range=True)
    with pytest.raises(ValueError, match="not implemented"):
        quant_utils.compute_scale_zp_float8(TensorProto.FLOAT8E5M2, np.float32(1))


@pytest.mark.ort(10, 115, 116, 121)
@given(
    x=arrays(np.float32, array_shapes(min_dims=1, max_dims=3), elements=finite32),
    onnx_type=onnx_types,
    symmetric=booleans,
    reduced=booleans,
    data=st.data(),
)
@settings(deadline=None)
def test_scales_of_channels_have_the_incumbents_bits(
    x, onnx_type, symmetric, reduced, data
) -> None:
    axis = data.draw(st.integers(0, x.ndim - 1))
    settings_ = {"symmetric": symmetric, "reduce_range": reduced}
    zeros, scales = channel_params(x, onnx_type, axis, [], **settings_)
    for i in range(x.shape[axis]):
        channel = np.atleast_1d(x.take(i, axis))
        zero, scale = incumbent.compute_data_quant_params(channel, onnx_type, **settings_)
        assert same(scales[i], scale)
        assert same(zeros[i], zero) or (symmetric and scale == 1)  # all are equal there
