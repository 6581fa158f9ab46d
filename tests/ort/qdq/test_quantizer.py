"""The QDQ quantizer by itself: its options, its callbacks and what it costs."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from one_operator import Case, constants_of, make, node_of, run, sqnr
from onnx import ModelProto, TensorProto, helper
from operator_cases import CASES
from side_by_side import by_incumbent, by_qwrap, differences, observed, quantizer_of

from qwrap.ort.calibrate import TensorData
from qwrap.ort.errors import QuantizationError
from qwrap.ort.operators.qdq_base_operator import QDQOperatorBase
from qwrap.ort.qdq_quantizer import (
    QDQQuantizer,
    QDQQuantTensorType,
    QDQTensorQuantInfo,
    QDQTensorQuantParams,
)
from qwrap.ort.registry import CreateQDQQuantizer, QDQRegistry

IMAGE = {"x": (2, 3, 8, 8)}


def names(model: ModelProto) -> set[str]:
    return {node.name for node in model.graph.node}


@pytest.mark.ort(37, 177, 178)
def test_it_works_without_an_entry_point_and_leaves_the_model_alone() -> None:
    made = make(CASES["Conv_Relu_Conv"], 17)
    before = copy.deepcopy(made.model)
    model = by_qwrap(made.model, observed(made.model, made.batches))
    assert made.model == before
    onnx.checker.check_model(model, full_check=True)
    assert (model.producer_name, model.producer_version) == ("onnx.quantize", "0.1.0")


@pytest.mark.ort(169)
def test_inputs_and_outputs_stay() -> None:
    made = make(CASES["Conv"], 17)
    model = by_qwrap(made.model, observed(made.model, made.batches))
    for ends in ("input", "output"):
        got, wanted = (
            [(v.name, v.type.tensor_type.elem_type) for v in getattr(m.graph, ends)]
            for m in (model, made.model)
        )
        assert got == wanted


@pytest.mark.ort(178)
def test_the_static_argument_of_older_versions_is_accepted() -> None:
    made = make(CASES["Conv"], 17)
    ranges = observed(made.model, made.batches)
    older = quantizer_of(made.model, ranges, static=True, mode=None).quantize_model()
    assert differences(by_qwrap(made.model, ranges), older) == []


@pytest.mark.ort(179)
def test_ranges_must_be_tensor_data() -> None:
    made = make(CASES["Conv"], 17)
    with pytest.raises(TypeError, match="not TensorData"):
        QDQQuantizer(made.model, False, False, 3, 2, {"x": (0.0, 1.0)}, [], [], ["Conv"], {})


@pytest.mark.ort(60, 61, 172)
def test_pairs_by_reader_and_without_outputs() -> None:
    case = Case("a = Conv(x, w) c = Conv(x, w) y = Add(a, c)", IMAGE, {"y": 4}, {"w": (4, 3, 1, 1)})
    made = make(case, 17)
    ranges = observed(made.model, made.batches)
    shared = by_qwrap(made.model, ranges)
    assert [n.input[0] for n in shared.graph.node if n.op_type == "Conv"] == [
        "x_DequantizeLinear_Output"
    ] * 2
    own = by_qwrap(made.model, ranges, options={"DedicatedQDQPair": True})
    assert [n.input[0] for n in own.graph.node if n.op_type == "Conv"] == [
        "x_DequantizeLinear_Output_1",
        "x_DequantizeLinear_Output_2",
    ]
    bare = by_qwrap(
        made.model, ranges, options={"OpTypesToExcludeOutputQuantization": ["Conv", "Add"]}
    )
    assert node_of(bare, "Add").output[0] == "y"
    for model in (shared, own, bare):
        assert sqnr(run(made.model, made.batches[0]), run(model, made.batches[0], True)) > 30


@pytest.mark.ort(59, 64, 170)
def test_weights_of_pairs_stay_float_and_contrib_operators_are_imported() -> None:
    made = make(CASES["Conv"], 17)
    ranges = observed(made.model, made.batches)
    options = {"AddQDQPairToWeight": True, "UseQDQContribOps": True}
    model = by_qwrap(made.model, ranges, options=options)
    assert constants_of(model)["w"].dtype == np.float32
    assert {"w_QuantizeLinear", "w_DequantizeLinear"} <= names(model)
    assert {n.domain for n in model.graph.node if "antizeLinear" in n.op_type} == {"com.microsoft"}
    assert ("com.microsoft", 1) in {(o.domain, o.version) for o in model.opset_import}
    assert "w" not in constants_of(by_qwrap(made.model, ranges))


@pytest.mark.ort(52, 53, 54, 67)
def test_options_of_scales() -> None:
    made = make(CASES["Conv"], 17)
    ranges = observed(made.model, made.batches)

    def found(**settings: Any) -> dict[str, np.ndarray]:
        return constants_of(by_qwrap(made.model, ranges, **settings))

    for kind, zero in (("QInt8", 0), ("QUInt8", 128), ("QUInt16", 32768), ("QInt16", 0)):
        settings = {"activation": kind, "options": {"ActivationSymmetric": True}}
        assert found(**settings)["x_zero_point"] == zero
    assert found(options={"ActivationRestrictedAsymmetric": True})["x_zero_point"] in (0, 128)
    assert found(weight="QUInt8")["w_zero_point"] != 128
    assert found(weight="QUInt8", options={"WeightSymmetric": True})["w_zero_point"] == 128
    assert found(options={"MinimumRealRange": 1e3})["x_scale"] == pytest.approx(1e3 / 255, 1e-5)


@pytest.fixture
def registered() -> Iterator[list[str]]:
    """A class for Sin of which users would say: an extension of their own."""
    called: list[str] = []

    class Mine(QDQOperatorBase):
        def quantize(self) -> None:
            called.append(self.node.name)
            self.quantizer.quantize_activation_tensor(self.node.input[0])
            self.quantizer.quantize_output_same_as_input(
                self.node.output[0], self.node.input[0], self.node.name
            )

    QDQRegistry["Sin"] = Mine
    yield called
    del QDQRegistry["Sin"]


@pytest.mark.ort(180, 181)
def test_a_registered_class_is_called_back(registered: list[str]) -> None:
    made = make(Case("y = Sin(x)", IMAGE, {"y": 4}), 17)
    types = ["Sin"]
    ranges = observed(made.model, made.batches, types)
    model = by_qwrap(made.model, ranges, op_types_to_quantize=types)
    assert registered == ["/y"]
    pair = next(n for n in model.graph.node if n.name == "y_QuantizeLinear")
    assert pair.input[1] == "x_scale"


@pytest.mark.ort(180)
def test_a_registered_class_may_replace_its_node() -> None:
    """What it adds to the model is written with the rest."""

    class Swap(QDQOperatorBase):
        def quantize(self) -> None:
            self.quantizer.remove_node(self.node)
            node = helper.make_node("Tanh", [self.node.input[0]], [self.node.output[0]], "swapped")
            self.quantizer.model.add_node(node)
            self.quantizer.quantize_activation_tensor(self.node.input[0])
            self.quantizer.quantize_activation_tensor(self.node.output[0])

    QDQRegistry["Sin"] = Swap
    try:
        made = make(Case("y = Sin(x)", IMAGE, {"y": 4}), 17)
        ranges = observed(made.model, made.batches, ["Sin"])
        model = by_qwrap(made.model, ranges, op_types_to_quantize=["Sin"])
    finally:
        del QDQRegistry["Sin"]
    onnx.checker.check_model(model)  # nodes are in order
    assert list(node_of(model, "Tanh").input) == ["x_DequantizeLinear_Output"]
    assert list(node_of(model, "Tanh").output) == ["y_QuantizeLinear_Input"]
    assert "Sin" not in {n.op_type for n in model.graph.node}
    wanted = np.tanh(made.batches[0]["x"])
    assert sqnr([wanted], run(model, made.batches[0])) > 30


@pytest.mark.ort(180)
def test_callbacks_answer_what_was_marked() -> None:
    made = make(CASES["Conv"], 17)
    quantizer = quantizer_of(made.model, observed(made.model, made.batches), per_channel=True)
    assert not quantizer.is_tensor_quantized("x")
    quantizer.quantize_activation_tensor("x")
    assert quantizer.is_tensor_quantized("x")
    assert quantizer.is_tensor_per_channel("w", 0) == (True, 0)
    assert quantizer.is_tensor_per_channel("w", -1) == (True, 3)
    assert quantizer.is_tensor_per_channel("w", 4) == (False, None)
    assert quantizer.is_tensor_per_channel("x", 0) == (False, None)
    quantizer.quantize_weight_tensor_per_channel("w", 0)
    marked = quantizer.tensors_to_quantize["w"]
    assert (marked.axis, marked.tensor_type) == (0, QDQQuantTensorType.WEIGHT)
    quantizer.quantize_bias_tensor("/y", "b", "x", "w")
    assert quantizer.bias_to_quantize["b"].weight_name == "w"
    assert isinstance(quantizer.quantization_params["x"], QDQTensorQuantParams)
    data = TensorData(lowest=np.float32(-1), highest=np.float32(1))
    scale = quantizer.calc_quant_params(data, {"quant_type": QuantTypeOf(TensorProto.INT8)})
    assert scale["scale"] == pytest.approx(2 / 255)
    with pytest.raises(QuantizationError, match="data_type"):
        QDQTensorQuantInfo()


class QuantTypeOf:
    """What overrides hold, by its number."""

    def __init__(self, tensor_type: int) -> None:
        self.tensor_type = tensor_type


@pytest.mark.ort(5, 206)
@pytest.mark.parametrize("kind", ["Sub", "Div", "Erf", "Tanh", "Exp", "CumSum", "Pow"])
def test_any_other_type_has_pairs_around_it(kind: str) -> None:
    operands = {"Sub": "x, z", "Div": "x, z", "Pow": "x, z", "CumSum": "x, axis"}.get(kind, "x")
    made = make(
        Case(
            f"y = {kind}({operands})",
            {"x": (3, 4)},
            {"y": 2},
            {"z": np.full((4,), 2.0)} if "z" in operands else {"axis": np.array([1])},
        ),
        17,
    )
    ranges = observed(made.model, made.batches, [kind])
    model = by_qwrap(made.model, ranges, op_types_to_quantize=[kind])
    assert {"x_QuantizeLinear", "y_QuantizeLinear"} <= names(model)
    expected = by_incumbent(made.model, ranges, op_types_to_quantize=[kind])
    assert differences(expected, model) == []
    assert type(CreateQDQQuantizer(quantizer_of(made.model, ranges), made.model.graph.node[0]))


@pytest.mark.ort(50, 216)
def test_integers_are_never_quantized() -> None:
    for name in ("Reshape", "Gather", "TopK", "Where"):
        made = make(CASES[name], 17)
        types = ["Conv", "Reshape", "Gather", "TopK", "Where", "Greater"]
        ranges = observed(made.model, made.batches, types)
        model = by_qwrap(made.model, ranges, op_types_to_quantize=types)
        assert not names(model) & {f"{t}_QuantizeLinear" for t in ("shape", "ids", "at", "k", "c")}
        run(model, made.batches[0])


@pytest.mark.ort(58, 176)
def test_a_tensor_of_unknown_type_is_skipped_or_takes_the_default(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "mine": 1]> g (float[2,4] x) => (float[2,4] y)'
        "{ h = mine.Own(x) y = Sigmoid(h) }"
    )
    ends = np.float32(-1), np.float32(1)
    ranges = dict.fromkeys(("x", "h", "y"), ends)
    found = by_qwrap(model, ranges)
    assert "failed to infer the type of tensor: h. Skip to quantize it." in caplog.text
    assert names(found) & {"h_QuantizeLinear", "y_QuantizeLinear"} == {"y_QuantizeLinear"}
    typed = by_qwrap(model, ranges, options={"DefaultTensorType": TensorProto.FLOAT})
    assert "h_QuantizeLinear" in names(typed)


@pytest.mark.ort(168)
def test_scales_do_not_take_the_names_of_other_tensors() -> None:
    """onnxruntime's tool takes the weight ``h_scale`` for the scale of ``h``."""
    weights = {"w": (4, 3, 1, 1), "h_scale": (1,)}
    case = Case("h = Conv(x, w) y = Mul(h, h_scale)", IMAGE, {"y": 4}, weights)
    made = make(case, 17)
    model = by_qwrap(made.model, observed(made.model, made.batches))
    assert sqnr(run(made.model, made.batches[0]), run(model, made.batches[0], True)) > 30


