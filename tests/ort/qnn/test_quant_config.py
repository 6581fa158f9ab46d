"""Settings for Qualcomm's provider against onnxruntime's."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from onnxruntime import quantization as incumbent_quantization
from onnxruntime.quantization.execution_providers import qnn as incumbent

from qwrap.ort.calibrate import CalibrationDataReader, CalibrationMethod
from qwrap.ort.enums import QuantFormat, QuantType
from qwrap.ort.execution_providers.qnn import get_qnn_qdq_config
from qwrap.ort.quantize import quantize

U8, S8 = QuantType.QUInt8, QuantType.QInt8
U16, S16, U4 = QuantType.QUInt16, QuantType.QInt16, QuantType.QUInt4


class Reader(CalibrationDataReader):
    def __init__(self) -> None:
        shapes = range(3)
        rng = np.random.default_rng(2)
        batches = [{"x": rng.normal(0, 1, (2, 4, 8)).astype(np.float32)} for _ in shapes]
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def network(version: int = 17) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": {version}]> g (float[2,4,8] x) => (float[2,4,6] y) {{
            n = LayerNormalization(x, scale, bias)
            m = MatMul(n, w)
            s = Sigmoid(m)
            t = Tanh(s)
            f = Cast<to=1>(t)
            y = MatMul(f, v)
        }}"""
    )
    rng = np.random.default_rng(3)
    for name, shape in {"scale": (8,), "bias": (8,), "w": (8, 5), "v": (5, 6)}.items():
        value = rng.normal(0, 1, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    for index, node in enumerate(model.graph.node):
        node.name = f"node_{index}"
    return model


def plain(value: object) -> object:
    """Comparable between the two: enumerations by name, arrays with their type, types sorted."""
    if hasattr(value, "name"):
        return value.name
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.tolist()
    if isinstance(value, dict):
        return {k: sorted(v) if k == "recv_nodes" else plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value


def described(config: object) -> dict[str, object]:
    told = {k: plain(v) for k, v in vars(config).items() if k != "calibration_data_reader"}
    told.pop("calibration_cache_path", None)
    told["op_types_to_quantize"] = sorted(told["op_types_to_quantize"])
    return told


def both(model: object, **arguments: object) -> list[dict[str, object]]:
    def translated(value: object) -> object:
        if isinstance(value, QuantType):
            return incumbent_quantization.QuantType[value.name]
        if isinstance(value, dict):
            return {k: translated(v) for k, v in value.items()}
        return [translated(v) for v in value] if isinstance(value, list) else value

    theirs = incumbent.get_qnn_qdq_config(
        model, None, **{k: translated(v) for k, v in arguments.items()}
    )
    return [described(get_qnn_qdq_config(model, None, **arguments)), described(theirs)]


@pytest.mark.ort(331)
def test_the_signature_is_onnxruntimes() -> None:
    ours = inspect.signature(get_qnn_qdq_config).parameters.values()
    theirs = inspect.signature(incumbent.get_qnn_qdq_config).parameters.values()
    assert [p.name for p in ours] == [p.name for p in theirs]
    assert [plain(p.default) for p in ours] == [plain(p.default) for p in theirs]


@pytest.mark.ort(332, 333, 334, 335, 336, 337)
@pytest.mark.parametrize("version", [17, 21])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"weight_type": S8},
        {"activation_type": U16},
        {"activation_type": S16, "weight_type": S8, "activation_symmetric": True},
        {"activation_type": U16, "weight_type": S16, "weight_symmetric": False},
        {"weight_type": U4, "keep_removable_activations": True},
        {"stride": 2, "calibration_providers": ["CPUExecutionProvider"]},
        {"op_types_to_quantize": ["MatMul", "Tanh"], "activation_type": U16},
        {"nodes_to_exclude": ["node_2"], "activation_type": U16},
        {"init_overrides": {"s": [{"quant_type": U16}]}},
        {"init_overrides": {"s": [{"quant_type": U16}]}, "add_qtype_converts": False},
        {"init_overrides": {"m": [{"quant_type": S16}], "w": [{"quant_type": S8}]}},
        {"init_overrides": {"w": [{"quant_type": S8, "axis": 1}]}, "activation_type": U16},
    ],
    ids=str,
)
def test_settings_are_onnxruntimes(
    arguments: dict[str, object], per_channel: bool, version: int
) -> None:
    before = copy.deepcopy(arguments)
    ours, theirs = both(network(version), per_channel=per_channel, **arguments)
    assert ours == theirs
    assert arguments == before


