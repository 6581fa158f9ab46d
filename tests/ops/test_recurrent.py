"""LSTM against onnxruntime."""

import numpy as np
import pytest
import torch

from qwrap import ops

rng = np.random.default_rng(4)
SEQ, BATCH, INPUT, HIDDEN = 6, 3, 5, 4
# Six steps of sums of nine products through saturating functions.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def floats(*shape: int) -> np.ndarray:
    return rng.uniform(-1, 1, shape).astype(np.float32)


def inputs(directions: int, count: int) -> list[np.ndarray]:
    state = (directions, BATCH, HIDDEN)
    return [
        floats(SEQ, BATCH, INPUT),
        floats(directions, 4 * HIDDEN, INPUT),
        floats(directions, 4 * HIDDEN, HIDDEN),
        floats(directions, 8 * HIDDEN),
        np.array([6, 2, 4], np.int32),
        floats(*state),
        floats(*state),
        floats(directions, 3 * HIDDEN),
    ][:count]


def without(arrays: list[np.ndarray], *indices: int) -> list[np.ndarray | None]:
    return [None if i in indices else a for i, a in enumerate(arrays)]


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
def test_lstm_compiles_into_one_graph() -> None:
    lstm = ops.find("", "LSTM", 14)
    assert lstm is not None
    arrays = [torch.from_numpy(a) for a in inputs(1, 4)]
    torch._dynamo.reset()
    compiled = torch.compile(lstm.function, fullgraph=True, backend="eager")
    for ours, theirs in zip(compiled(*arrays), lstm.function(*arrays), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
