"""A learned bias is the stub's until it moves, in units of the noise of rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qwrap
from qwrap.model.points import UsePoint
from qwrap.reconstruct.learned_bias import LearnedBias


@pytest.fixture
def model(small: Any) -> qwrap.WrappedModel:
    model = qwrap.load(small.convs()).eval()
    qwrap.prepare(model, qwrap.QConfig(weight="int4"))
    qwrap.calibrate(model, small.batches(), progress=False)
    return model


def test_it_starts_as_the_stub(model: Any) -> None:
    bias, stub = model.stored("b1"), model.tap(UsePoint("/a", 2))
    assert torch.equal(LearnedBias(bias, stub, 27, 255)(bias), stub(bias))


@torch.no_grad()
def test_its_unit_is_the_noise_of_rounded_weights(model: Any) -> None:
    bias, stub = model.stored("b1"), model.tap(UsePoint("/a", 2))
    weight, x = model.tap(UsePoint("/a", 1)), torch.randn(64, 3, 12, 12)
    rounded = weight(model.stored("w1"))
    noise = torch.conv2d(x, rounded - model.stored("w1")).std((0, 2, 3))
    unit = LearnedBias(bias, stub, 27, 255).unit
    # White inputs reach four deviations: their ends are 8 apart. Rounding errors vary by channel.
    assert 0.5 < float((unit / noise).mean()) < 2


def test_it_moves_the_bias_when_it_is_finished(model: Any) -> None:
    bias, stub = model.stored("b1"), model.tap(UsePoint("/a", 2))
    before = bias.detach().clone()
    learned = LearnedBias(bias, stub, 27, 255)
    learned(bias).sum().backward()
    assert torch.allclose(learned.shift.grad, learned.unit)
    with torch.no_grad():
        learned.shift.fill_(2.0)
    learned.finish()
    assert torch.allclose(bias, before + 2 * learned.unit)
