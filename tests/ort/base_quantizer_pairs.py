"""qwrap's base quantizer beside the incumbent's, of one model."""

from typing import Any

import numpy as np
import onnxruntime.quantization.base_quantizer as incumbent
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType as IncumbentType

from qwrap.ort.base_quantizer import BaseQuantizer
from qwrap.ort.enums import QuantType

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


def theirs(overrides: Any) -> Any:
    """Return overrides with the incumbent's types."""
    if isinstance(overrides, dict):
        return {key: theirs(value) for key, value in overrides.items()}
    if isinstance(overrides, list):
        return [theirs(value) for value in overrides]
    return IncumbentType[overrides.name] if isinstance(overrides, QuantType) else overrides
