"""The weights of errors are squared gradients: closed forms of linear models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import qwrap
from qwrap.model.batches import iterate
from qwrap.reconstruct.samples import Samples
from qwrap.reconstruct.sensitivity import sensitivities


def found(source: Any, batches: list[Any], key: str) -> torch.Tensor:
    model = qwrap.load(source).eval()
    samples = Samples(model, list(iterate(batches, model)), [key])
    generator = torch.Generator().manual_seed(0)
    return sensitivities(model, samples, range(len(samples.rows)), [key], generator)[key]


def test_of_one_linear_output_they_are_its_squared_weights(small: Any) -> None:
    weight = np.array([[1.0], [2.0], [-3.0]], np.float32)
    nodes = "a = MatMul(x, e) y = MatMul(a, w)"
    source = small.build(
        nodes,
        {"e": np.eye(3, dtype=np.float32), "w": weight},
        inputs="float[N,3] x",
        outputs="float[N,1] y",
    )
    weights = found(source, small.batches(2, (4, 3)), "a")
    expected = torch.tensor([[1.0, 4.0, 9.0]]) * 3 / 14
    # The sign of the output does not matter; its size is a common factor.
    assert torch.allclose(weights, expected, rtol=1e-5)


def test_samples_of_several_lengths_share_what_they_have_in_common(small: Any) -> None:
    nodes = "a = MatMul(x, e) b = MatMul(a, w) y = ReduceSum(b)"
    source = small.build(
        nodes,
        {"e": np.eye(2, dtype=np.float32), "w": np.array([[1.0], [3.0]], np.float32)},
        inputs="float[N,S,2] x",
        outputs="float[A,B,C] y",
    )
    batches = [small.batches(1, (1, length, 2))[0] for length in (3, 5)]
    weights = found(source, batches, "a")
    assert weights.shape == (1, 1, 2)
    assert torch.allclose(weights, torch.tensor([[[0.2, 1.8]]]), rtol=1e-5)
