"""What overrides do to models in QDQ form, beside the incumbent's models."""

from typing import Any

import numpy as np
import onnxruntime
import onnxruntime.quantization.calibrate as incumbent_calibrate
import pytest
from base_quantizer_pairs import conv_relu, theirs
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType as IncumbentType
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer as IncumbentQuantizer

from qwrap.ort.calibrate import CalibrationMethod, TensorData, TensorsData
from qwrap.ort.enums import QuantType
from qwrap.ort.qdq_quantizer import QDQQuantizer
from qwrap.ort.quant_utils import get_opset_version, update_opset_version

TYPES = ["Conv", "Relu", "Add", "Reshape"]
RANGES = {"x": (-1.0, 3.0), "h": (-2.0, 2.0), "y": (0.0, 2.0)}


def ours(model: ModelProto, overrides: dict, per_channel: bool = False, **options: Any):
    ends = {name: tuple(map(np.float32, pair)) for name, pair in RANGES.items()}
    data = TensorsData(CalibrationMethod.MinMax, ends)
    options["TensorQuantOverrides"] = overrides
    arguments = (model, per_channel, False, QuantType.QInt8, QuantType.QUInt8, data, [], [], TYPES)
    return QDQQuantizer(*arguments, options).quantize_model()


def incumbents(model: ModelProto, overrides: dict, per_channel: bool = False, **options: Any):
    ends = {name: tuple(map(np.float32, pair)) for name, pair in RANGES.items()}
    data = incumbent_calibrate.TensorsData(incumbent_calibrate.CalibrationMethod.MinMax, ends)
    options["TensorQuantOverrides"] = theirs(overrides)
    own = ModelProto()
    own.CopyFrom(model)
    types = IncumbentType.QInt8, IncumbentType.QUInt8
    arguments = (own, per_channel, False, *types, data, [], [], TYPES)
    return IncumbentQuantizer(*arguments, options).quantize_model()


def constants(model: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def assert_same_constants(first: ModelProto, second: ModelProto) -> None:
    found, expected = constants(first), constants(second)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


def loads(model: ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


@pytest.mark.ort(68, 129, 132, 133, 134, 142, 143)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="none"),
        pytest.param({"x": [{"quant_type": QuantType.QInt8, "symmetric": True}]}, id="symmetric"),
        pytest.param({"w": [{"quant_type": QuantType.QUInt8}]}, id="type"),
        pytest.param({"w": [{"axis": 0}]}, id="channels"),
        pytest.param({"w": [{"axis": -4, "symmetric": False}]}, id="channels from the back"),
        pytest.param({"w": [{"reduce_range": True}]}, id="one scale"),
        pytest.param({"w": [{"rmin": -9.0, "rmax": 9.0}]}, id="range"),
        pytest.param(
            {"w": [{"axis": 0, "rmin": -i - 1.0, "rmax": i + 1.0} for i in range(4)]}, id="ranges"
        ),
        pytest.param({"w": [{"scale": 0.5, "zero_point": 3}]}, id="scale"),
        pytest.param(
            {"w": [{"axis": 0, "scale": i + 0.5, "zero_point": i} for i in range(4)]}, id="scales"
        ),
        pytest.param({"b": [{"quant_type": QuantType.QUInt8}]}, id="bias"),
        pytest.param({"b": [{"axis": 0}]}, id="bias by channels"),
        pytest.param({"x": []}, id="empty"),
    ],
)
def test_overrides_do_what_they_do_in_the_incumbents_models(overrides, per_channel) -> None:
    model = conv_relu()
    made = ours(model, overrides, per_channel)
    loads(made)
    if "x" in overrides and not overrides["x"]:  # where the incumbent asks None for a key
        assert_same_constants(made, ours(model, {}, per_channel))
    else:
        assert_same_constants(made, incumbents(model, overrides, per_channel))


