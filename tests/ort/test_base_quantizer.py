"""What both quantizers share: constants, biases, ranges and the choice of nodes."""

import logging

import numpy as np
import onnxruntime.quantization.base_quantizer as incumbent
import onnxruntime.quantization.calibrate as incumbent_calibrate
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType as IncumbentType

from qwrap.ort.base_quantizer import BaseQuantizer, QuantizationParams
from qwrap.ort.bias import bias_codes, bias_scale, weight_scale_for_bias
from qwrap.ort.calibrate import CalibrationMethod, TensorData, TensorsData
from qwrap.ort.enums import QuantType
from qwrap.ort.weight_params import channel_params

INT8, UINT8, INT16 = TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16
FLOAT8 = TensorProto.FLOAT8E4M3FN
INTEGERS = (INT8, UINT8, INT16, TensorProto.UINT16, TensorProto.INT4, TensorProto.UINT4)
GENERATOR = np.random.default_rng(0)


def conv_relu(dtype: type = np.float32, **weights: np.ndarray) -> ModelProto:
    """Return x -> Conv "conv" -> h -> Relu "relu" -> y, with weight "w" and bias "b"."""
    weights.setdefault("w", GENERATOR.normal(size=(4, 3, 2, 2)).astype(dtype))
    weights.setdefault("b", GENERATOR.normal(size=weights["w"].shape[0]).astype(dtype))
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], "conv"),
        helper.make_node("Relu", ["h"], ["y"], "relu"),
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, [1, 3, 5, 5])],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def pair(model: ModelProto, weight_type: int = INT8, activation_type: int = UINT8, **options):
    """Return qwrap's quantizer and the incumbent's, of one model and with the same settings."""
    arguments = (model, True, options.pop("reduce_range", False), weight_type, activation_type)
    rest = ([], [], ["Conv", "Relu"], options)
    return (
        BaseQuantizer(*arguments, None, *rest),
        incumbent.BaseQuantizer(*arguments, None, *rest),
    )


def made(quantizer, name: str) -> np.ndarray:
    found = {tensor.name: tensor for tensor in quantizer.model.initializer()}
    return numpy_helper.to_array(found[name])


def assert_same_initializers(ours, theirs) -> None:
    expected = {tensor.name: numpy_helper.to_array(tensor) for tensor in theirs.model.initializer()}
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in ours.model.initializer()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), name


# --- constants -----------------------------------------------------------------------------------


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
    """The incumbent gives them 0 beside 128; QLinearConv takes one zero point for all channels."""
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


# --- biases --------------------------------------------------------------------------------------


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


# --- nodes and ranges ----------------------------------------------------------------------------


@pytest.mark.ort(7, 8, 9)
def test_nodes_are_chosen_by_name_and_type() -> None:
    model = conv_relu()
    nodes = {node.name: node for node in model.graph.node}
    for chosen, excluded, types in (
        ([], [], ["Conv", "Relu"]),
        (["conv"], [], ["Conv", "Relu"]),
        ([], ["conv"], ["Conv", "Relu"]),
        (["relu"], [], ["Conv"]),
        (None, None, ["Relu", "QuantizeLinear"]),
    ):
        arguments = (model, False, False, INT8, UINT8, None, chosen, excluded, types)
        ours, theirs = BaseQuantizer(*arguments), incumbent.BaseQuantizer(*arguments)
        for node in (*nodes.values(), helper.make_node("QuantizeLinear", ["x", "s"], ["q"], "q")):
            assert ours.should_quantize_node(node) == theirs.should_quantize_node(node)


@pytest.mark.ort(54)
@pytest.mark.parametrize("asked", [None, True, False])
def test_signed_weights_are_symmetric_unless_asked_otherwise(asked) -> None:
    ours, theirs = pair(conv_relu(), WeightSymmetric=asked)
    for onnx_type in (*INTEGERS, FLOAT8):
        assert ours.is_weight_symmetric(onnx_type) == theirs.is_weight_symmetric(onnx_type)


@pytest.mark.ort(50)
def test_constants_of_floats_only_are_weights() -> None:
    model = conv_relu(i=np.arange(3), d=np.ones(2))
    for quantizer in pair(model):
        assert quantizer.is_valid_quantize_weight("w")
        assert not quantizer.is_valid_quantize_weight("i")
        assert not quantizer.is_valid_quantize_weight("d")
        assert not quantizer.is_valid_quantize_weight("x")
        assert quantizer.is_input_a_initializer("i")
        assert not quantizer.is_input_a_initializer("x")


def ranged(model: ModelProto, **ranges: tuple[float, float]) -> BaseQuantizer:
    data = TensorsData(
        CalibrationMethod.MinMax,
        {name: tuple(map(np.float32, ends)) for name, ends in ranges.items()},
    )
    types = [node.op_type for node in model.graph.node]
    return BaseQuantizer(model, False, False, INT8, UINT8, data, [], [], types)


@pytest.mark.ort(104)
def test_what_only_a_relu_reads_has_its_range() -> None:
    quantizer = ranged(conv_relu(), x=(-1, 1), h=(-5, 5), y=(0, 5))
    before = quantizer.tensors_range
    quantizer.adjust_tensor_ranges()
    assert quantizer.tensors_range["h"].range_value == (0, 5)
    assert before["h"].range_value == (-5, 5)  # the caller's ranges stay as they are


