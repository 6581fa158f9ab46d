"""DynamicQuantizeLSTM; GRU and RNN, which onnxruntime has no such kernels for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from models_of_text import batches, parse
from one_operator import attributes_of, constants_of, node_of, run, sqnr
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from quantizer_pairs import op_types, quality, quantize_incumbent, quantize_own

pytestmark = pytest.mark.ort(258)

HIDDEN, INPUT, BATCH, STEPS = 6, 5, 3, 4
NAMES = ("y", "yh", "yc")


def lstm(
    direction: str = "forward",
    layout: int = 0,
    optional: bool = False,
    half: bool = False,
    kind: str = "LSTM",
) -> ModelProto:
    """One recurrent node; with ``optional`` it has every optional input."""
    directions = 2 if direction == "bidirectional" else 1
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    rng = np.random.default_rng(0)
    dtype = np.float16 if half else np.float32
    shapes = {
        "w": (directions, gates * HIDDEN, INPUT),
        "r": (directions, gates * HIDDEN, HIDDEN),
        "b": (directions, 2 * gates * HIDDEN),
        "h0": (directions, BATCH, HIDDEN),
        "c0": (directions, BATCH, HIDDEN),
        "p": (directions, 3 * HIDDEN),
    }
    if layout:
        shapes |= {"h0": (BATCH, directions, HIDDEN), "c0": (BATCH, directions, HIDDEN)}
    used = ["w", "r", "b", "h0", "c0", "p"] if optional else ["w", "r"]
    constants = [
        numpy_helper.from_array(rng.normal(0, 0.4, shapes[name]).astype(dtype), name)
        for name in used
    ]
    inputs = ["x", "w", "r", *(["b", "", "h0", "c0", "p"] if optional else [])]
    attributes = {"layout": 1} if layout else {}
    count = 3 if kind == "LSTM" else 2
    node = helper.make_node(
        kind,
        inputs,
        NAMES[:count],
        "rnn",
        hidden_size=HIDDEN,
        direction=direction,
        **attributes,
    )
    element = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    x = (BATCH, STEPS, INPUT) if layout else (STEPS, BATCH, INPUT)
    graph = helper.make_graph(
        [node],
        "made",
        [helper.make_tensor_value_info("x", element, x)],
        [helper.make_tensor_value_info(name, element, None) for name in NAMES[:count]],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def data(layout: int = 0, half: bool = False) -> list[dict[str, np.ndarray]]:
    shape = (BATCH, STEPS, INPUT) if layout else (STEPS, BATCH, INPUT)
    dtype = np.float16 if half else np.float32
    return [{"x": batch["x"].astype(dtype)} for batch in batches({"x": shape})]


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_weights_are_int8_by_direction_or_by_row(
    direction: str, optional: bool, channels: bool
) -> None:
    model = lstm(direction, optional=optional)
    own = quantize_own(model, None, per_channel=channels).model.model
    node = node_of(own, "DynamicQuantizeLSTM")
    assert node.domain == "com.microsoft"
    assert len(node.input) == 12
    constants, directions = constants_of(own), 1 + (direction == "bidirectional")
    assert constants["w_quantized"].shape == (directions, INPUT, 4 * HIDDEN)
    assert constants["w_quantized"].dtype == np.int8
    assert constants["r_scale"].shape == ((directions, 4 * HIDDEN) if channels else (directions,))
    assert quality(model, own, data()) > 30


@pytest.mark.ort(54)
@pytest.mark.parametrize("channels", [False, True])
def test_weights_are_symmetric_whatever_is_asked_for(channels: bool) -> None:
    """The incumbent's zero points are refused by the kernel, at run time."""
    options = {"WeightSymmetric": False}
    own = quantize_own(lstm(), None, per_channel=channels, options=options).model.model
    assert not constants_of(own)["w_zero_point"].any()
    assert quality(lstm(), own, data()) > 30


