"""The rounding noise that is predicted for scaled channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import qwrap
from qwrap.graph.passing import find_divisible
from qwrap.quant.auto.held_out import float_model
from qwrap.quant.noise import Noise

PAIR = "h = Conv(x, w, b) r = Relu(h) y = Conv(r, v)"
FACTORS = np.geomspace(0.01, 100, 6).astype(np.float32)


def noise_of(small: Any, by: np.ndarray, per_channel: bool) -> Noise:
    """Of a pair of layers with the channels between them multiplied by numbers."""
    rng = np.random.default_rng(0)
    w, b, v = (rng.normal(0, 1, s).astype(np.float32) for s in ((6, 3, 3, 3), 6, (4, 6, 1, 1)))
    weights = {"w": w * by.reshape(-1, 1, 1, 1), "b": b * by, "v": v / by.reshape(1, -1, 1, 1)}
    model = qwrap.load(small.build(PAIR, weights)).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", per_channel=per_channel))
    noise = Noise(model, model.graph, find_divisible(model.graph.model))
    noise.observe([{"x": torch.from_numpy(x)} for x in small.batches()], float_model(model))
    return noise


@pytest.mark.parametrize("per_channel", [True, False])
def test_it_depends_on_the_channels_as_they_are_scaled_alone(small: Any, per_channel: bool) -> None:
    even = noise_of(small, np.ones(6, np.float32), per_channel).cost()(torch.zeros(6))
    uneven = noise_of(small, FACTORS, per_channel).cost()
    restored = uneven(torch.from_numpy(FACTORS).log())
    torch.testing.assert_close(restored, even, rtol=1e-4, atol=0.0)
    assert uneven(torch.zeros(6)) > 10 * even


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_least_that_is_found_is_no_more_than_where_it_started(
    small: Any, per_channel: bool
) -> None:
    noise = noise_of(small, FACTORS, per_channel)
    cost = noise.cost()
    for start in (torch.ones(6), torch.from_numpy(FACTORS)):
        found = noise.least(start, iterations=60)
        starts = [float(cost(start.log() * share)) for share in (0.0, 0.5, 1.0)]
        assert float(cost(found.log())) <= min(starts)
