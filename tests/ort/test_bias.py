"""Biases as int32 codes, and the scales that they need."""

import logging

import numpy as np
import pytest
from base_quantizer_pairs import (
    FLOAT8,
    assert_same_initializers,
    conv_relu,
    made,
    pair,
)
from onnx import TensorProto

from qwrap.ort.numbers.bias import bias_codes, bias_scale, weight_scale_for_bias


@pytest.mark.ort(217)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("channels", [1, 4])
def test_a_bias_becomes_the_incumbents_codes(dtype: type, channels: int) -> None:
    ours, theirs = pair(conv_relu(dtype))
    # of float16 in numbers whose product is a normal one
    scales = (np.array(0.25, dtype), (np.arange(1, channels + 1) / 128).astype(dtype))
    scales = (scales[0], scales[1][0] if channels == 1 else scales[1])
    found = [q.quantize_bias_static_impl("b", *scales) for q in (ours, theirs)]
    assert found[0][:3] == ("b_quantized", "b_quantized_scale", "b_quantized_zero_point")
    assert found[0][:3] + found[0][4:] == found[1][:3] + found[1][4:]
    assert_same_initializers(ours, theirs)


@pytest.mark.ort(217)
def test_a_bias_worked_by_hand() -> None:
    ours, _ = pair(conv_relu(b=np.array([0.5, -0.25, 3, 0.375], np.float32)))
    ours.quantize_bias_static_impl("b", np.float32(0.5), np.array([1, 1, 2, 0.5], np.float32))
    assert made(ours, "b_quantized").tolist() == [1, 0, 3, 2]  # 1.5 goes to 2, -0.5 to 0
    assert made(ours, "b_quantized_scale").tolist() == [0.5, 0.5, 1.0, 0.25]
    assert made(ours, "b_quantized_zero_point").tolist() == [0, 0, 0, 0]


@pytest.mark.ort(217)
def test_a_bias_that_leaves_int32_is_cut_with_a_warning(caplog) -> None:
    ours, _ = pair(conv_relu(b=np.array([1e6, -1e6, 1, 0], np.float32)))
    with caplog.at_level(logging.WARNING):
        ours.quantize_bias_static_impl("b", np.float32(1e-3), np.float32(1e-3))
    assert "Quantized bias `b` exceeds the range of a int32" in caplog.text
    assert made(ours, "b_quantized").tolist() == [2**31 - 1, -(2**31), 1_000_000, 0]


@pytest.mark.ort(48, 217)
def test_a_bias_beside_float8_stays_float() -> None:
    ours, theirs = pair(conv_relu(), FLOAT8, FLOAT8)
    found = [q.quantize_bias_static_impl("b", np.float32(1), np.float32(1)) for q in (ours, theirs)]
    assert found[0][4:] == found[1][4:] == ("Cast", TensorProto.FLOAT)
    assert_same_initializers(ours, theirs)


@pytest.mark.ort(217, "G1")
def test_beta_multiplies_the_bias_and_not_its_scale() -> None:
    """The incumbent multiplies the scale by it, so that codes times scale give the bias without."""
    b = np.array([1, 2, 3, 4], np.float32)
    ours, theirs = pair(conv_relu(b=b))
    for quantizer in (ours, theirs):
        quantizer.quantize_bias_static_impl("b", np.float32(0.5), np.float32(0.125), 2.0)
    assert (made(ours, "b_quantized") * made(ours, "b_quantized_scale") == 2 * b).all()
    assert (made(theirs, "b_quantized") * made(theirs, "b_quantized_scale") == b).all()


@pytest.mark.ort(183, 217, "G43")
def test_scales_of_a_grouped_convtranspose_repeat() -> None:
    """Its weight has the outputs of one group as channels; the incumbent cannot broadcast them."""
    model = conv_relu(b=np.ones(4, np.float32))
    ours, theirs = pair(model)
    scales = np.array([0.5, 0.25], np.float32)
    ours.quantize_bias_static_impl("b", np.float32(1), scales)
    assert made(ours, "b_quantized").tolist() == [2, 4, 2, 4]
    with pytest.raises(ValueError, match="broadcast"):
        theirs.quantize_bias_static_impl("b", np.float32(1), scales)
    with pytest.raises(ValueError, match="4 elements beside a weight of 3 channels"):
        bias_scale(np.ones(4, np.float32), np.float32(1), np.ones(3, np.float32))


@pytest.mark.ort(49, 217)
def test_a_bias_of_float16_keeps_a_scale_above_zero() -> None:
    """The product of two scales leaves float16; the incumbent divides by 0."""
    bias = np.array([0.5, -0.25], np.float16)
    scale = bias_scale(bias, np.float16(1e-4), np.float16(1e-4))
    codes, outside = bias_codes(bias, scale)
    assert not outside
    assert np.abs(codes * scale.astype(np.float32) - bias).max() <= scale.max() / 2


@pytest.mark.ort(217)
def test_a_bias_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        bias_codes(np.array([np.nan], np.float32), np.ones(1, np.float32))


@pytest.mark.ort(218, "G27")
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_scales_of_a_weight_grow_until_the_bias_fits(channels: int) -> None:
    """In QDQ form the incumbent does so for symmetric signed weights only."""
    bias = np.array([1e6, -2e6, 1.0, 3e6], np.float32)
    weight = np.full(channels, 1e-4, np.float32) if channels > 1 else np.float32(1e-4)
    scale = weight_scale_for_bias(bias, np.float32(1e-3), weight)
    assert scale is not None
    codes, outside = bias_codes(bias, bias_scale(bias, np.float32(1e-3), scale))
    assert not outside
    assert np.abs(codes).max() > 2**30
    if channels == 4:
        assert scale[2] == np.float32(1e-4)  # this one fitted
    assert weight_scale_for_bias(bias, np.float32(1), np.float32(1)) is None


@pytest.mark.ort(49, 218)
def test_scales_of_float16_grow_enough() -> None:
    """Rounded down to float16, a scale would lose more than the slack."""
    bias = np.array([3e4], np.float16)
    for step in np.geomspace(1e-4, 1e-2, 40):
        scale = weight_scale_for_bias(bias, np.float16(6e-5), np.float16(step))
        if scale is not None:
            wanted = 3e4 / (2**31 - 1)
            assert float(scale) * float(np.float16(6e-5)) >= wanted
            assert float(scale) * float(np.float16(6e-5)) <= wanted * 1.003
