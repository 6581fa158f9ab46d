"""QuantizeLinear and DequantizeLinear against onnxruntime."""

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qwrap.errors import UnsupportedOpError
from qwrap.ops.quant import dequantize_linear, quantize_as, quantize_linear

rng = np.random.default_rng(5)
X = rng.uniform(-20, 20, (2, 3, 8)).astype(np.float32)
SCALE = np.array(0.125, np.float32)
SCALES = np.array([0.1, 0.03, 0.25], np.float32)
TYPES = [np.uint8, np.int8, np.uint16, np.int16]


def codes(dtype: type, *shape: int) -> np.ndarray:
    info = np.iinfo(dtype)
    return rng.integers(info.min // 2, info.max // 2, shape).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_quantizing_equals_onnxruntime(check, dtype) -> None:
    check("QuantizeLinear", 21, [X, SCALE, codes(dtype)], {})
    check("QuantizeLinear", 21, [X, SCALES, codes(dtype, 3)], {"axis": -2})
    blocks = rng.uniform(0.1, 0.2, (2, 3, 2)).astype(np.float32)
    check("QuantizeLinear", 21, [X, blocks, codes(dtype, 2, 3, 2)], {"axis": 2, "block_size": 4})


@pytest.mark.parametrize("dtype", [*TYPES, np.int32])
def test_dequantizing_equals_onnxruntime(check, dtype) -> None:
    zero = (lambda *shape: np.zeros(shape, dtype)) if dtype is np.int32 else codes
    zero_point = np.zeros((), dtype) if dtype is np.int32 else codes(dtype)
    zero_points = zero(3) if dtype is np.int32 else codes(dtype, 3)
    check("DequantizeLinear", 21, [codes(dtype, 2, 3, 8), SCALE, zero_point], {})
    check("DequantizeLinear", 23, [codes(dtype, 2, 3, 8), SCALES, zero_points], {})
    blocks = rng.uniform(0.1, 0.2, (2, 3, 3)).astype(np.float32)
    attributes = {"axis": 2, "block_size": 3}
    check("DequantizeLinear", 21, [codes(dtype, 2, 3, 8), blocks], attributes)


def test_older_opsets_equal_onnxruntime(check) -> None:
    check("QuantizeLinear", 10, [X, SCALE], {})
    check("QuantizeLinear", 13, [X, SCALES, codes(np.int8, 3)], {"axis": 1})
    check("DequantizeLinear", 10, [codes(np.uint8, 5), SCALE, codes(np.uint8)], {})
    check("DequantizeLinear", 13, [codes(np.int8, 2, 3, 4), SCALES], {"axis": 1})


def test_integers_are_quantized_like_floats(check) -> None:
    check("QuantizeLinear", 13, [codes(np.int32, 9) // 2**22, SCALE, codes(np.int8)], {})


SMALL_TYPES = {
    TensorProto.INT4: ml_dtypes.int4,
    TensorProto.UINT4: ml_dtypes.uint4,
    TensorProto.INT2: ml_dtypes.int2,
    TensorProto.UINT2: ml_dtypes.uint2,
}
FLOAT8 = {
    TensorProto.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: ml_dtypes.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2: ml_dtypes.float8_e5m2,
    TensorProto.FLOAT8E5M2FNUZ: ml_dtypes.float8_e5m2fnuz,
}


def constant(name: str, value: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(value, name)


def round_trip(**attributes: int) -> list[onnx.NodeProto]:
    """Quantize and dequantize: onnxruntime takes and returns no arrays of 4 bits."""
    layout = {k: v for k, v in attributes.items() if k in ("axis", "block_size")}
    return [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"], **attributes),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"], **layout),
    ]


@pytest.mark.parametrize("data_type", SMALL_TYPES)
def test_codes_of_4_and_2_bits_equal_onnxruntime(check_model, data_type: int) -> None:
    opset = 21 if data_type in (TensorProto.INT4, TensorProto.UINT4) else 25
    dtype = SMALL_TYPES[data_type]
    x = {"x": (X / 8).astype(np.float32)}
    for scale, zero, attributes in (
        (np.array(0.3, np.float32), np.array(1, dtype), {}),
        (SCALES * 5, np.array([0, 1, 1], dtype), {"axis": 1}),
        (
            rng.uniform(0.2, 0.5, (2, 3, 2)).astype(np.float32),
            np.ones((2, 3, 2), dtype),
            {"axis": 2, "block_size": 4},
        ),
    ):
        feed = x | {"scale": constant("scale", scale), "zero": constant("zero", zero)}
        check_model(round_trip(**attributes), feed, {"y": TensorProto.FLOAT}, opset)


@pytest.mark.parametrize("data_type", FLOAT8)
@pytest.mark.parametrize("saturate", [0, 1])
def test_codes_of_8_bit_floats_equal_onnxruntime(check_model, data_type: int, saturate) -> None:
    zero = constant("zero", np.zeros((), FLOAT8[data_type]))
    scale = constant("scale", np.array(0.03, np.float32))
    # Above 448 and not saturating, onnxruntime makes 448 of some, where ONNX says NaN.
    x = np.array([*X.clip(-13, 13).flat, 5e4, -6e4], np.float32)
    nodes = round_trip(saturate=saturate)
    check_model(nodes, {"x": x, "scale": scale, "zero": zero}, {"y": TensorProto.FLOAT}, 19)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
def test_float16_is_quantized_as_in_onnxruntime(check, dtype: type) -> None:
    x, scale = X.astype(np.float16), np.array(0.13, np.float16)
    check("QuantizeLinear", 21, [x, scale, codes(dtype)], {})
    check("DequantizeLinear", 21, [codes(dtype, 3, 4), scale, codes(dtype)], {})


@pytest.mark.parametrize("precision", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_precision_changes_no_code_as_in_onnxruntime(check, precision: int) -> None:
    for dtype in (np.float32, np.float16):
        x, scale = X.astype(dtype), np.array(0.13, dtype)
        check("QuantizeLinear", 23, [x, scale, codes(np.int8)], {"precision": precision})


def test_bfloat16_is_divided_in_bfloat16_as_in_the_reference(check_model) -> None:
    scale = constant("scale", np.array(0.13, ml_dtypes.bfloat16))
    feed = {
        "x": X.astype(ml_dtypes.bfloat16),
        "scale": scale,
        "zero": constant("zero", np.array(7, np.int16)),
    }
    nodes = round_trip()[:1]
    check_model(nodes, feed, {"codes": TensorProto.INT16}, 21)


# The fixture is a plain function, the same for every example.
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    dtype=st.sampled_from(TYPES),
    blocked=st.booleans(),
)
def test_every_layout_quantizes_as_in_onnxruntime(check, data, shape, dtype, blocked) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    block = data.draw(st.integers(1, shape[axis])) if blocked else 0
    layout = [shape[axis]]
    if blocked:
        layout = list(shape)
        layout[axis] = -(-shape[axis] // block)
    x = rng.uniform(-300, 300, shape).astype(np.float32)
    scale = rng.uniform(0.01, 3, layout).astype(np.float32)
    attributes = {"axis": axis, "block_size": block}
    check("QuantizeLinear", 21, [x, scale, codes(dtype, *layout)], attributes)
    inputs = [codes(dtype, *shape), scale, codes(dtype, *layout)]
    check("DequantizeLinear", 21, inputs, attributes)


def test_the_type_may_be_an_attribute(check) -> None:
    check("QuantizeLinear", 21, [X, SCALE], {"output_dtype": TensorProto.INT8})
    check("DequantizeLinear", 23, [codes(np.int8, 4), SCALE], {"output_dtype": TensorProto.FLOAT16})


def test_four_bit_floats_are_rounded_to_their_grid() -> None:
    x = torch.tensor([0.0, 0.3, -0.8, 2.6, 100.0])
    result = quantize_as(x, torch.tensor(0.5), None, TensorProto.FLOAT4E2M1)
    assert result.tolist() == [0.0, 0.5, -1.5, 6.0, 6.0]  # -1.6 and 5.2 are nearest to -1.5 and 6
    assert dequantize_linear(result, torch.tensor(0.5)).tolist() == [0.0, 0.25, -0.75, 3.0, 3.0]


def test_a_scale_of_powers_of_two_is_read() -> None:
    scale = torch.tensor([126, 128], dtype=torch.uint8).view(torch.float8_e8m0fnu)  # 1/2 and 2
    x = torch.tensor([[1.0], [6.0]])
    got = quantize_linear(x, scale, axis=0, output_dtype=TensorProto.FLOAT4E2M1)
    assert got.tolist() == [[2.0], [3.0]]
    back = dequantize_linear(got, scale, axis=0, output_dtype=TensorProto.FLOAT)
    assert torch.equal(back, x)


def test_other_types_are_refused() -> None:
    with pytest.raises(UnsupportedOpError, match="nothing can be quantized to element type INT64"):
        quantize_as(torch.ones(1), torch.ones(()), None, TensorProto.INT64)
