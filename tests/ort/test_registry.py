"""Users' own operator classes: what they register is made, and called back."""

import numpy as np
import onnxruntime
import onnxruntime.quantization.registry as incumbent
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from qwrap.ort import registry
from qwrap.ort.calibrate import CalibrationMethod, TensorsData
from qwrap.ort.enums import QuantizationMode, QuantType
from qwrap.ort.onnx_quantizer import ONNXQuantizer
from qwrap.ort.operators.base_operator import QuantOperatorBase


def add_of(constant: np.ndarray) -> ModelProto:
    """Return y = x + constant, in a node "add"."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "c"], ["y"], "add")],
        "g",
        values[:1],
        values[1:],
        [numpy_helper.from_array(constant.astype(np.float32), "c")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def ranges() -> TensorsData:
    ends = (np.float32(-2), np.float32(2))
    return TensorsData(CalibrationMethod.MinMax, {"x": ends, "y": ends})


class Halved(QuantOperatorBase):
    """Leaves the node float, and marks that it was asked."""

    def should_quantize(self) -> bool:
        return True

    def quantize(self) -> None:
        self.node.doc_string = "seen"
        super().quantize()


@pytest.mark.ort(181)
@pytest.mark.parametrize("name", ["QLinearOpsRegistry", "IntegerOpsRegistry"])
def test_a_registered_class_quantizes_its_operator(name: str, monkeypatch) -> None:
    monkeypatch.setitem(getattr(registry, name), "Add", Halved)
    mode = QuantizationMode.QLinearOps if "QLinear" in name else QuantizationMode.IntegerOps
    static = mode is QuantizationMode.QLinearOps
    quantizer = ONNXQuantizer(
        add_of(np.ones(3)),
        False,
        False,
        mode,
        static,
        QuantType.QInt8,
        QuantType.QUInt8,
        ranges() if static else None,
        [],
        [],
        ["Add"],
    )
    model = quantizer.quantize_model()
    assert [node.doc_string for node in model.graph.node if node.op_type == "Add"] == ["seen"]


@pytest.mark.ort(4, 5, 6, 24, 181)
@pytest.mark.parametrize(
    "name", ["CommonOpsRegistry", "IntegerOpsRegistry", "QLinearOpsRegistry", "QDQRegistry"]
)
def test_every_operator_of_the_incumbent_has_a_class_of_the_same_name(name: str) -> None:
    ours, theirs = getattr(registry, name), getattr(incumbent, name)
    for op_type, cls in theirs.items():
        assert ours[op_type].__name__ == cls.__name__, op_type


@pytest.mark.ort(180)
def test_a_class_of_the_qdq_form_calls_back(monkeypatch) -> None:
    """All callbacks that classes of the incumbent use, from one that a user might have written."""
    from qwrap.ort.operators.qdq_base_operator import QDQOperatorBase
    from qwrap.ort.qdq_quantizer import QDQQuantizer

    class Weighted(QDQOperatorBase):
        def quantize(self) -> None:
            x, constant = self.node.input
            y = self.node.output[0]
            self.quantizer.quantize_activation_tensor(x)
            assert self.quantizer.is_tensor_quantized(x)
            assert not self.quantizer.is_tensor_quantized(y)
            per_channel, axis = self.quantizer.is_tensor_per_channel(constant, default_axis=0)
            assert (per_channel, axis) == (True, 0)
            self.quantizer.quantize_weight_tensor_per_channel(constant, axis)
            self.quantizer.quantize_output_same_as_input(y, x, self.node.name)

    monkeypatch.setitem(registry.QDQRegistry, "Add", Weighted)
    arguments = (True, False, QuantType.QInt8, QuantType.QUInt8, ranges(), [], [], ["Add"])
    model = QDQQuantizer(add_of(np.array([1.0, 2.0, 4.0])), *arguments).quantize_model()
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert constants["c_quantized"].tolist() == [127, 127, 127]
    assert constants["c_scale"].tolist() == [np.float32(i / 127) for i in (1, 2, 4)]
    readers = [node for node in model.graph.node if "x_scale" in node.input]
    assert {node.name for node in readers} == {
        "x_QuantizeLinear",
        "x_DequantizeLinear",
        "y_QuantizeLinear",
        "y_DequantizeLinear",
    }
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = np.float32([[0, 1, -1], [2, -2, 0.5]])
    step = 4 / 255
    expected = np.clip(np.add(x, [1, 2, 4]), -128 * step, 127 * step)
    assert np.abs(session.run(None, {"x": x})[0] - expected).max() <= 1.5 * step
