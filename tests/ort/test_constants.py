"""Constants as codes, per tensor and per channel, beside the incumbent's."""

import numpy as np
import onnxruntime.quantization.base_quantizer as incumbent
import pytest
from base_quantizer_pairs import (
    FLOAT8,
    GENERATOR,
    INT8,
    INTEGERS,
    UINT8,
    assert_same_initializers,
    conv_relu,
    made,
    pair,
)
from onnx import numpy_helper
from onnxruntime.quantization import QuantType as IncumbentType

from qwrap.ort.enums import QuantType
from qwrap.ort.numbers.weight_params import channel_params


@pytest.mark.ort(44, 45, 46, 121)
@pytest.mark.parametrize("onnx_type", INTEGERS[:4])
@pytest.mark.parametrize("reduced", [False, True])
def test_a_constant_becomes_the_incumbents_codes(onnx_type: int, reduced: bool) -> None:
    ours, theirs = pair(conv_relu(), onnx_type, reduce_range=reduced)
    for quantizer in (ours, theirs):
        weight = quantizer.initializers["w"]
        names = quantizer.quantize_initializer_impl(weight, onnx_type, reduce_range=True)
        assert names == ("w_quantized", "w_zero_point", "w_scale")
    assert_same_initializers(ours, theirs)


@pytest.mark.ort(10, 121)
@pytest.mark.parametrize("onnx_type", INTEGERS[:4])
@pytest.mark.parametrize("symmetric", [None, False])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_become_the_incumbents_codes(onnx_type, symmetric, axis) -> None:
    ours, theirs = pair(conv_relu(), onnx_type, WeightSymmetric=symmetric)
    for quantizer in (ours, theirs):
        quantizer.quantize_weight_per_channel_impl("w", onnx_type, axis)
    assert_same_initializers(ours, theirs)


@pytest.mark.ort(49, 125)
def test_a_constant_of_float16_has_a_scale_of_float16() -> None:
    ours, theirs = pair(conv_relu(np.float16))
    for quantizer in (ours, theirs):
        quantizer.quantize_weight_per_channel_impl("w", INT8, 0)
    assert made(ours, "w_scale").dtype == np.float16
    assert_same_initializers(ours, theirs)


@pytest.mark.ort(47, "G40")
@pytest.mark.parametrize("onnx_type", INTEGERS[4:])
def test_constants_become_codes_of_four_bits(onnx_type: int) -> None:
    """The incumbent asks for 8-bit codes before packing, and has made 4-bit ones: RuntimeError."""
    ours, theirs = pair(conv_relu(), onnx_type)
    ours.quantize_initializer_impl(ours.initializers["w"], onnx_type)
    weight = made(conv := ours, "w")
    codes, zero = made(conv, "w_quantized").astype(int), made(conv, "w_zero_point").astype(int)
    error = np.abs((codes - zero) * made(conv, "w_scale") - weight)
    # half a step, and at the ends another half, because the zero point is rounded
    assert error.max() <= made(conv, "w_scale") * 1.001
    ours.quantize_weight_per_channel_impl("b", onnx_type, 0)
    with pytest.raises(RuntimeError, match="must be 8-bit before packing"):
        theirs.quantize_initializer_impl(theirs.initializers["w"], onnx_type)


@pytest.mark.ort(48)
def test_a_constant_of_float8_is_the_incumbents() -> None:
    ours, theirs = pair(conv_relu(), FLOAT8, FLOAT8)
    ours.quantize_initializer_impl(ours.initializers["w"], FLOAT8)
    weight = numpy_helper.to_array(theirs.initializers["w"])
    zero, scale, codes = incumbent.quantize_data(weight, FLOAT8, True)
    assert made(ours, "w_quantized").tobytes() == codes.tobytes()
    assert made(ours, "w_scale") == scale
    assert not made(ours, "w_zero_point").astype(np.float32).any()
    assert zero.dtype == made(ours, "w_zero_point").dtype


@pytest.mark.ort(123)
def test_channels_of_zeros_share_the_zero_point_of_the_others() -> None:
    """The incumbent gives them 0 beside 128, though it says that QLinearConv wants one value."""
    weight = GENERATOR.normal(size=(4, 3, 2, 2)).astype(np.float32)
    weight[2] = 0
    ours, theirs = pair(conv_relu(w=weight), UINT8, WeightSymmetric=True)
    for quantizer in (ours, theirs):
        quantizer.quantize_weight_per_channel_impl("w", UINT8, 0)
    assert made(ours, "w_zero_point").tolist() == [128] * 4
    assert (made(ours, "w_quantized")[2] == 128).all()
    assert made(theirs, "w_zero_point").tolist() == [128, 128, 0, 128]


