"""Scales, zero points and codes, against onnxruntime's tool and formulas worked by hand."""

import time

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import onnx
import onnxruntime.quantization.quant_utils as incumbent
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto, helper, numpy_helper

from qwrap.ort import quant_utils
from qwrap.ort.errors import InvalidModelError, QuantizationError

INTEGERS = (
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT16,
    TensorProto.UINT16,
    TensorProto.INT4,
    TensorProto.UINT4,
)
FLOAT8 = TensorProto.FLOAT8E4M3FN
finite32 = st.floats(-1e6, 1e6, width=32)
finite16 = st.floats(-1024, 1024, width=16)
values32 = arrays(np.float32, array_shapes(min_dims=1, max_dims=3), elements=finite32)
values16 = arrays(np.float16, array_shapes(min_dims=1, max_dims=3), elements=finite16)
booleans = st.booleans()
onnx_types = st.sampled_from(INTEGERS)


def same(ours, theirs) -> bool:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return (
        ours.dtype == theirs.dtype
        and ours.shape == theirs.shape
        and ours.tobytes() == theirs.tobytes()
    )


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


@pytest.mark.ort(118)
def test_ties_go_to_the_even_code() -> None:
    ties = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 300], np.float32)
    codes = quant_utils.quantize_nparray(TensorProto.INT8, ties, np.float32(1), np.int8(0))
    assert codes.tolist() == [0, 2, 2, 0, -2, 127]


@pytest.mark.ort(118, 44, 45, 46, 47)
@given(x=values32 | values16, onnx_type=onnx_types, zero=st.integers(0, 7), data=st.data())
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
@settings(max_examples=25)  # the incumbent builds a model for each array
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


@pytest.mark.ort(48, 119)
@given(std=finite32.filter(lambda v: v > 0))
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


@pytest.mark.ort(48)
@pytest.mark.parametrize("constant", [0.0, 0.1, -3.0])
def test_one_number_only_is_kept_by_float8(constant: float) -> None:
    """It has no spread: the incumbent divides by 0, or by a rounding error."""
    data = np.full(7, constant, np.float32)
    _, scale, codes = quant_utils.quantize_data(data, FLOAT8, True)
    assert (codes.astype(np.float32) * scale == data).all()


@pytest.mark.ort(121)
@given(x=values32 | values16, onnx_type=onnx_types, symmetric=booleans, reduced=booleans)
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


@pytest.mark.ort(120)
@given(
    x=arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 5)), elements=finite32)
    | arrays(np.float16, (5, 3), elements=st.floats(16, 1024, width=16)),
    onnx_type=onnx_types,
    axis=st.integers(0, 1),
    block_size=st.integers(1, 6),
    symmetric=st.booleans(),
)
def test_scales_of_blocks_are_the_incumbents(x, onnx_type, axis, block_size, symmetric) -> None:
    arguments = (x, onnx_type, axis, block_size, symmetric)
    ours = quant_utils.compute_scale_zp_blocked(*arguments)
    theirs = incumbent.compute_scale_zp_blocked(*arguments)
    assert all(map(same, ours, theirs))


@pytest.mark.ort(120)
def test_blocks_of_five_by_three_worked_by_hand() -> None:
    weight = np.array([[1, 0, -7], [-7, 0, 1], [2, 0, 3.5], [3.5, 0, 2], [0.7, 0, 1.4]], np.float32)
    zeros, scales = quant_utils.compute_scale_zp_blocked(weight, TensorProto.INT4, 0, 2, True)
    assert scales.shape == zeros.shape == (3, 3)
    steps = np.array([[14, 15, 14], [7, 15, 7], [1.4, 15, 2.8]]) / 15  # 15 steps: -8 to 7
    np.testing.assert_array_equal(scales, steps.astype(np.float32))
    assert not zeros.astype(int).any()


@pytest.mark.ort(69, 120, 121, "G48")
@pytest.mark.parametrize("shape", [(7,), (4, 6), (3, 5, 2), (2, 3, 5, 5)])
@pytest.mark.parametrize("onnx_type", [TensorProto.INT8, TensorProto.UINT4, TensorProto.INT16])
def test_blocks_run_along_any_axis_of_any_rank(shape, onnx_type: int) -> None:
    """The incumbent has rank 2 only; the ONNX reference tells what the codes mean."""
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for axis in range(-len(shape), len(shape)):
        zero, scale = quant_utils.compute_scale_zp_blocked(weight, onnx_type, axis, 2, False)
        made = quant_utils.quantize_onnx_initializer(
            numpy_helper.from_array(weight, "w"), onnx_type, zero, scale, axis, block_size=2
        )
        back = dequantized(made, zero, scale, axis, 2)
        steps = np.repeat(scale, 2, axis).take(range(shape[axis]), axis)
        # half a step; a float32 quotient of 2**15 steps is itself rounded to 0.004 of one
        assert (np.abs(back - weight) <= steps * 0.505).all()
    if len(shape) != 2:
        with pytest.raises(NotImplementedError, match="rank-2"):
            incumbent.compute_scale_zp_blocked(weight, onnx_type, 0, 2, False)