@pytest.mark.ort(142)
def test_a_weight_has_one_scale_or_many_whatever_the_rest_has() -> None:
    model = conv_relu()
    assert constants(ours(model, {"w": [{"axis": 0}]}))["w_scale"].shape == (4,)
    one = {"w": [{"quant_type": QuantType.QInt8}]}
    assert constants(ours(model, one, per_channel=True))["w_scale"].shape == ()


@pytest.mark.ort(143)
def test_a_bias_of_which_something_is_said_is_no_int32() -> None:
    made = ours(conv_relu(), {"b": [{"quant_type": QuantType.QUInt8}]})
    assert constants(made)["b_quantized"].dtype == np.uint8
    assert constants(ours(conv_relu(), {}))["b_quantized"].dtype == np.int32


@pytest.mark.ort("G35", 130, 134)
@pytest.mark.parametrize("kind", [float, np.float32, np.array])
def test_an_activation_takes_numbers_of_any_kind(kind: Any) -> None:
    """The incumbent takes arrays of no dimensions only."""
    made = ours(conv_relu(), {"x": [{"scale": kind(0.25), "zero_point": np.uint8(kind(7))}]})
    found = constants(made)
    assert (float(found["x_scale"]), int(found["x_zero_point"])) == (0.25, 7)
    assert (found["x_scale"].dtype, found["x_zero_point"].dtype) == (np.float32, np.uint8)
    made = ours(conv_relu(), {"x": [{"rmin": kind(-1.0), "rmax": kind(4.1)}]})
    assert constants(made)["x_scale"] == np.float32((4.1 + 1.0) / 255)


@pytest.mark.ort("G35")
def test_an_activation_takes_python_numbers_and_the_incumbent_does_not() -> None:
    with pytest.raises(AttributeError):
        incumbents(conv_relu(), {"x": [{"scale": 0.25, "zero_point": 7}]})
    with pytest.raises(AttributeError):
        incumbents(conv_relu(), {"x": [{"rmin": -1.0, "rmax": 4.0}]})
    made = ours(conv_relu(), {"x": [{"scale": 0.25, "zero_point": 7}]})
    assert constants(made)["x_zero_point"] == 7


@pytest.mark.ort("G23", 134)
def test_one_entry_gives_its_range_to_all_channels_of_a_model() -> None:
    """The incumbent gives it to channel 0, and computes the others' from their values."""
    overrides = {"w": [{"axis": 0, "rmin": -12.7, "rmax": 12.7}]}
    model = conv_relu()
    assert constants(ours(model, overrides))["w_scale"].tolist() == [np.float32(0.1)] * 4
    assert len(set(constants(incumbents(model, overrides))["w_scale"].tolist())) == 4


@pytest.mark.ort("G38", 130)
def test_one_entry_gives_its_scale_to_all_channels_of_a_model() -> None:
    overrides = {"w": [{"axis": 0, "scale": 0.5, "zero_point": 0}]}
    made = ours(conv_relu(), overrides)
    assert constants(made)["w_scale"].tolist() == [0.5] * 4
    loads(made)
    with pytest.raises(IndexError):
        incumbents(conv_relu(), overrides)


@pytest.mark.ort("G37", 151)
def test_receivers_of_a_model_may_be_a_list() -> None:
    convert = {"quant_type": QuantType.QInt16, "recv_nodes": ["relu"]}
    made = ours(conv_relu(), {"h": [{"quant_type": QuantType.QUInt8, "convert": convert}]})
    nodes = {node.name: node for node in made.graph.node}
    assert nodes["relu"].input[0] == "h_convert_DequantizeLinear_Output"
    loads(made)