@pytest.mark.ort(10, "G23", 134)
def test_one_entry_gives_its_range_to_all_channels() -> None:
    override = {"w": [{"axis": 0, "rmin": -2.0, "rmax": 3.0}]}
    ours, theirs = pair(conv_relu(), UINT8, TensorQuantOverrides=override, WeightSymmetric=False)
    for quantizer in (ours, theirs):
        quantizer.quantize_weight_per_channel_impl("w", UINT8, 0)
    assert made(ours, "w_scale").tolist() == [np.float32(5 / 255)] * 4
    assert_same_initializers(ours, theirs)  # which is right in this form, but not in QDQ


@pytest.mark.ort(130, "G38")
@pytest.mark.parametrize(
    ("scale", "zero_point"),
    [(0.5, 3), (np.float32(0.5), np.int8(3)), (np.array([0.5, 1, 2, 4]), np.array([0, 1, 2, 3]))],
)
def test_one_entry_gives_scales_to_all_channels(scale, zero_point) -> None:
    """In QDQ form the incumbent looks for an entry for each channel: IndexError."""
    data = GENERATOR.normal(size=(4, 3)).astype(np.float32)
    entries = [{"axis": 0, "scale": scale, "zero_point": zero_point}]
    zeros, scales = channel_params(data, INT8, 0, entries, symmetric=True)
    assert scales.tolist() == np.broadcast_to(scale, 4).tolist()
    assert zeros.tolist() == np.broadcast_to(zero_point, 4).tolist()
    assert (scales.dtype, zeros.dtype) == (np.float32, np.int8)


@pytest.mark.ort(145, 129, 132, 133)
@pytest.mark.parametrize(
    "entry",
    [
        {"quant_type": "QInt16"},
        {"quant_type": "QUInt8", "symmetric": True},
        {"reduce_range": True},
        {"rmin": -9.0, "rmax": 9.0},
        {"scale": np.array(0.25, np.float32), "zero_point": np.array(1, np.int8)},
    ],
)
def test_overrides_of_a_constant_do_as_the_incumbents(entry: dict) -> None:
    kind = entry.get("quant_type")
    options = [
        {"w": [{**entry, "quant_type": e[kind]} if kind else entry]}
        for e in (QuantType, IncumbentType)
    ]
    model = conv_relu()
    ours, _ = pair(model, TensorQuantOverrides=options[0])
    arguments = (model, True, False, INT8, UINT8, None, [], [], ["Conv"])
    theirs = incumbent.BaseQuantizer(*arguments, {"TensorQuantOverrides": options[1]})
    for quantizer in (ours, theirs):
        quantizer.quantize_initializer_impl(quantizer.initializers["w"], INT8)
    assert_same_initializers(ours, theirs)


@pytest.mark.ort(137, 138)
def test_channels_that_are_not_there_are_refused() -> None:
    ours, _ = pair(conv_relu(), TensorQuantOverrides={"w": [{"axis": 0}]})
    with pytest.raises(ValueError, match="per-channel axis with value 4 that is out-of-bounds"):
        ours.quantize_weight_per_channel_impl("w", INT8, 4)
    with pytest.raises(ValueError, match=r"specify an unexpected axis. Expected 1, but got 0"):
        ours.quantize_weight_per_channel_impl("w", INT8, 1)
    with pytest.raises(ValueError, match="nobody is not an initializer"):
        ours.quantize_weight_per_channel_impl("nobody", INT8, 1)


@pytest.mark.ort(145)
def test_the_float_weight_may_be_kept() -> None:
    ours, _ = pair(conv_relu())
    ours.quantize_initializer_impl(ours.initializers["w"], INT8, keep_float_weight=True)
    names = {tensor.name for tensor in ours.model.initializer()}
    assert names == {"w", "b", "w_scale", "w_zero_point"}


@pytest.mark.ort(130, "G38")
@pytest.mark.parametrize("zero_point", [300, -1, 0.5])
def test_a_zero_point_that_is_no_code_is_refused(zero_point: float) -> None:
    """The type of a constant of which no type is said is known only where it is quantized."""
    data = GENERATOR.normal(size=(4, 3)).astype(np.float32)
    entries = [{"axis": 0, "scale": 1.0, "zero_point": zero_point}]
    with pytest.raises(ValueError, match="is no code of uint8"):
        channel_params(data, UINT8, 0, entries, symmetric=True)
