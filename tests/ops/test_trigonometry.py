"""Trigonometric and hyperbolic functions against onnxruntime and finite differences."""

import numpy as np
import pytest
import torch

rng = np.random.default_rng(4)
INSIDE = rng.uniform(-0.9, 0.9, (5, 4)).astype(np.float32)  # where all but Acosh are smooth
CASES = [
    *((name, INSIDE) for name in ("Acos", "Asin", "Asinh", "Atan", "Atanh")),
    *((name, 3 * INSIDE) for name in ("Asinh", "Atan", "Cosh", "Sinh", "Tan")),
    ("Acosh", 2 + INSIDE),
]


@pytest.mark.parametrize("opset", [9, 22])
@pytest.mark.parametrize(("op_type", "x"), CASES)
def test_equals_onnxruntime_up_to_rounding(check, op_type, x, opset) -> None:
    check(op_type, opset, [x], {}, rtol=2e-6, atol=1e-6)  # a few units in the last place
    check(op_type, opset, [x.astype(np.float64)], {}, rtol=1e-13)


@pytest.mark.parametrize(("op_type", "x"), CASES)
def test_gradients(check_gradients, op_type, x) -> None:
    check_gradients(op_type, 22, [torch.from_numpy(x)])
