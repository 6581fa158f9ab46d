"""Activation functions that test_math.py does not have."""

import numpy as np
import pytest
import torch

rng = np.random.default_rng(3)
X = rng.uniform(-3, 3, (2, 3, 4)).astype(np.float32)
TIES = rng.integers(0, 3, (4, 5, 3)).astype(np.float32)
INTEGERS = rng.integers(-5, 5, (20,)).astype(np.int32)

EXACT = [
    ("ThresholdedRelu", 10, [X], {}),
    ("ThresholdedRelu", 22, [X], {"alpha": -0.5}),
    ("Shrink", 9, [X], {}),
    ("Shrink", 9, [X], {"lambd": 1.0, "bias": 1.0}),
    ("Shrink", 9, [INTEGERS], {"lambd": 1.5, "bias": 1.0}),
    ("Hardmax", 13, [TIES], {}),
    ("Hardmax", 13, [TIES], {"axis": 1}),
    ("Hardmax", 11, [TIES], {}),
    ("Hardmax", 8, [TIES], {"axis": 2}),
    ("Hardmax", 11, [TIES], {"axis": -1}),
]
SMOOTH = [
    ("Softsign", 1, [X], {}),
    ("Softsign", 22, [X], {}),
    ("Celu", 12, [X], {}),
    ("Celu", 12, [X], {"alpha": 2.5}),
    ("Celu", 28, [X.astype(np.float64)], {"alpha": 2.5}),
    ("Mish", 18, [X], {}),
    ("Mish", 22, [X.astype(np.float64)], {}),
    ("Swish", 24, [X], {}),
    ("Swish", 24, [X], {"alpha": 0.7}),
    ("SwiGLU", 28, [X, X[::-1].copy()], {"alpha": 1.3}),
]


@pytest.mark.parametrize(("op_type", "opset", "inputs", "attributes"), EXACT)
def test_equals_onnxruntime(check, op_type, opset, inputs, attributes) -> None:
    check(op_type, opset, inputs, attributes)


# One or two units in the last place of float32, and what cancels in exp(x) - 1 near zero.
@pytest.mark.parametrize(("op_type", "opset", "inputs", "attributes"), SMOOTH)
def test_equals_onnxruntime_up_to_rounding(check, op_type, opset, inputs, attributes) -> None:
    check(op_type, opset, inputs, attributes, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("op_type", "opset", "inputs", "attributes"),
    [c for c in (*SMOOTH, *EXACT) if c[0] != "Hardmax" and c[2][0].dtype != np.int32],
)
def test_gradients(check_gradients, op_type, opset, inputs, attributes) -> None:
    check_gradients(op_type, opset, [torch.from_numpy(x) for x in inputs], **attributes)