@pytest.mark.ort(332)
def test_the_settings_are_the_documented_ones() -> None:
    config = get_qnn_qdq_config(network(), Reader(), weight_type=S8, stride=3)
    assert config.quant_format is QuantFormat.QDQ
    assert config.calibrate_method is CalibrationMethod.MinMax
    assert config.extra_options == {
        "MinimumRealRange": 0.0001,
        "DedicatedQDQPair": False,
        "QDQKeepRemovableActivations": False,
        "TensorQuantOverrides": {},
        "ActivationSymmetric": False,
        "WeightSymmetric": True,
        "CalibStridedMinMax": 3,
    }
    assert config.op_types_to_quantize == ["LayerNormalization", "MatMul", "Sigmoid", "Tanh"]


@pytest.mark.ort(334, 335)
@pytest.mark.parametrize(
    ("kind", "sigmoid", "tanh"),
    [(U16, (1 / 65536, 0), (1 / 32768, 32768)), (S16, (1 / 32768, 0), (1 / 32768, 0))],
)
def test_sigmoid_and_tanh_have_the_scales_of_their_ranges(
    kind: QuantType, sigmoid: tuple[float, int], tanh: tuple[float, int]
) -> None:
    config = get_qnn_qdq_config(network(), None, activation_type=kind)
    overrides = config.extra_options["TensorQuantOverrides"]
    got = [(float(e["scale"]), int(e["zero_point"])) for e in (*overrides["s"], *overrides["t"])]
    assert got == [sigmoid, tanh]


@pytest.mark.ort(336)
def test_a_weight_that_was_overridden_otherwise_stays_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = {"w": [{"quant_type": S16}]}
    config = get_qnn_qdq_config(network(), None, activation_type=U16, init_overrides=given)
    assert config.extra_options["TensorQuantOverrides"]["w"] == [{"quant_type": S16}]
    assert "Unable to override quant_type/symmetric for MatMul" in caplog.text


@pytest.mark.ort(331, "G11")
def test_a_weight_in_a_constant_node_is_a_weight() -> None:
    """onnxruntime's gives it the type of activations."""
    model = network()
    weight = model.graph.initializer[2]
    node = onnx.helper.make_node("Constant", [], ["w"], "const", value=weight)
    model.graph.node.insert(0, node)
    del model.graph.initializer[2]
    ours, theirs = both(model, activation_type=U16)
    assert ours["extra_options"]["TensorQuantOverrides"]["w"] == [
        {"quant_type": "QUInt8", "symmetric": False}
    ]
    assert "w" not in theirs["extra_options"]["TensorQuantOverrides"]


@pytest.mark.ort(331, 332)
def test_a_path_is_read_without_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(network(), path, save_as_external_data=True, size_threshold=10)
    for file in tmp_path.iterdir():
        if file != path:
            file.unlink()
    ours, theirs = both(path, activation_type=U16)
    assert ours == theirs
    assert ours["use_external_data_format"] is True
    with pytest.raises(FileNotFoundError, match="no such file"):
        get_qnn_qdq_config(tmp_path / "none.onnx", None)


@pytest.mark.ort(167, 333)
def test_overrides_that_contradict_each_other_are_refused() -> None:
    given = {"s": [{"quant_type": U16}], "m": [{"quant_type": S16}]}
    with pytest.raises(ValueError, match="multiple types"):
        get_qnn_qdq_config(network(), None, init_overrides=given)


@pytest.mark.ort(331, 333, 337)
def test_a_model_quantized_so_computes_the_same() -> None:
    model = network()
    config = get_qnn_qdq_config(
        model, Reader(), weight_type=S8, init_overrides={"s": [{"quant_type": U16}]}
    )
    made = quantize(model, None, config)
    x = next(Reader())["x"]
    results = []
    for proto in (model, made):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        opened = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        results.append(opened.run(None, {"x": x})[0])
    want, got = results
    noise = 10 * np.log10(np.square(want).sum() / np.square(want - got).sum())
    assert noise > 25  # dB; 8 bits of weights and activations, measured 31.1