@pytest.mark.ort("G10")
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_batch_first_goes_through_transposes(
    tmp_path: Path, direction: str, optional: bool
) -> None:
    """The incumbent drops the attribute, and the axes come out in the wrong order.

    onnxruntime's float LSTM has no ``layout=1``, so that the same layer the other way round is
    what is compared with.
    """
    model, plain = lstm(direction, 1, optional), lstm(direction, 0, optional)
    for tensor in plain.graph.initializer:
        found = next(t for t in model.graph.initializer if t.name == tensor.name)
        values = numpy_helper.to_array(found)
        if tensor.name in ("h0", "c0"):
            values = values.transpose(1, 0, 2)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
    own = quantize_own(model, None).model.model
    assert "layout" not in attributes_of(node_of(own, "DynamicQuantizeLSTM"))
    for batch in data(layout=1):
        y, h, c = run(plain, {"x": batch["x"].transpose(1, 0, 2)})
        wanted = [y.transpose(2, 0, 1, 3), h.transpose(1, 0, 2), c.transpose(1, 0, 2)]
        got = run(own, batch)
        assert [a.shape for a in got] == [a.shape for a in wanted]
        assert sqnr(wanted, got) > 30
    theirs = quantize_incumbent(model, None, tmp_path)
    assert "Transpose" not in op_types(theirs)


@pytest.mark.ort("G10")
def test_batch_first_is_what_the_reference_computes() -> None:
    model = lstm(layout=1)
    own = quantize_own(model, None).model.model
    batch = data(layout=1)[0]
    wanted = ReferenceEvaluator(model).run(["yh"], batch)
    assert sqnr([np.asarray(wanted[0])], [run(own, batch)[1]]) > 30


@pytest.mark.ort("G42")
@pytest.mark.parametrize("layout", [0, 1])
def test_float16_layers_compute_in_float32(layout: int) -> None:
    single, half = lstm("bidirectional", layout, True), lstm("bidirectional", layout, True, True)
    own = quantize_own(half, None).model.model
    wide = quantize_own(single, None).model.model
    for batch, narrow in zip(data(layout), data(layout, half=True), strict=True):
        got = run(own, narrow)
        assert {value.dtype for value in got} == {np.dtype(np.float16)}
        assert sqnr(run(wide, batch), got) > 30


@pytest.mark.ort("G54")
def test_codes_are_floats_before_the_node_reads_them() -> None:
    """The incumbent appends the DequantizeLinear node behind the LSTM."""
    model = parse("g = Gather(table, i) y, h = LSTM<hidden_size=6>(g, w, r)", {}, "int64[4,3] i")
    rng = np.random.default_rng(0)
    for name, shape in (("table", (9, 5)), ("w", (1, 24, 5)), ("r", (1, 24, 6))):
        array = rng.normal(0, 0.4, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    own = quantize_own(model, None).model.model
    assert op_types(own) == ["Gather", "DequantizeLinear", "DynamicQuantizeLSTM"]
    feeds = [{"i": np.arange(12).reshape(4, 3) % 9}]
    assert quality(model, own, feeds) > 30


def test_two_layers_may_share_their_weights() -> None:
    """The incumbent transposes the shared codes twice."""
    model = lstm()
    second = onnx.NodeProto()
    second.CopyFrom(model.graph.node[0])
    second.name, second.output[:] = "second", ["z"]
    model.graph.node.append(second)
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    for channels in (False, True):
        own = quantize_own(model, None, per_channel=channels).model.model
        assert op_types(own) == ["DynamicQuantizeLSTM"] * 2
        assert quality(model, own, data()) > 30


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_other_recurrent_layers_stay_float_and_the_report_says_why(kind: str) -> None:
    model = lstm(kind=kind)
    quantizer = quantize_own(model, None)
    assert op_types(quantizer.model.model) == [kind]
    (entry,) = quantizer.report.nodes
    assert not entry.quantized
    assert "QuantFormat.QDQ quantizes its weights" in entry.reason


def test_computed_weights_leave_the_node_float() -> None:
    model = lstm()
    weight = next(t for t in model.graph.initializer if t.name == "w")
    weight.name = "w0"
    model.graph.node.insert(0, helper.make_node("Tanh", ["w0"], ["w"], "tanh"))
    quantizer = quantize_own(model, None)
    assert op_types(quantizer.model.model) == ["Tanh", "LSTM"]
    assert "not constants" in quantizer.report.nodes[1].reason
