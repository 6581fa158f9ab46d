"""Recurrent layers against onnxruntime, the reference implementation and finite differences."""

from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qwrap import ops
from qwrap.errors import ModelError

rng = np.random.default_rng(4)
SEQ, BATCH, INPUT, HIDDEN = 6, 3, 5, 4
# Six steps of sums of nine products through saturating functions.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def floats(*shape: int) -> np.ndarray:
    return rng.uniform(-1, 1, shape).astype(np.float32)


def inputs(directions: int, count: int, op_type: str = "LSTM") -> list[np.ndarray]:
    state = (directions, BATCH, HIDDEN)
    rows = GATES[op_type] * HIDDEN
    return [
        floats(SEQ, BATCH, INPUT),
        floats(directions, rows, INPUT),
        floats(directions, rows, HIDDEN),
        floats(directions, 2 * rows),
        np.array([6, 2, 4], np.int32),
        floats(*state),
        floats(*state),
        floats(directions, 3 * HIDDEN),
    ][:count]


def without(arrays: list[np.ndarray], *indices: int) -> list[np.ndarray | None]:
    return [None if i in indices else a for i, a in enumerate(arrays)]


def computed(
    op_type: str, opset: int, arrays: list[np.ndarray | None], **attributes: Any
) -> list[np.ndarray]:
    layer = ops.find("", op_type, opset)
    assert layer is not None
    arguments = [None if a is None else torch.from_numpy(a) for a in arrays]
    return [output.numpy() for output in layer.function(*arguments, **attributes)]


DIRECTIONS = [("forward", 1), ("reverse", 1), ("bidirectional", 2)]


@pytest.mark.parametrize(("direction", "count"), DIRECTIONS)
def test_fused_lstm_equals_onnxruntime(check, direction, count) -> None:
    attributes = {"direction": direction, "hidden_size": HIDDEN}
    check("LSTM", 7, inputs(count, 3), attributes, outputs=3, **CLOSE)
    arrays = without(inputs(count, 7), 4)
    check("LSTM", 14, arrays, attributes, outputs=3, **CLOSE)


@pytest.mark.parametrize(("direction", "count"), DIRECTIONS)
def test_lstm_with_lengths_and_peepholes_equals_onnxruntime(check, direction, count) -> None:
    attributes = {"direction": direction, "hidden_size": HIDDEN}
    check("LSTM", 14, inputs(count, 5), attributes, outputs=3, **CLOSE)
    check("LSTM", 14, inputs(count, 8), attributes, outputs=3, **CLOSE)
    check("LSTM", 22, without(inputs(count, 8), 4), attributes, outputs=3, **CLOSE)


def test_clip_and_coupled_gates_equal_onnxruntime(check) -> None:
    attributes = {"hidden_size": HIDDEN, "clip": 0.3}
    check("LSTM", 14, inputs(1, 4), attributes, outputs=3, **CLOSE)
    attributes = {"hidden_size": HIDDEN, "input_forget": 1}
    check("LSTM", 14, inputs(1, 4), attributes, outputs=3, **CLOSE)


ACTIVATIONS = [
    {"activations": ["HardSigmoid", "Softsign", "Relu"]},
    {
        "activations": ["HardSigmoid", "LeakyRelu", "ScaledTanh"],
        "activation_alpha": [0.3, 0.1, 1.5],
        "activation_beta": [0.4, 0.8],
    },
    {"activations": ["Sigmoid", "Elu", "Affine"], "activation_alpha": [0.5, 2.0]},
    {"activations": ["Sigmoid", "ThresholdedRelu", "Softplus"], "activation_alpha": [0.1]},
    {"activations": ["Sigmoid", "Tanh", "Tanh"]},
]


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_other_activations_equal_onnxruntime(check, activations) -> None:
    attributes = {"hidden_size": HIDDEN, **activations}
    check("LSTM", 14, inputs(1, 4), attributes, outputs=3, **CLOSE)


