"""Optimizer steps against the reference evaluator."""

import numpy as np
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

from qwrap import ops
from qwrap.ops.training import DOMAIN

rng = np.random.default_rng(11)
RATE = np.array(0.1, np.float32)
ADAM = {"alpha": 0.95, "beta": 0.8, "epsilon": 1e-7, "norm_coefficient": 0.1}
MOMENTUM = {"alpha": 0.9, "beta": 0.7, "norm_coefficient": 0.01}
CASES = [
    ("Adagrad", 3, {"norm_coefficient": 0.001, "epsilon": 1e-5, "decay_factor": 0.1}),
    ("Adagrad", 3, {}),
    ("Adam", 4, {}),
    ("Adam", 4, {**ADAM, "norm_coefficient_post": 0.05}),
    ("Momentum", 3, {**MOMENTUM, "mode": "standard"}),
    ("Momentum", 3, {**MOMENTUM, "mode": "nesterov"}),
]


@pytest.mark.parametrize("updates", [0, 1, 5])
@pytest.mark.parametrize(("op_type", "lists", "attributes"), CASES)
def test_equals_the_reference(op_type, lists, attributes, updates) -> None:
    shapes = [(2,), (3, 2)]
    inputs = [RATE, np.array(updates, np.int64)]
    inputs += [rng.uniform(0.1, 2, s).astype(np.float32) for _ in range(lists) for s in shapes]
    names = [f"i{i}" for i in range(len(inputs))]
    outputs = [f"o{i}" for i in range(2 * (lists - 1))]
    node = helper.make_node(op_type, names, outputs, domain=DOMAIN, **attributes)
    wanted = ReferenceEvaluator(node).run(None, dict(zip(names, inputs, strict=True)))
    operator = ops.find(DOMAIN, op_type, 1)
    assert operator is not None
    got = operator.function(*map(torch.from_numpy, inputs), **attributes)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-5, atol=1e-6
        )  # powers in float32 or float64
