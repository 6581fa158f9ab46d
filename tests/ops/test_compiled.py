"""Operators that index, scatter, transform or draw compile without breaking the graph."""

import pytest
import torch

X = torch.linspace(-2, 2, 60).reshape(3, 4, 5)
ROWS = torch.tensor([[0, -1], [2, 1]])
SQUARE = torch.eye(3) + 0.1
WAVE = torch.linspace(0, 9, 40).reshape(1, 40, 1)
LABELS = torch.tensor([[0, 1, 3, 1, 2], [1, 1, 0, 0, 3], [2, 3, 1, 0, 1]])

CASES = [
    ("Hardmax", 13, [X], {"axis": 1}),
    ("Shrink", 9, [X], {"lambd": 0.7, "bias": 0.2}),
    ("SwiGLU", 28, [X, X], {"alpha": 0.7}),
    ("IsInf", 20, [X], {"detect_negative": 0}),
    ("CumProd", 26, [X, 1], {"exclusive": 1, "reverse": 1}),
    ("ScatterElements", 18, [X, ROWS[None], X[:1, :2, :2]], {"axis": 1, "reduction": "max"}),
    ("ScatterND", 18, [X, ROWS, X[:2, 0]], {"reduction": "mul"}),
    ("ScatterND", 13, [X, ROWS, X[:2, 0]], {}),
    ("TensorScatter", 24, [X, X[:, :2], torch.tensor([1, 3, 2])], {"mode": "circular"}),
    ("OneHot", 11, [ROWS, 4, torch.tensor([0.0, 1.0])], {"axis": 0}),
    ("ReverseSequence", 10, [X, torch.tensor([1, 3, 2, 0])], {}),
    ("TopK", 11, [X, [2]], {"axis": 1, "largest": 0}),
    ("Trilu", 14, [X, 1], {"upper": 0}),
    ("EyeLike", 22, [X[0]], {"k": 1, "dtype": 7}),
    ("Det", 22, [SQUARE], {}),
    ("Einsum", 12, [X, X], {"equation": "bij,bkj->bik"}),
    ("DFT", 20, [X[..., None], 7, 1], {"onesided": 1}),
    ("STFT", 17, [WAVE, 5, torch.ones(8)], {}),
    ("HannWindow", 17, [9], {}),
    ("MelWeightMatrix", 17, [8, 16, 8192, 0.0, 4096.0], {}),
    ("SoftmaxCrossEntropyLoss", 13, [X, LABELS], {"ignore_index": 3}),
    ("Dropout", 13, [X, 0.3, True], {"seed": 2, "output_count": 2}),
    ("RandomNormal", 22, [], {"shape": [2, 3], "seed": 1.0}),
    ("Bernoulli", 22, [X.sigmoid()], {"seed": 1.0}),
    ("Multinomial", 22, [X[0]], {"seed": 1.0, "sample_size": 6}),
    ("ReduceMax", 18, [X, [1]], {}),
    ("Split", 18, [X], {"num_outputs": 2, "axis": 2}),
    ("Squeeze", 13, [X[:1], [0]], {}),
]


@pytest.mark.parametrize(("op_type", "opset", "inputs", "attributes"), CASES)
def test_compiles_into_one_graph(check_compiles, op_type, opset, inputs, attributes) -> None:
    check_compiles(op_type, opset, inputs, attributes)
