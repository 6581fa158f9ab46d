"""Probabilities of classes from those of pairs of classes."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 100


def coupled_probabilities(wins: Tensor, pairs: Tensor, classes: int) -> Tensor:
    """Return ``[rows, classes]`` probabilities that agree best with those of the pairs.

    Args:
        wins: ``[rows, pairs]``, how probable the first class of each pair is against the second.
        pairs: the two classes of each pair, ``[pairs, 2]``.
        classes: how many there are.

    Source: T. F. Wu, C. J. Lin, R. C. Weng, "Probability estimates for multi-class classification
    by pairwise coupling" (2004), algorithm 2, which libsvm and onnxruntime run; a row stops once
    no class is off by more than ``0.005 / classes``.
    """
    i, j = pairs.unbind(1)
    r = wins.new_zeros(len(wins), classes, classes)
    r = r.index_put((torch.arange(len(wins), device=wins.device)[:, None], i, j), wins)
    r = r.index_put((torch.arange(len(wins), device=wins.device)[:, None], j, i), 1 - wins)
    loss = torch.diag_embed(r.square().sum(1)) - r.mT * r
    p = wins.new_full((len(wins), classes), 1.0 / classes)
    for _ in range(ROUNDS):
        product = (loss @ p[..., None])[..., 0]
        total = (p * product).sum(-1, keepdim=True)
        running = (product - total).abs().amax(-1, keepdim=True) >= 0.005 / classes
        if not bool(running.any()):
            break
        p = torch.where(running, _round(loss, p, product, total), p)
    return p


def _round(loss: Tensor, p: Tensor, product: Tensor, total: Tensor) -> Tensor:
    """Improve the probability of one class after the other, keeping their sum one."""
    for t in range(p.shape[1]):
        own = loss[:, t, t, None]
        step = (total - product[:, t, None]) / own
        unit = torch.zeros_like(p)
        unit[:, t] = 1.0
        total = (total + step * (step * own + 2 * product[:, t, None])) / (1 + step) / (1 + step)
        product = (product + step * loss[:, t]) / (1 + step)
        p = (p + step * unit) / (1 + step)
    return p
