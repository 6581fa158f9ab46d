"""The whole model under torch.compile, against eager training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qwrap
from qwrap.train.schedule import fake_quant, learn_scales

pytestmark = [  # torch's own, while it traces an autograd function and loads its compiler
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]
WAYS = ("lsq+", "pact")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def data() -> Tensor:
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.normal(0, 1, (4, 3, 8, 8)).astype(np.float32))


def step(run: Callable[[Tensor], Tensor], model: nn.Module) -> dict[str, Any]:
    """One step's output and gradients; the step is taken."""
    optimizer = torch.optim.SGD(qwrap.param_groups(model, lr=0.01, scale_lr=2e-4))
    optimizer.zero_grad()
    y = run(data())
    (y - 0.5).square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    return {"output": y.detach(), **found}


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compilers may order float32 operations otherwise; here values are of order 1."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_a_training_step_is_one_graph_with_the_gradients_of_eager(calibrated, way: str) -> None:
    model = calibrated(training=way).train()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_close(step(compiled, model), step(eager, eager))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_ranges_that_follow_are_compiled_around(calibrated) -> None:
    """In the same pieces for every step: what an observer counts is no part of them."""
    model = calibrated(training="follow").train()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(step(compiled, model), step(eager, eager))
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            assert_close(step(compiled, model), step(eager, eager))


def test_switches_are_seen_by_a_compiled_model(calibrated) -> None:
    model = calibrated(training="lsq").train()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    switches = [
        lambda m: fake_quant(m, False),
        lambda m: fake_quant(m, True),
        lambda m: learn_scales(m, False),
        lambda m: m.eval(),
    ]
    for switch in [lambda m: m, *switches]:
        for module in (model, eager):
            switch(module)
        if model.training:
            assert_close(step(compiled, model), step(eager, eager))
        else:
            with torch.no_grad():
                torch.testing.assert_close(compiled(data()), eager(data()))


def test_inductor_compiles_a_training_step(calibrated) -> None:
    try:
        torch.compile(lambda x: x + 1, backend="inductor")(torch.ones(2))
    except Exception as error:
        pytest.skip(f"torch.compile does not work here: {error}")
    model = calibrated(training="lsq").train()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    assert_close(step(compiled, model), step(eager, eager))
