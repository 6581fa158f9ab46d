"""Losses of classification, trainable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.ops.registry import op

NEVER = -(2**31)  # an ``ignore_index`` that no class has


@op("NegativeLogLikelihoodLoss", since=(12, 13, 22))
def negative_log_likelihood_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return minus the log-probability of the target class, weighted by class.

    The mean is over what is not ignored, and weighted too.
    """
    return F.nll_loss(
        input,
        target.to(torch.int64),
        weight,
        ignore_index=NEVER if ignore_index is None else ignore_index,
        reduction=reduction,
    )


@op("SoftmaxCrossEntropyLoss", since=(12, 13))
def softmax_cross_entropy_loss(
    scores: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood of the softmax over axis 1, and its logarithm."""
    log_prob = torch.log_softmax(scores, 1)
    loss = negative_log_likelihood_loss(
        log_prob, labels, weights, ignore_index=ignore_index, reduction=reduction
    )
    return loss, log_prob
