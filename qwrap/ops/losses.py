"""Losses of classification, trainable."""

from __future__ import annotations

import torch
from torch import Tensor

from qwrap.ops.limits import one_of
from qwrap.ops.registry import op

REDUCTIONS = one_of("none", "mean", "sum")


@op("NegativeLogLikelihoodLoss", since=(12, 13, 22), allowed={"reduction": REDUCTIONS})
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
    labels = target.to(torch.int64)
    share = torch.ones_like(labels, dtype=input.dtype)
    if ignore_index is not None:
        ignored = labels == ignore_index
        labels, share = labels.masked_fill(ignored, 0), share.masked_fill(ignored, 0)
    if weight is not None:  # unlike F.nll_loss, differentiable in the weights
        share = share * weight[labels]
    loss = -input.gather(1, labels.unsqueeze(1)).squeeze(1) * share
    if reduction == "none":
        return loss
    return loss.sum() / share.sum() if reduction == "mean" else loss.sum()


@op("SoftmaxCrossEntropyLoss", since=(12, 13), allowed={"reduction": REDUCTIONS})
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
