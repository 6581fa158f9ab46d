"""Optimizer steps of the domain ai.onnx.preview.training.

Each operator takes the learning rate ``R``, the number of updates so far ``T`` and then lists:
all tensors to optimize, all their gradients, and each list of states. It returns the tensors and
the states after the step, list by list.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwrap.ops.limits import one_of
from qwrap.ops.registry import op

DOMAIN = "ai.onnx.preview.training"


def _lists(inputs: Sequence[Tensor], count: int) -> list[tuple[Tensor, ...]]:
    """Return what belongs to each optimized tensor: itself, its gradient and its states."""
    size = len(inputs) // count
    return list(zip(*(inputs[i * size : (i + 1) * size] for i in range(count)), strict=True))


def _flat(rows: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return what was computed for each tensor, list by list."""
    return tuple(tensor for column in zip(*rows, strict=True) for tensor in column)


@op("Adagrad", since=(1,), domain=DOMAIN)
def adagrad(
    R: Tensor,
    T: Tensor,
    *inputs: Tensor,
    decay_factor: float = 0.0,
    epsilon: float = 1e-6,
    norm_coefficient: float = 0.0,
) -> tuple[Tensor, ...]:
    """Scale each step by the root of all squared gradients so far.

    Source: Duchi et al., Adaptive Subgradient Methods, JMLR 12 (2011).
    """
    rate = R / (1 + T * decay_factor)
    rows = []
    for x, gradient, squares in _lists(inputs, 3):
        g = norm_coefficient * x + gradient
        new = squares + g * g
        rows.append((x - rate * g / (new.sqrt() + epsilon), new))
    return _flat(rows)


@op("Adam", since=(1,), domain=DOMAIN)
def adam(
    R: Tensor,
    T: Tensor,
    *inputs: Tensor,
    alpha: float = 0.9,
    beta: float = 0.999,
    epsilon: float = 1e-6,
    norm_coefficient: float = 0.0,
    norm_coefficient_post: float = 0.0,
) -> tuple[Tensor, ...]:
    """Step along the running mean of the gradients, scaled by that of their squares.

    Source: Kingma and Ba, arXiv:1412.6980; the bias is corrected from the second update on.
    """
    updates = T.clamp(min=1)  # not 0: 0 / 0 has no gradient, even where it is not used
    corrected = R * (1 - beta**updates).sqrt() / (1 - alpha**updates)
    rate = torch.where(T > 0, corrected, R)
    rows = []
    for x, gradient, mean, squares in _lists(inputs, 4):
        g = norm_coefficient * x + gradient
        new_mean = alpha * mean + (1 - alpha) * g
        new_squares = beta * squares + (1 - beta) * g * g
        new = x - rate * new_mean / (new_squares.sqrt() + epsilon)
        rows.append(((1 - norm_coefficient_post) * new, new_mean, new_squares))
    return _flat(rows)


@op(
    "Momentum",
    since=(1,),
    domain=DOMAIN,
    allowed={"mode": one_of("standard", "nesterov")},
)
def momentum(
    R: Tensor,
    T: Tensor,
    *inputs: Tensor,
    alpha: float,
    beta: float,
    mode: str,
    norm_coefficient: float,
) -> tuple[Tensor, ...]:
    """Step along the decaying sum of the gradients, or look ahead of it as Nesterov does."""
    scale = torch.where(T > 0, beta, 1.0).to(R.dtype)
    rows = []
    for x, gradient, velocity in _lists(inputs, 3):
        g = norm_coefficient * x + gradient
        new = alpha * velocity + scale * g
        step = g + alpha * new if mode == "nesterov" else new
        rows.append((x - R * step, new))
    return _flat(rows)