@pytest.mark.parametrize(("direction", "count"), DIRECTIONS)
@pytest.mark.parametrize("op_type", ["RNN", "GRU"])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"clip": 0.3},
        {"activations": ["Sigmoid", "Relu"]},
        {"activations": ["Softsign", "Elu"]},
        {"activations": ["HardSigmoid", "ScaledTanh"], "activation_beta": [0.4, 0.8]},
    ],
    ids=str,
)
def test_rnn_and_gru_equal_onnxruntime(check, op_type, attributes, direction, count) -> None:
    attributes = {"direction": direction, "hidden_size": HIDDEN, **attributes}
    if "activations" in attributes:
        kept = attributes["activations"][1 if op_type == "RNN" else 0 :]
        attributes["activations"] = kept * count
    arrays = inputs(count, 6, op_type)
    for given in (arrays, without(arrays, 4), without(arrays, 3), arrays[:3]):
        check(op_type, 14, given, attributes, outputs=2, **CLOSE)


@pytest.mark.parametrize(("direction", "count"), DIRECTIONS)
@pytest.mark.parametrize("clip", [None, 0.3])
def test_gru_with_reset_after_the_product_equals_onnxruntime(check, direction, count, clip) -> None:
    attributes = {"direction": direction, "hidden_size": HIDDEN, "linear_before_reset": 1}
    attributes |= {} if clip is None else {"clip": clip}
    arrays = inputs(count, 6, "GRU")
    for given in (arrays, without(arrays, 4), without(arrays, 3), arrays[:3]):
        check("GRU", 14, given, attributes, outputs=2, **CLOSE)


def test_directions_may_differ_in_their_activations(check) -> None:
    names = ["Sigmoid", "Elu", "LeakyRelu", "HardSigmoid", "Tanh", "Elu"]
    attributes = {"direction": "bidirectional", "hidden_size": HIDDEN, "activations": names}
    attributes |= {"activation_alpha": [0.7, 0.2, 0.3, 1.3], "activation_beta": [0.4]}
    check("LSTM", 14, inputs(2, 8), attributes, outputs=3, **CLOSE)


@pytest.mark.parametrize("name", ["Affine", "ScaledTanh", "ThresholdedRelu", "LeakyRelu", "Elu"])
def test_numbers_left_out_are_those_of_onnxruntime(check, name) -> None:
    attributes = {"hidden_size": HIDDEN, "activations": [name]}
    check("RNN", 14, inputs(1, 6, "RNN"), attributes, outputs=2, **CLOSE)


@pytest.mark.parametrize("attributes", [{}, {"clip": 9.0}], ids=["fused", "unrolled"])
@pytest.mark.parametrize("op_type", GATES)
def test_an_empty_sequence_has_zero_states_as_in_onnxruntime(check, op_type, attributes) -> None:
    arrays = inputs(2, 7 if op_type == "LSTM" else 6, op_type)
    arrays[4] = np.array([0, 6, 1], np.int32)
    attributes = {"direction": "bidirectional", "hidden_size": HIDDEN, **attributes}
    check(op_type, 14, arrays, attributes, outputs=3 if op_type == "LSTM" else 2, **CLOSE)


def test_lstm_without_last_cell_states_equals_onnxruntime(check) -> None:
    attributes = {"direction": "bidirectional", "hidden_size": HIDDEN}
    check("LSTM", 14, inputs(2, 7), attributes, outputs=2, **CLOSE)


