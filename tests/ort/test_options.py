"""What is asked for is checked before anything runs; the incumbent takes it without a word."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime.quantization as incumbent
import pytest
from onnx import TensorProto, helper, numpy_helper

import qwrap.ort as ort
from qwrap.ort.entry.options import OPTIONS
from qwrap.ort.errors import QuantizationError, UnknownNameError

RNG = np.random.default_rng(0)


class Reader(ort.CalibrationDataReader):
    """Three batches; counts how often it was asked."""

    def __init__(self) -> None:
        self.batches = [{"x": RNG.normal(size=(4, 8)).astype(np.float32)} for _ in range(3)]
        self.rest = iter(self.batches)
        self.asked = 0

    def get_next(self) -> Any:
        self.asked += 1
        return next(self.rest, None)


def chain() -> onnx.ModelProto:
    """Return x -> MatMul "first" -> Relu "middle" -> MatMul "second" -> y."""
    weights = [
        numpy_helper.from_array(RNG.normal(size=(8, 8)).astype(np.float32), name)
        for name in ("w1", "w2")
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "middle"),
        helper.make_node("MatMul", ["b", "w2"], ["y"], "second"),
    ]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 8]) for n in "xy"]
    graph = helper.make_graph(nodes, "chain", value[:1], value[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def quantize(**arguments: Any) -> onnx.ModelProto:
    model = ort.quantize_static(chain(), None, **arguments)
    assert model is not None
    return model


@pytest.mark.ort("G24", 80)
def test_an_unknown_option_is_refused_with_the_nearest_before_calibration() -> None:
    reader = Reader()
    with pytest.raises(
        QuantizationError, match=r"no key 'ActivationSymetric'.*ActivationSymmetric"
    ):
        quantize(calibration_data_reader=reader, extra_options={"ActivationSymetric": True})
    assert reader.asked == 0


@pytest.mark.ort("G24")
def test_the_incumbent_takes_unknown_options_and_nodes(tmp_path: Path) -> None:
    incumbent.quantize_static(
        chain(),
        tmp_path / "q.onnx",
        Reader(),
        nodes_to_exclude=["scond"],
        extra_options={"ActivationSymetric": True},
    )
    assert (tmp_path / "q.onnx").exists()


@pytest.mark.ort("G24", 7, 8)
@pytest.mark.parametrize("argument", ["nodes_to_quantize", "nodes_to_exclude"])
def test_an_unknown_node_is_refused_with_the_nearest_before_calibration(argument: str) -> None:
    reader = Reader()
    with pytest.raises(UnknownNameError, match=f"{argument}.*'scond'.*'second'"):
        quantize(calibration_data_reader=reader, **{argument: ["scond"]})
    assert reader.asked == 0


def test_a_constant_node_may_be_excluded() -> None:
    model = chain()
    weight = next(t for t in model.graph.initializer if t.name == "w1")
    node = helper.make_node("Constant", [], ["w1"], "weight", value=weight)
    model.graph.initializer.remove(weight)
    model.graph.node.insert(0, node)
    config = ort.get_qdq_config(
        model, Reader(), nodes_to_exclude=lambda _, node: node.op_type in ("Constant", "Relu")
    )
    quantized = ort.quantize(model, None, config)
    assert quantized is not None
    assert "w1_quantized" in {t.name for t in quantized.graph.initializer}


@pytest.mark.ort("G24", 151)
def test_an_unknown_receiver_is_refused_before_calibration() -> None:
    reader = Reader()
    convert = {"quant_type": ort.QuantType.QUInt16, "recv_nodes": {"secnd"}}
    overrides = {"b": [{"quant_type": ort.QuantType.QUInt8, "convert": convert}]}
    with pytest.raises(UnknownNameError, match=r"recv_nodes.*'b'.*'secnd'.*'second'"):
        quantize(calibration_data_reader=reader, extra_options={"TensorQuantOverrides": overrides})
    assert reader.asked == 0


@pytest.mark.ort("G63", 18, 19, 20, 22, 140)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"activation_type": ort.QuantType.QInt8, "weight_type": ort.QuantType.QUInt8},
            "ONNXRuntime quantization doesn't support data format:activation_type="
            "QuantType.QInt8, weight_type=QuantType.QUInt8",
        ),
        (
            {
                "activation_type": ort.QuantType.QFLOAT8E4M3FN,
                "calibrate_method": ort.CalibrationMethod.Distribution,
            },
            "doesn't support data format",
        ),
        (
            {
                "weight_type": ort.QuantType.QFLOAT8E4M3FN,
                "calibrate_method": ort.CalibrationMethod.Distribution,
            },
            "doesn't support data format",
        ),
        (
            {
                "activation_type": ort.QuantType.QFLOAT8E4M3FN,
                "weight_type": ort.QuantType.QFLOAT8E4M3FN,
            },
            "Only Distribution calibration method is supported for float quantization.",
        ),
        (
            {
                "activation_type": ort.QuantType.QInt16,
                "quant_format": ort.QuantFormat.QOperator,
            },
            "Only QuantFormat.QDQ supports 16-bit quantization types.",
        ),
        (
            {"weight_type": ort.QuantType.QInt4, "quant_format": ort.QuantFormat.QOperator},
            "Only QuantFormat.QDQ supports 4-bit quantization types.",
        ),
        (
            {"extra_options": {"TensorQuantOverrides": {"c": [{"symmetric": True}]}}},
            "Tensor 'c' in TensorQuantOverrides is not present in the model",
        ),
        (
            {"nodes_to_quantize": ["first"], "nodes_to_exclude": ["first"]},
            "'first' is in nodes_to_quantize and",
        ),
        ({"op_types_to_quantize": ["MatMull"]}, "'MatMull' does not exist; 'MatMul'"),
        ({"nodes_to_exclude": "first"}, "must be a list of names"),
    ],
)
def test_what_cannot_be_is_refused_before_calibration(
    arguments: dict[str, Any], message: str
) -> None:
    reader = Reader()
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(calibration_data_reader=reader, **arguments)
    assert reader.asked == 0


@pytest.mark.ort(72, 74)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("CalibPercentile", 101, "a number from 0 to 100"),
        ("CalibMovingAverageConstant", 1.5, "Invalid averaging constant, which should not be"),
        ("CalibMaxIntermediateOutputs", 0, "above 0"),
        ("ActivationSymmetric", "yes", "True or False"),
        ("BlockSize", -1, "a whole number"),
        ("QDQOpTypePerChannelSupportToAxis", {"MatMul": "1"}, "from operator type to axis"),
        ("OpTypesToExcludeOutputQuantization", "MatMul", "a list of operator types"),
        ("DefaultTensorType", "float", "TensorProto.DataType"),
        ("MinimumRealRange", -1.0, "above 0"),
        ("SmoothQuantAlpha", 2, "from 0 to 1"),
    ],
)
def test_a_value_that_cannot_be_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(calibration_data_reader=Reader(), extra_options={key: value})


@pytest.mark.ort(*range(52, 80))
def test_every_documented_option_exists_and_none_of_its_defaults_is_refused() -> None:
    assert len(OPTIONS) == 28 + 3
    options = {key: option.default for key, option in OPTIONS.items()}
    quantize(calibration_data_reader=Reader(), extra_options=options)


def test_an_option_without_effect_in_the_form_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        quantize(
            calibration_data_reader=Reader(),
            quant_format=ort.QuantFormat.QOperator,
            activation_type=ort.QuantType.QUInt8,
            extra_options={"DedicatedQDQPair": True, "CalibPercentile": 99.0},
        )
    assert "extra_options['DedicatedQDQPair'] has no effect but in form QDQ" in caplog.text
    assert "extra_options['CalibPercentile'] has no effect but with method" in caplog.text


@pytest.mark.ort("G41", "G40")
@pytest.mark.parametrize("weight_type", ["QInt16", "QUInt16", "QInt4", "QUInt4", "QFLOAT8E4M3FN"])
def test_dynamic_quantization_takes_8_bit_weights_only(weight_type: str) -> None:
    """The incumbent writes an invalid model with QInt16, and dies on 4 bits."""
    with pytest.raises(ValueError, match=f"QInt8 or QUInt8, not {weight_type}"):
        ort.quantize_dynamic(chain(), None, weight_type=ort.QuantType[weight_type])
