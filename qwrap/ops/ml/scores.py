"""What becomes of scores: the attribute ``post_transform``, with onnxruntime's arithmetic."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwrap.errors import UnsupportedOpError

TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")
SMALLEST_SCORE = 1e-7  # what is nearer to zero counts as no score


def check_transform(name: str) -> str:
    """Return ``name``.

    Raises:
        UnsupportedOpError: no transform has that name.
    """
    if name not in TRANSFORMS:
        raise UnsupportedOpError(f"post_transform={name!r} is none of {list(TRANSFORMS)}")
    return name


def transform(scores: Tensor, name: str) -> Tensor:
    """Return ``[…, classes]`` scores transformed; a single class only knows PROBIT."""
    if name == "PROBIT":
        return probit(scores)
    if scores.shape[-1] < 2 or name == "NONE":
        return scores
    if name == "SOFTMAX":
        return scores.softmax(-1)
    if name == "LOGISTIC":
        return scores.sigmoid()
    return softmax_zero(scores)


def softmax_zero(scores: Tensor) -> Tensor:
    """Return the softmax over the scores that are not zero; zeros stay."""
    top = scores.amax(-1, keepdim=True)
    there = scores.abs() > SMALLEST_SCORE
    powers = torch.where(there, (scores - top).exp(), 0.0)
    total = powers.sum(-1, keepdim=True)
    return torch.where(there, powers, scores * (-top).exp()) / total


def probit(p: Tensor) -> Tensor:
    """Return the quantile of the normal distribution, to three digits as in onnxruntime.

    Source: S. Winitzki, "A handy approximation for the error function and its inverse" (2008).
    """
    x = 2 * p - 1
    a = 0.147
    log = ((1 - x) * (1 + x)).log()
    v = 2 / (3.14159 * a) + 0.5 * log
    size = (-v + (v * v - log / a).sqrt()).sqrt()
    return math.sqrt(2.0) * torch.where(x < 0, -size, size)


def both_classes(score: Tensor, name: str, as_probability: bool) -> Tensor:
    """Return ``[rows, 2]`` scores from those of the positive class ``[rows]``.

    Args:
        score: of the positive class.
        name: the transform.
        as_probability: without LOGISTIC the other class has one minus the score, else its negative.
    """
    pair = torch.stack((-score, score), -1)
    if name == "LOGISTIC":
        return pair.sigmoid()
    return torch.stack((1 - score, score), -1) if as_probability else pair