@pytest.mark.parametrize("op_type", ["RNN", "GRU"])
def test_batch_first_equals_the_reference(op_type) -> None:
    arrays = without(inputs(1, 6, op_type), 4)
    for i in (0, 5):
        arrays[i] = arrays[i].swapaxes(0, 1)
    names = ["X", "W", "R", "B", "", "H"]
    node = helper.make_node(op_type, names, ["Y", "Y_h"], layout=1, hidden_size=HIDDEN)
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names if n]
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in node.output]
    model = helper.make_model(
        helper.make_graph([node], "g", given, results), opset_imports=[helper.make_opsetid("", 14)]
    )
    feed = {n: a for n, a in zip(names, arrays, strict=True) if n}
    wanted = ReferenceEvaluator(model).run(None, feed)
    for ours, theirs in zip(computed(op_type, 14, arrays, layout=1), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def doubles(op_type: str, count: int) -> list[torch.Tensor]:
    arrays = [torch.from_numpy(a) for a in inputs(2, count, op_type)]
    return [a.double().requires_grad_() if a.is_floating_point() else a for a in arrays]


GRADIENTS: list[tuple[str, int, dict[str, Any]]] = [
    ("LSTM", 7, {}),
    ("LSTM", 7, {"output_count": 2}),
    ("LSTM", 8, {"clip": 0.4}),
    ("LSTM", 8, {"input_forget": 1}),
    ("GRU", 6, {}),
    ("GRU", 6, {"linear_before_reset": 1}),
    ("GRU", 6, {"linear_before_reset": 1, "clip": 0.4}),
    ("RNN", 6, {}),
    ("RNN", 6, {"activations": ["Affine", "Softplus"], "activation_alpha": [0.5]}),
]


@pytest.mark.parametrize(("op_type", "count", "attributes"), GRADIENTS, ids=str)
def test_gradients_with_lengths_are_finite_differences(op_type, count, attributes) -> None:
    layer = ops.find("", op_type, 14)
    assert layer is not None

    def outputs(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return layer.function(*arguments, direction="bidirectional", **attributes)

    torch.autograd.gradcheck(outputs, doubles(op_type, count), fast_mode=True)


@pytest.mark.parametrize("attributes", [{}, {"clip": 9.0}], ids=["fused", "unrolled"])
@pytest.mark.parametrize("op_type", GATES)
def test_what_fills_the_padding_reaches_neither_outputs_nor_gradients(op_type, attributes) -> None:
    layer = ops.find("", op_type, 14)
    assert layer is not None
    gradients = []
    for filler in (0.0, float("nan")):
        rng.bit_generator.state = np.random.default_rng(5).bit_generator.state
        arguments = doubles(op_type, 5)
        padded = torch.arange(SEQ)[:, None, None] >= arguments[4][:, None]
        arguments[0] = arguments[0].detach().masked_fill(padded, filler)
        results = layer.function(*arguments, direction="bidirectional", **attributes)
        sum(r.square().sum() for r in results).backward()
        gradients.append(arguments[1].grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize(("op_type", "opset"), [("RNN", 1), ("GRU", 1), ("GRU", 3), ("LSTM", 1)])
def test_first_revisions_compute_what_opset_7_does(op_type, opset) -> None:
    arrays = inputs(1, 6, op_type)
    old, new = (computed(op_type, version, arrays) for version in (opset, 7))
    for ours, theirs in zip(old, new, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_sequence_of_no_steps_keeps_its_states() -> None:
    gru = ops.find("", "GRU", 14)
    assert gru is not None
    x, *rest = (torch.from_numpy(a) for a in without(inputs(1, 6, "GRU"), 4) if a is not None)
    y, h = gru.function(x[:0], *rest[:3], None, rest[3])
    assert y.shape == (0, 1, BATCH, HIDDEN)
    assert h.equal(rest[3])


def test_weights_of_one_direction_are_not_taken_for_two() -> None:
    lstm = ops.find("", "LSTM", 14)
    assert lstm is not None
    with pytest.raises(ModelError, match="W has 1 directions"):
        lstm.function(*(torch.from_numpy(a) for a in inputs(1, 3)), direction="bidirectional")


def test_layout_1_is_layout_0_with_batch_first() -> None:
    lstm = ops.find("", "LSTM", 14)
    assert lstm is not None
    arrays = [None if a is None else torch.from_numpy(a) for a in without(inputs(2, 7), 4)]
    wanted = lstm.function(*arrays, direction="bidirectional")
    for i in (0, 5, 6):
        arrays[i] = arrays[i].transpose(0, 1)
    y, h, c = lstm.function(*arrays, direction="bidirectional", layout=1)
    torch.testing.assert_close(y, wanted[0].permute(2, 0, 1, 3), rtol=0, atol=0)
    torch.testing.assert_close(h, wanted[1].transpose(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(c, wanted[2].transpose(0, 1), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:RNN module weights are not part")
@pytest.mark.parametrize("count", [4, 5], ids=["fused", "lengths"])
@pytest.mark.parametrize("op_type", GATES)
def test_recurrent_layers_compile_into_one_graph(op_type, count) -> None:
    layer = ops.find("", op_type, 14)
    assert layer is not None
    arrays = [torch.from_numpy(a) for a in inputs(1, count, op_type)]
    torch._dynamo.reset()
    compiled = torch.compile(layer.function, fullgraph=True, backend="eager")
    for ours, theirs in zip(compiled(*arrays), layer.function(*arrays), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