@pytest.mark.ort("G36", 47)
@pytest.mark.parametrize("place", [0, 1])
def test_a_type_in_any_entry_chooses_the_domain(place: int) -> None:
    """The incumbent counts the first entry's only: int4 at opset 17, without com.microsoft."""
    entries = [("x", [{"symmetric": True}]), ("w", [{"quant_type": QuantType.QInt4}])]
    model = conv_relu()
    model.opset_import[0].version, model.ir_version = 17, 8
    overrides = dict(entries if place else entries[::-1])
    assert onnx_domains(ours(model, overrides)) == {"com.microsoft"}
    loads(ours(model, overrides))
    made = incumbents(model, overrides)
    if place == 0:
        assert onnx_domains(made) == {"com.microsoft"}
        return
    assert onnx_domains(made) == {""}
    with pytest.raises(Exception, match="INVALID_GRAPH"):
        loads(made)


def onnx_domains(model: ModelProto) -> set[str]:
    """Return the domains of the nodes that make floats of codes."""
    return {node.domain for node in model.graph.node if node.op_type == "DequantizeLinear"}


@pytest.mark.ort(163)
@pytest.mark.parametrize(
    "entry",
    [
        {"quant_type": QuantType.QUInt16},
        {"quant_type": QuantType.QUInt8, "convert": {"quant_type": QuantType.QInt16}},
    ],
)
def test_types_of_sixteen_bits_raise_the_opset(entry: dict) -> None:
    model = conv_relu()
    model.opset_import[0].version, model.ir_version = 17, 8
    types = QuantType.QInt8, QuantType.QUInt8
    raised = update_opset_version(model, *types, {"x": [{"symmetric": True}], "h": [entry]})
    assert get_opset_version(raised) == 21
    assert get_opset_version(model) == 17
    made = ours(raised, {"h": [entry]})
    assert {node.domain for node in made.graph.node} == {""}
    loads(made)


def add_model() -> ModelProto:
    """Return y = x + c."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy"]
    constant = numpy_helper.from_array(np.float32([0.5, -1.0, 2.0]), "c")
    nodes = [helper.make_node("Add", ["x", "c"], ["y"], "add")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [constant])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.ort(124)
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_constant_that_is_added_has_the_type_of_activations(symmetric: bool) -> None:
    settings = {"ActivationSymmetric": symmetric, "WeightSymmetric": not symmetric}
    made = ours(add_model(), {}, per_channel=True, **settings)
    found = constants(made)
    assert found["c_quantized"].dtype == np.uint8
    assert found["c_zero_point"] == (128 if symmetric else 85)  # 1 / (3 / 255)
    assert_same_constants(made, incumbents(add_model(), {}, per_channel=True, **settings))


@pytest.mark.ort(343, 344, 345)
def test_scales_follow_the_formulas_of_the_documentation() -> None:
    for symmetric, scale, zero in ((False, 4 / 255, 64), (True, 6 / 255, 128)):
        found = constants(ours(conv_relu(), {}, ActivationSymmetric=symmetric))
        assert found["x_scale"] == np.float32(scale)  # of [-1, 3]
        assert found["x_zero_point"] == zero
    made = ours(conv_relu(), {"x": [{"quant_type": QuantType.QInt8, "symmetric": True}]})
    assert constants(made)["x_scale"] == np.float32(6 / 254)


@pytest.mark.ort(345)
@pytest.mark.parametrize("ends", [(1.0, 3.0), (-3.0, -1.0), (-1.0, 3.0)])
def test_zero_has_a_code_of_its_own(ends: tuple[float, float]) -> None:
    ranges = {name: TensorData(lowest=np.float32(ends[0]), highest=np.float32(ends[1]))
              for name in RANGES}  # fmt: skip
    data = TensorsData(CalibrationMethod.MinMax, ranges)
    types = QuantType.QInt8, QuantType.QUInt8
    quantizer = QDQQuantizer(conv_relu(), False, False, *types, data, [], [], TYPES)
    found = constants(quantizer.quantize_model())
    zero, scale = int(found["x_zero_point"]), found["x_scale"]
    assert scale == np.float32((max(ends[1], 0) - min(ends[0], 0)) / 255)
    assert zero == {1.0: 0, -3.0: 255, -1.0: 64}[ends[0]]
