"""Blocks along any axis, against onnxruntime's tool and the ONNX reference."""

import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime.quantization.quant_utils as incumbent
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from numbers_of_codes import finite32, onnx_types, same
from onnx import TensorProto, helper, numpy_helper

from qwrap.ort import quant_utils
from qwrap.ort.errors import QuantizationError


@pytest.mark.ort(120)
@given(
    x=arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 5)), elements=finite32)
    | arrays(np.float16, (5, 3), elements=st.floats(16, 1024, width=16)),
    onnx_type=onnx_types,
    axis=st.integers(0, 1),
    block_size=st.integers(1, 6),
    symmetric=st.booleans(),
)
@settings(deadline=None)
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


@pytest.mark.ort(49, 120, 125)
@pytest.mark.parametrize("symmetric", [False, True])
def test_blocks_of_small_float16_do_not_vanish(symmetric: bool) -> None:
    """The incumbent gives them scale 1, with which all of them become 0."""
    weight = np.array([[-0.004, 0.001, 0.0, 0.0, 0.004, 0.002]], np.float16)
    arguments = (weight, TensorProto.INT8, 1, 2, symmetric)
    _, scale = quant_utils.compute_scale_zp_blocked(*arguments)
    tiny = float(np.finfo(np.float16).tiny)
    assert scale.tolist() == [[tiny, 1.0, tiny]]
    assert incumbent.compute_scale_zp_blocked(*arguments)[1].tolist() == [[1.0] * 3]


@pytest.mark.ort(49, 120)
def test_a_block_may_be_wider_than_its_type_counts() -> None:
    """The incumbent subtracts in float16, where 60000 and -60000 lie infinitely far apart."""
    weight = np.array([[60000.0, -60000.0]], np.float16)
    _, scale = quant_utils.compute_scale_zp_blocked(weight, TensorProto.INT8, 1, 2, False)
    assert scale == np.float16(120000 / 255)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        theirs = incumbent.compute_scale_zp_blocked(weight, TensorProto.INT8, 1, 2, False)
    assert np.isinf(theirs[1])
