"""The enumerations, with onnxruntime's names and values, and models of each type."""

from enum import Enum

import numpy as np
import onnxruntime
import onnxruntime.quantization as incumbent
import onnxruntime.quantization.quant_utils as incumbent_utils
import pytest
from base_quantizer_pairs import conv_relu
from onnx import ModelProto, TensorProto, helper, numpy_helper

from qwrap.ort import enums, quant_utils
from qwrap.ort.calibrate import CalibrationMethod, TensorData, TensorsData
from qwrap.ort.enums import QuantType
from qwrap.ort.qdq_quantizer import QDQQuantizer

PAIRS = [
    pytest.param(enums.QuantType, incumbent.QuantType, marks=pytest.mark.ort(39)),
    pytest.param(enums.QuantFormat, incumbent.QuantFormat, marks=pytest.mark.ort(40)),
    pytest.param(
        enums.QuantizationMode, incumbent_utils.QuantizationMode, marks=pytest.mark.ort(41)
    ),
    pytest.param(
        enums.QuantizedValueType, incumbent_utils.QuantizedValueType, marks=pytest.mark.ort(42)
    ),
]


@pytest.mark.parametrize(("ours", "other"), PAIRS)
def test_members_have_the_incumbents_names_and_values(ours, other) -> None:
    assert {m.name: m.value for m in ours} == {m.name: m.value for m in other}
    assert [str(m) for m in ours] == [str(m) for m in other]
    assert getattr(quant_utils, ours.__name__) is ours


@pytest.mark.parametrize(("ours", "other"), PAIRS)
def test_members_are_found_by_name(ours: type[Enum], other: type[Enum]) -> None:
    for member in ours:
        assert ours.from_string(str(member)) is member
    for enumeration in (ours, other):
        with pytest.raises(ValueError):  # noqa: PT011 - the incumbent's has no message
            enumeration.from_string("QInt9")
    with pytest.raises(ValueError, match="has no 'QInt9', only"):
        ours.from_string("QInt9")


@pytest.mark.ort(39)
def test_types_name_their_tensor_type() -> None:
    for member in enums.QuantType:
        assert member.tensor_type == incumbent.QuantType[member.name].tensor_type


@pytest.mark.ort(43)
def test_calibration_methods_have_the_incumbents_values() -> None:
    theirs = {m.name: m.value for m in incumbent.CalibrationMethod}
    assert {m.name: m.value for m in CalibrationMethod} == theirs
    assert enums.CalibrationMethod is CalibrationMethod


# --- models of each type -------------------------------------------------------------------------


def quantized(model: ModelProto, weight: QuantType, activation: QuantType) -> ModelProto:
    """Return the QDQ form, with ranges observed on one batch."""
    names = ["x", "h", "y"]
    probe = ModelProto()
    probe.CopyFrom(model)
    kind = model.graph.input[0].type.tensor_type.elem_type
    probe.graph.output.append(helper.make_tensor_value_info("h", kind, None))
    batch = images(model)
    seen = {"x": batch["x"], **run(probe, batch)}
    ranges = {
        name: TensorData(
            lowest=seen[name].min(),
            highest=seen[name].max(),
            avg=seen[name].mean(),
            std=seen[name].std(),
        )
        for name in names
    }
    types = ["Conv", "Relu"]
    data = TensorsData(CalibrationMethod.MinMax, ranges)
    quantizer = QDQQuantizer(model, False, False, weight, activation, data, [], [], types)
    return quantizer.quantize_model()


def images(model: ModelProto) -> dict[str, np.ndarray]:
    kind = model.graph.input[0].type.tensor_type.elem_type
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    return {"x": np.random.default_rng(7).normal(size=(1, 3, 5, 5)).astype(dtype)}


def run(model: ModelProto, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    # onnxruntime fuses a Conv between pairs of float 8 into a QLinearConv, which it then refuses
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, batch), strict=True))


def sqnr(signal: np.ndarray, other: np.ndarray) -> float:
    error = signal.astype(np.float64) - other.astype(np.float64)
    return float(10 * np.log10((signal.astype(np.float64) ** 2).sum() / (error**2).sum()))


@pytest.mark.ort(44, 45, 46, 47, 48, 51)
@pytest.mark.parametrize(
    ("weight", "activation", "least"),
    [
        # in dB: 6 per bit of the coarser type, less what lies between a peak and a mean
        pytest.param("QUInt8", "QUInt8", 30, id="U8U8"),
        pytest.param("QInt8", "QUInt8", 30, id="U8S8"),
        pytest.param("QInt8", "QInt8", 30, id="S8S8"),
        pytest.param("QInt8", "QUInt16", 33, id="U16S8"),
        pytest.param("QInt8", "QInt16", 33, id="S16S8"),
        pytest.param("QInt16", "QInt16", 70, id="S16S16"),
        pytest.param("QUInt16", "QUInt16", 70, id="U16U16"),
        pytest.param("QInt4", "QUInt8", 10, id="U8S4"),
        pytest.param("QUInt4", "QUInt16", 10, id="U16U4"),
        pytest.param("QFLOAT8E4M3FN", "QFLOAT8E4M3FN", 20, id="F8F8"),
    ],
)
def test_a_model_of_each_type_loads_and_computes(weight: str, activation: str, least: int) -> None:
    model = conv_relu()
    types = enums.QuantType[weight], enums.QuantType[activation]
    made = quantized(model, *types)
    constants = {tensor.name: tensor for tensor in made.graph.initializer}
    assert constants["w_quantized"].data_type == types[0].tensor_type
    assert constants["x_zero_point"].data_type == types[1].tensor_type
    if weight == "QFLOAT8E4M3FN":
        zeros = [t for name, t in constants.items() if name.endswith("_zero_point")]
        assert not any(numpy_helper.to_array(zero).astype(np.float32).any() for zero in zeros)
    batch = images(model)
    assert sqnr(run(model, batch)["y"], run(made, batch)["y"]) > least


@pytest.mark.ort(49, 125)
def test_a_model_of_float16_keeps_its_type_in_scales() -> None:
    model = conv_relu(np.float16)
    made = quantized(model, QuantType.QInt8, QuantType.QUInt8)
    scales = [t for t in made.graph.initializer if t.name.endswith("_scale")]
    assert len(scales) > 2
    assert {tensor.data_type for tensor in scales} == {TensorProto.FLOAT16}
    batch = images(model)
    assert sqnr(run(model, batch)["y"], run(made, batch)["y"]) > 28


@pytest.mark.ort(50)
def test_doubles_and_integers_stay_as_they_are() -> None:
    values = [
        helper.make_tensor_value_info(name, kind, [2])
        for kind in (TensorProto.DOUBLE, TensorProto.INT32)
        for name in (f"x{kind}", f"y{kind}")
    ]
    nodes = [
        helper.make_node("Add", [f"x{kind}", f"x{kind}"], [f"y{kind}"], f"add{kind}")
        for kind in (TensorProto.DOUBLE, TensorProto.INT32)
    ]
    graph = helper.make_graph(nodes, "g", values[::2], values[1::2])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    ends = {v.name: (np.float32(-1), np.float32(1)) for v in values}
    data = TensorsData(CalibrationMethod.MinMax, ends)
    types = QuantType.QInt8, QuantType.QUInt8
    made = QDQQuantizer(model, False, False, *types, data, [], [], ["Add"]).quantize_model()
    assert [node.op_type for node in made.graph.node] == ["Add", "Add"]
