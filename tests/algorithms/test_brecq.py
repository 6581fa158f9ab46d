"""BRECQ and AdaRound on small models: what they reach, undo, repeat and leave out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import qwrap
from qwrap.algorithms.adaround import adaround
from qwrap.algorithms.brecq import brecq
from qwrap.dtypes import UINT4
from qwrap.errors import ConfigError
from qwrap.quant.outcome import Outcome

FAST = {"iterations": 100, "batch_size": 16, "lr": 0.1, "progress": False}
Algorithm = Callable[..., Outcome]
BOTH = pytest.mark.parametrize("algorithm", [adaround, brecq])


def calibrated(source: Any, batches: Any, **config: Any) -> qwrap.WrappedModel:
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(**{"weight": "int4", **config}))
    qwrap.calibrate(model, batches, progress=False)
    return model


def correlated(count: int = 8, shape: tuple[int, ...] = (4, 3, 8, 8)) -> list[np.ndarray]:
    """Batches in which neighbours are alike, for white noise leaves nothing to gain."""
    rng = np.random.default_rng(2)
    mixing = rng.normal(0, 1, (shape[1], shape[1]))
    batches = []
    for _ in range(count):
        x = np.einsum("nc...,cd->nd...", rng.normal(1, 1, shape), mixing)
        for axis in range(2, len(shape)):
            x = x + np.roll(x, 1, axis) + np.roll(x, 2, axis)
        batches.append(x.astype(np.float32))
    return batches


def state(model: qwrap.WrappedModel) -> dict[str, torch.Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


@BOTH
def test_the_error_of_held_back_samples_falls(small: Any, algorithm: Algorithm) -> None:
    batches = correlated()
    model = calibrated(small.convs(), batches)
    outcome = algorithm(model, batches, **FAST)
    assert outcome
    assert outcome.after < 0.9 * outcome.before


@BOTH
def test_weights_lie_on_their_grid_afterwards(small: Any, algorithm: Algorithm) -> None:
    batches = correlated()
    model = calibrated(small.convs(), batches)
    assert algorithm(model, batches, **FAST)
    for (node, index), constant in model.plan.constants.items():
        weight = model.stored(constant.value)
        tap = model.tap(qwrap.model.points.UsePoint(node, index))
        assert torch.equal(tap(weight), weight)


@BOTH
def test_results_repeat_with_the_seed_and_leave_the_caller_s_numbers(
    small: Any, algorithm: Algorithm
) -> None:
    batches, found = correlated(), []
    before = torch.random.get_rng_state()
    for seed in (3, 3, 4):
        model = calibrated(small.convs(), batches)
        algorithm(model, batches, seed=seed, **FAST)
        found.append(state(model))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert not all(torch.equal(found[0][key], found[2][key]) for key in found[0])


@BOTH
def test_what_cannot_gain_stays_bit_for_bit(small: Any, algorithm: Algorithm) -> None:
    batches = correlated()
    model = calibrated(small.convs(), batches)
    assert algorithm(model, batches, **FAST)
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    model.train()
    outcome = algorithm(model, batches, **FAST | {"lr": 0.0, "iterations": 1} | STILL[algorithm])
    assert not outcome
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    after = state(model)
    assert all(torch.equal(before[key], after[key]) for key in before)


STILL: dict[Any, dict[str, Any]] = {
    adaround: {},
    brecq: {"learn_scales": False, "learn_biases": False},
}


@pytest.mark.parametrize("drop", [-0.1, 1.0])
def test_a_probability_beyond_its_range_is_refused(small: Any, drop: float) -> None:
    model = calibrated(small.convs(), small.batches())
    with pytest.raises(ConfigError, match=f"drop={drop}: expected a probability below 1"):
        brecq(model, small.batches(), drop=drop)


@BOTH
def test_numbers_beyond_their_range_are_refused(small: Any, algorithm: Algorithm) -> None:
    model = calibrated(small.convs(), small.batches())
    with pytest.raises(ConfigError, match="iterations=0: expected 1 or more"):
        algorithm(model, small.batches(), iterations=0)
    with pytest.raises(ConfigError, match="lr=-1: expected a number from 0 on"):
        algorithm(model, small.batches(), lr=-1)


@BOTH
def test_a_model_without_weights_is_left_alone(small: Any, algorithm: Algorithm) -> None:
    source = small.build("y = Relu(x)", {}, outputs="float[N,3,8,8] y")
    model = calibrated(source, small.batches())
    outcome = algorithm(model, small.batches(), **FAST)
    assert not outcome


LAYERS = {
    "depthwise": ("y = Conv<group=3, pads=[1,1,1,1]>(x, w, b)", (3, 1, 3, 3), 3, "N,3,8,8"),
    "grouped": ("y = Conv<group=2>(x, w, b)", (4, 2, 3, 3), 4, "N,4,8,8"),
    "Conv1d": ("y = Conv<strides=[2]>(x, w, b)", (5, 3, 3), 5, "N,3,16"),
    "Conv3d": ("y = Conv(x, w, b)", (4, 2, 2, 2, 2), 4, "N,2,4,4,4"),
    "ConvTranspose": ("y = ConvTranspose<strides=[2,2]>(x, w, b)", (3, 4, 2, 2), 4, "N,3,5,5"),
    "Gemm": ("y = Gemm<transB=1>(x, w, b)", (6, 12), 6, "N,12"),
    "Gemm-plain": ("y = Gemm(x, w, b)", (12, 6), 6, "N,12"),
    "MatMul": ("y = MatMul(x, w)", (12, 6), 6, "N,4,12"),
}
CONFIGS = {
    "per channel": {},
    "per tensor": {"per_channel": False},
    "asymmetric": {"weight": qwrap.QuantSpec(dtype=UINT4, symmetric=False)},
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("config", CONFIGS)
def test_adaround_serves_every_layer(small: Any, layer: str, config: str) -> None:
    nodes, shape, channels, size = LAYERS[layer]
    weights: dict[str, Any] = {"w": shape, "b": (channels,)}
    rank = size.count(",") + 1
    outputs = f"float[{','.join('NABCD'[:rank])}] y"
    source = small.build(nodes, weights, inputs=f"float[{size}] x", outputs=outputs)
    dims = [int(n) for n in size.split(",")[1:]]
    batches = correlated(24, (8, *dims))
    model = calibrated(source, batches, scope="all", **CONFIGS[config])
    outcome = adaround(model, batches, **FAST | {"iterations": 200})
    assert outcome.after < outcome.before


@pytest.mark.parametrize("option", [{"drop": 0.5}, {"fisher": True}, {"batch_size": 500}])
def test_blocks_gain_with_other_options_too(small: Any, option: dict[str, Any]) -> None:
    batches = correlated()
    model = calibrated(small.convs(), batches)
    outcome = brecq(model, batches, **FAST | option)
    assert outcome
    assert outcome.algorithm == ("QDrop" if "drop" in option else "BRECQ")


def test_little_memory_is_enough(small: Any) -> None:
    batches = correlated()
    model = calibrated(small.convs(), batches)
    outcome = adaround(model, batches, memory=8 * 2 * 10 * 64 * 4, **FAST)
    assert any("for they take much memory" in line for line in outcome.details)
