"""Initializers of codes, against onnxruntime's tool."""

import numpy as np
import onnxruntime.quantization.quant_utils as incumbent
import pytest
from numbers_of_codes import FLOAT8, INTEGERS
from onnx import TensorProto, numpy_helper

from qwrap.ort import quant_utils
from qwrap.ort.errors import InvalidModelError


@pytest.mark.ort(121, 47, 10)
@pytest.mark.parametrize(
    ("onnx_type", "kind"),
    [
        *((onnx_type, kind) for onnx_type in INTEGERS for kind in ("tensor", "channel", "block")),
        (FLOAT8, "tensor"),
        (FLOAT8, "channel"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_quantized_initializers_are_the_incumbents(onnx_type, kind, dtype) -> None:
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
    with pytest.raises(ValueError, match="4 scales and 4 zero points, but no axis"):
        quant_utils.quantize_onnx_initializer(weight, TensorProto.INT8, zero, scale)
    nan = numpy_helper.from_array(np.array([np.nan], np.float32), "w")
    with pytest.raises(InvalidModelError, match="NaN"):
        quant_utils.quantize_onnx_initializer(nan, FLOAT8, np.array(0), np.float32(1))
