"""Float operators that move codes, which onnxruntime's optimiser moves pairs past."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime.quantization as incumbent
import pytest
from onnx import TensorProto, helper, numpy_helper

import qwrap.ort as ort

X = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
MOVES: dict[str, dict[str, Any]] = {
    "Transpose": {"perm": [0, 2, 3, 1]},
    "MaxPool": {"kernel_shape": [2, 2]},
    "Flatten": {},
    "Squeeze": {},
}


def model(move: str) -> onnx.ModelProto:
    """Return x -> Conv -> ``move`` -> Sigmoid -> y, of opset 21."""
    weight = np.random.default_rng(1).normal(size=(4, 4, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node(move, ["c"], ["t"], "move", **MOVES[move]),
        helper.make_node("Sigmoid", ["t"], ["y"], "sigmoid"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def reader(module: Any) -> Any:
    class Reader(module.CalibrationDataReader):
        batches = iter([{"x": X}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    return Reader()


def outputs(source: Any, level: str) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    data = source if isinstance(source, str) else source.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": X})[0])


@pytest.mark.parametrize("move", MOVES)
def test_int8_pairs_before_them_load_and_are_right(move: str) -> None:
    quantized = ort.quantize_static(model(move), None, reader(ort), op_types_to_quantize=["Conv"])
    found = outputs(quantized, "ORT_ENABLE_ALL")
    # Fused, the convolution multiplies by one product of scales; a code may round to its neighbour.
    assert np.abs(found - outputs(quantized, "ORT_DISABLE_ALL")).max() < 0.02
    exact = outputs(model(move), "ORT_DISABLE_ALL")
    assert np.square(found - exact).sum() < 1e-3 * np.square(exact).sum()


def test_the_incumbents_file_is_refused(tmp_path: Any) -> None:
    incumbent.quantize_static(
        model("Transpose"), tmp_path / "q.onnx", reader(incumbent), op_types_to_quantize=["Conv"]
    )
    outputs(str(tmp_path / "q.onnx"), "ORT_DISABLE_ALL")
    with pytest.raises(Exception, match="QuantizeLinear"):  # its own class, of no public name
        outputs(str(tmp_path / "q.onnx"), "ORT_ENABLE_ALL")