@pytest.mark.ort(104)
def test_a_graph_output_keeps_what_a_relu_would_cut_off() -> None:
    """The incumbent counts nodes only, and saturates such an output at 0."""
    model = conv_relu()
    model.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, None))
    quantizer = ranged(model, x=(-1, 1), h=(-5, 5), y=(0, 5))
    quantizer.adjust_tensor_ranges()
    assert quantizer.tensors_range["h"].range_value == (-5, 5)


@pytest.mark.ort(105, 208)
def test_a_softmax_gives_numbers_from_zero_to_one() -> None:
    node = helper.make_node("Softmax", ["x"], ["y"], "softmax")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", value[:1], value[1:]),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    quantizer = ranged(model, x=(-1, 1), y=(0.25, 0.5))
    quantizer.adjust_tensor_ranges()
    assert quantizer.tensors_range["y"].range_value == (0, 1)


@pytest.mark.ort(48, 105)
def test_a_softmax_keeps_the_spread_that_float8_needs() -> None:
    """The incumbent's range from 0 to 1 has no ``std``: AttributeError with float 8."""
    node = helper.make_node("Softmax", ["x"], ["y"], "softmax")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", value[:1], value[1:]),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    numbers = {name: np.float32(1) for name in ("avg", "std", "lowest", "highest")}
    numbers |= {"hist": np.ones(2), "hist_edges": np.arange(3, dtype=np.float32)}
    data = TensorsData(CalibrationMethod.Distribution, {"y": TensorData(**numbers)})
    quantizer = BaseQuantizer(model, False, False, FLOAT8, FLOAT8, data, [], [], ["Softmax"])
    quantizer.adjust_tensor_ranges()
    assert quantizer.tensors_range["y"].avg_std == (1, 1)


@pytest.mark.ort(179)
def test_ranges_must_be_tensor_data() -> None:
    for quantizer, data in (
        (BaseQuantizer, {"x": (0, 1)}),
        (incumbent.BaseQuantizer, {"x": (0, 1)}),
    ):
        with pytest.raises(TypeError, match="tensors_range contains unexpected types"):
            quantizer(conv_relu(), False, False, INT8, UINT8, data, [], [], [])
    assert incumbent_calibrate.TensorData is not TensorData


@pytest.mark.ort(141, 2)
def test_the_model_of_the_caller_stays_as_it_is() -> None:
    model = conv_relu()
    before = model.SerializeToString()
    quantizer, _ = pair(model)
    quantizer.quantize_initializer_impl(quantizer.initializers["w"], INT8)
    assert model.SerializeToString() == before
    quantizer.model.model.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")
    again, _ = pair(quantizer.model.model)
    assert again.model.model is not quantizer.model.model


@pytest.mark.ort(141)
def test_a_wrong_override_is_refused_by_the_constructor() -> None:
    for quantizer in (BaseQuantizer, incumbent.BaseQuantizer):
        with pytest.raises(ValueError, match="Tensor 'z' in TensorQuantOverrides is not present"):
            quantizer(
                conv_relu(), False, False, INT8, UINT8, None, [], [], [],
                {"TensorQuantOverrides": {"z": [{"symmetric": True}]}},
            )  # fmt: skip


@pytest.mark.ort(178)
def test_keywords_of_older_versions_are_accepted() -> None:
    arguments = (conv_relu(), False, False, INT8, UINT8, None, [], [], [])
    assert BaseQuantizer(*arguments, static=True, mode=1).quantize_model.__name__
    with pytest.raises(TypeError, match="statik"):
        BaseQuantizer(*arguments, statik=True)
    with pytest.raises(NotImplementedError):
        BaseQuantizer(*arguments).quantize_model()


# --- parameters of one tensor ---------------------------------------------------------------------


@pytest.mark.ort(366)
def test_parameters_are_like_a_dictionary() -> None:
    for cls in (QuantizationParams, incumbent.QuantizationParams):
        params = cls(scale=np.float32([0.5]), zero_point=np.int8([1]), quant_type=3, axis=None)
        params["axis"] = 1
        assert len(params) == 4
        assert list(params) == ["scale", "zero_point", "quant_type", "axis"]
        assert "axis" in params
        assert params.get("axis") == params["axis"] == 1
        assert params.get("nothing", 7) == 7


@pytest.mark.ort(366)
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"axis": 1.5}, TypeError),
        ({"zero_point": [1]}, TypeError),
        ({"scale": np.array([1.0])}, ValueError),
        ({"scale": np.array([1])}, ValueError),
    ],
)
def test_parameters_of_the_wrong_type_are_refused(wrong: dict, error: type[Exception]) -> None:
    for cls in (QuantizationParams, incumbent.QuantizationParams):
        with pytest.raises(error):
            cls(**wrong)


@pytest.mark.ort(366, "G35")
def test_parameters_may_be_numbers() -> None:
    """The incumbent asks a scale for its dtype, and refuses numpy's scalars."""
    params = QuantizationParams(scale=0.5, zero_point=3)
    assert (params["scale"].dtype, float(params["scale"]), params["zero_point"]) == (
        np.float32,
        0.5,
        3,
    )
    assert QuantizationParams(scale=np.float16(0.5), zero_point=np.uint8(3))["scale"] == 0.5
    with pytest.raises(AttributeError):
        incumbent.QuantizationParams(scale=0.5)
    with pytest.raises(TypeError):
        incumbent.QuantizationParams(zero_point=np.uint8(3))
