"""What training a unit reaches, held against all roundings there are, and what it undoes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import qwrap
from qwrap.algorithms.adaround import adaround
from qwrap.algorithms.brecq import brecq
from qwrap.errors import ConfigError
from qwrap.model.points import UsePoint
from qwrap.reconstruct.fit import Recipe

INPUTS, OUTPUTS = 8, 4


def data(seed: int) -> list[np.ndarray]:
    """Batches of correlated inputs, as behind a Relu."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(0, 1, (INPUTS, INPUTS))
    x = np.maximum((rng.normal(0.5, 1, (128, INPUTS))) @ mixing, 0)
    return list(x.astype(np.float32).reshape(8, 16, INPUTS))


def errors(model: qwrap.WrappedModel, x: torch.Tensor) -> tuple[float, float]:
    """Error of the weight as it is deployed, and the least that rounding up or down can reach."""
    weight = torch.tensor(original(model))
    stub = model.tap(UsePoint("/y", 1))
    below = torch.floor(weight / stub.scale)
    bits = torch.tensor(list(itertools.product([0.0, 1.0], repeat=INPUTS)))
    squares = x.T @ x
    least = 0.0
    for column in range(OUTPUTS):
        codes = (below[:, column] + bits).clamp(-8, 7)
        wrong = codes * stub.scale[column] - weight[:, column]
        least += float(((wrong @ squares) * wrong).sum(1).min())
    deployed = stub(model.stored("w")).detach() - weight
    return float(((deployed.T @ squares).T * deployed).sum()), least


def original(model: qwrap.WrappedModel) -> np.ndarray:
    return model.graph.model.graph.initializers["w"].const_value.numpy()


def layer(small: Any, batches: list[np.ndarray], seed: int) -> qwrap.WrappedModel:
    weight = np.random.default_rng(seed).normal(0, 0.3, (INPUTS, OUTPUTS)).astype(np.float32)
    source = small.build(
        "y = MatMul(x, w)",
        {"w": weight},
        inputs=f"float[N,{INPUTS}] x",
        outputs=f"float[N,{OUTPUTS}] y",
    )
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(weight="int4", activation="uint16"))
    qwrap.calibrate(model, batches, progress=False)
    return model


def test_adaround_comes_near_the_best_of_all_roundings(small: Any) -> None:
    found = []
    for seed in range(4):
        batches = data(seed)
        model = layer(small, batches, seed)
        x = torch.from_numpy(np.concatenate(batches))
        nearest, least = errors(model, x)
        adaround(model, batches, iterations=300, progress=False)
        learned, _ = errors(model, x)
        found.append((nearest / least, learned / least))
    nearest, learned = np.mean(found, 0)
    assert nearest > 1.5
    assert learned < 1.3  # seven eighths of the samples teach, and the search is a descent


def test_gptq_s_codes_have_to_be_beaten(small: Any) -> None:
    batches = data(0)
    model = layer(small, batches, 0)
    x = torch.from_numpy(np.concatenate(batches))
    qwrap.algorithms.round_weights(model, batches)
    before, _ = errors(model, x)
    kept = adaround(model, batches, iterations=300, progress=False)
    after, least = errors(model, x)
    assert after < before if kept else after == before
    assert after < 1.5 * least


def test_a_unit_that_loses_is_undone_and_counted(small: Any) -> None:
    # Far too large steps: all of the units lose, and so every tensor is what it was.
    model = qwrap.load(small.convs()).eval()
    qwrap.prepare(model, qwrap.QConfig(weight="int4"))
    batches = small.batches(6)
    qwrap.calibrate(model, batches, progress=False)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if key[0] in "wb"}
    outcome = brecq(model, batches, iterations=3, bias_lr=1e3, scale_lr=10.0, progress=False)
    assert not outcome
    assert outcome.details[0] == "0 of 1 blocks improved"
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


def test_a_weight_of_two_nodes_in_a_block_is_learned_once(small: Any) -> None:
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w) b = Relu(a) y = Conv<pads=[1,1,1,1]>(b, w)"
    model = qwrap.load(small.build(nodes, {"w": (3, 3, 3, 3)})).eval()
    qwrap.prepare(model, qwrap.QConfig(weight="int4"))
    batches = small.batches(16)
    qwrap.calibrate(model, batches, progress=False)
    outcome = brecq(model, batches, iterations=150, lr=0.1, progress=False)
    assert outcome.details[0] in ("1 of 1 blocks improved", "0 of 1 blocks improved")
    taps = [model.tap(UsePoint(node, 1)) for node in ("/a", "/y")]
    assert torch.equal(taps[0](model.stored("w")), taps[1](model.stored("w")))


@pytest.mark.parametrize("name", ["iterations", "batch_size"])
def test_a_recipe_refuses_nothing_at_all(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0: expected 1 or more"):
        Recipe(**{"iterations": 1, "batch_size": 1, "lr": 0.1, name: 0})