def dequantized(codes: TensorProto, zero, scale, axis: int, block_size: int) -> np.ndarray:
    node = helper.make_node(
        "DequantizeLinear", ["q", "s", "z"], ["y"], axis=axis, block_size=block_size
    )
    codes.name = "q"
    zero_point = helper.make_tensor("z", codes.data_type, zero.shape, zero.reshape(-1).tolist())
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [codes, numpy_helper.from_array(scale, "s"), zero_point]
    graph = helper.make_graph([node], "g", [], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    return onnx.reference.ReferenceEvaluator(model).run(None, {})[0]


@pytest.mark.ort(120)
def test_blocks_that_cannot_be_are_refused() -> None:
    weight = np.ones((4, 4), np.float32)
    with pytest.raises(QuantizationError, match="axis 2"):
        quant_utils.compute_scale_zp_blocked(weight, TensorProto.INT8, 2, 2, True)
    with pytest.raises(QuantizationError, match="0 elements"):
        quant_utils.compute_scale_zp_blocked(weight, TensorProto.INT8, 0, 0, True)
    weight[0] = np.nan
    with pytest.raises(QuantizationError, match="NaN"):
        quant_utils.compute_scale_zp_blocked(weight, TensorProto.INT8, 0, 2, True)


@pytest.mark.ort(121, 47, 10)
@pytest.mark.parametrize("onnx_type", [*INTEGERS, FLOAT8])
@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_quantized_initializers_are_the_incumbents(onnx_type, kind, dtype) -> None:
    if (onnx_type, kind) == (FLOAT8, "block"):
        pytest.skip("float 8 has no ranges")
    data = (np.random.default_rng(1).normal(size=(5, 3)) * 8).astype(dtype)
    weight = numpy_helper.from_array(data, "w")
    axis, block_size = {"tensor": (None, 0), "channel": (1, 0), "block": (0, 2)}[kind]
    if kind == "block":
        zero, scale = incumbent.compute_scale_zp_blocked(data, onnx_type, 0, 2, False)
    elif kind == "channel":
        pairs = [incumbent.compute_data_quant_params(c, onnx_type, False) for c in data.T]
        zero, scale = (np.array(values) for values in zip(*pairs, strict=True))
    else:
        zero, scale = incumbent.compute_data_quant_params(data, onnx_type, False)
    arguments = (weight, onnx_type, zero, scale, axis, None, block_size)
    ours = quant_utils.quantize_onnx_initializer(*arguments)
    theirs = incumbent.quantize_onnx_initializer(*arguments)
    assert ours == theirs
    assert ours.name == "w_quantized"
    assert len(ours.raw_data) == (
        8
        if onnx_type in INTEGERS[4:]
        else 15 * (1 + ("16" in str(numpy_helper.to_array(ours).dtype)))
    )


@pytest.mark.ort(121)
def test_scales_that_do_not_fit_are_refused() -> None:
    weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    zero, scale = np.zeros(4, np.int8), np.ones(4, np.float32)
    with pytest.raises(ValueError, match="4 scales along axis 1"):
        quant_utils.quantize_onnx_initializer(weight, TensorProto.INT8, zero, scale, axis=1)
    with pytest.raises(ValueError, match="blocks of 2"):
        quant_utils.quantize_onnx_initializer(
            weight, TensorProto.INT8, zero, scale, axis=0, block_size=2
        )
    nan = numpy_helper.from_array(np.array([np.nan], np.float32), "w")
    with pytest.raises(InvalidModelError, match="NaN"):
        quant_utils.quantize_onnx_initializer(nan, FLOAT8, np.array(0), np.float32(1))


@pytest.mark.ort(126, 47)
@given(codes=st.binary(max_size=33))
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


def elapsed(function, *arguments, times: int) -> float:
    """Return the shortest of some runs, in seconds."""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        function(*arguments)
        took.append(time.perf_counter() - start)
    return min(took)


@pytest.mark.ort(126)
@pytest.mark.parametrize("axis", range(-4, 4))
def test_axes_are_counted_from_the_front(axis: int) -> None:
    assert quant_utils.normalize_axis(axis, 3) == incumbent.normalize_axis(axis, 3)
