"""What an absorbed Relu or Clip computes while the stub behind it clamps, and when it does not."""

import numpy as np
import pytest
import torch

import qwrap
from qwrap.model.points import Program, ValuePoint

NODES = {
    "Relu(a)": (0.0, np.inf),
    "Clip(a, low, high)": (-0.5, 1.5),
    "Clip(a, zero, high)": (0.0, 1.5),
}


def calibrated(small, node: str, **config):
    numbers = {"low": -0.5, "high": 1.5, "zero": 0.0}
    weights = {name: np.array(value, np.float32) for name, value in numbers.items() if name in node}
    source = small.build(
        f"a = Conv(x, w1) b = {node} y = Conv(b, w2)",
        {"w1": (8, 3, 3, 3), "w2": (4, 8, 3, 3), **weights},
    )
    model = qwrap.load(source)
    plan = qwrap.prepare(model, qwrap.QConfig(scope="kernels", **config))
    assert plan.nodes["/b"].role == "absorbed"
    qwrap.calibrate(model, small.batches(), progress=False)
    return model


def with_and_without(model, x):
    """Outputs and gradients, with the clamp left to the stub and with the operator run too."""
    found = []
    whole = Program({point: model.tap(point) for point in model.attached})
    for program in (model.program, whole):
        model.zero_grad()
        with model.running(program):
            result = model(x)
        result.square().sum().backward()
        found.append((result.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    return found


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("training", ["fixed", "lsq", "lsq+", "pact"])
def test_leaving_the_clamp_to_the_stub_changes_no_value(small, node, training) -> None:
    model = calibrated(small, node, training=training)
    x = torch.from_numpy(small.batches(1, seed=7)[0])
    assert model.kernels["/b"].is_redundant()
    (short, gradients), (whole, others) = with_and_without(model, x)
    assert torch.equal(short, whole)
    # Gradients differ only for what lies less than half a step beyond a bound: it rounds to the
    # code of the bound, and is not clamped. The stub's own scale has another one indeed: to it the
    # operator would hide what is cut off, though the kernel does it with the end of the codes.
    for name in ("w1", "w2", *(n for n in gradients if n.endswith("1.gain"))):
        error = (gradients[name] - others[name]).norm() / others[name].norm().clamp(min=1e-6)
        assert error < 0.1, name


@pytest.mark.parametrize("node", NODES)
def test_no_code_gets_beyond_the_bounds_however_far_training_pulls(small, node) -> None:
    model = calibrated(small, node)
    stub = model.tap(ValuePoint("b"))
    with torch.no_grad():
        stub.gain.fill_(3.0)
    low, high = NODES[node]
    least, most = ((end - stub.zero_point) * stub.scale for end in (0, 255))  # as a kernel has it
    assert low <= least
    assert most <= high
    x = torch.from_numpy(small.batches(1, seed=7)[0])
    model(x).square().sum().backward()
    if np.isfinite(high):  # at the limit only what shrinks the scale again gets a gradient
        assert stub.gain.grad.item() >= 0
    else:
        assert stub.gain.grad.item() != 0


def test_a_range_that_follows_sees_what_the_activation_function_lets_through(small) -> None:
    model = calibrated(small, "Relu(a)", training="follow")
    x = torch.from_numpy(small.batches(1, seed=7)[0])
    model.train()
    for _ in range(3):
        model(x)
    stub = model.tap(ValuePoint("b"))
    assert float(stub.observer.ema_low) == 0
    assert int(stub.zero_point) == 0
    assert stub.following


def test_in_float_and_while_observing_the_operator_is_computed(small) -> None:
    source = small.convs()
    model, floating = qwrap.load(source), qwrap.load(source)
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    x = torch.from_numpy(small.batches(1)[0])
    assert torch.equal(model(x), floating(x))
    with qwrap.calibrating(model):
        assert torch.equal(model(x), floating(x))
    assert float(model.tap(ValuePoint("b")).observer.low) == 0