@pytest.mark.ort(170)
def test_weights_that_are_graph_inputs_too_become_codes() -> None:
    made = make(CASES["Conv"], 17)
    for tensor in made.model.graph.initializer:
        made.model.graph.input.append(
            helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, list(tensor.dims))
        )
    ranges = dict(observed(make(CASES["Conv"], 17).model, made.batches))
    model = by_qwrap(made.model, ranges)
    assert [value.name for value in model.graph.input] == ["x"]
    assert sqnr(run(made.model, made.batches[0]), run(model, made.batches[0], True)) > 30


def chain_of(count: int) -> ModelProto:
    nodes = "".join(f"h{i + 1} = Conv(h{i}, w{i}, b) " for i in range(count))
    weights: dict[str, Any] = {f"w{i}": (2, 2, 1, 1) for i in range(count)}
    case = Case(nodes, {"h0": (1, 2, 4, 4)}, {f"h{count}": 4}, {**weights, "b": (2,)})
    return make(case, 17).model


@pytest.mark.ort("G61")
def test_time_grows_with_the_model_and_not_with_its_square() -> None:
    """One pass with dictionaries. onnxruntime's tool scans all nodes for each tensor."""

    def seconds(count: int) -> float:
        model = chain_of(count)
        ends = np.float32(-1), np.float32(1)
        ranges = {f"h{i}": ends for i in range(count + 1)}
        quantizer = quantizer_of(model, ranges)
        start = time.perf_counter()
        quantizer.quantize_model()
        return time.perf_counter() - start

    seconds(10)
    small, large = (min(seconds(count) for _ in range(3)) for count in (100, 800))
    assert large < 24 * small  # 8 if linear, 64 if quadratic


@pytest.mark.ort(251)
def test_it_is_quiet(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(CASES["Conv"], 17)
    ranges = observed(made.model, made.batches)
    capsys.readouterr()
    with caplog.at_level(logging.WARNING):
        by_qwrap(made.model, ranges)
    assert (caplog.text, capsys.readouterr().out) == ("", "")
