"""Batch normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.ops.precision import accumulator
from qwrap.ops.registry import op


@op("BatchNormalization", since=(1, 6, 7))
def batch_normalization_7(
    X: Tensor,
    scale: Tensor,
    B: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    is_test: int = 0,
    momentum: float = 0.9,
    spatial: int = 1,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Normalise each channel, or without ``spatial`` each element, over the batch."""
    x = X if spatial else X.flatten(1)
    parts = scale.flatten(), B.flatten(), mean.flatten(), var.flatten()
    y, *statistics = batch_normalization_9(
        x,
        *parts,
        epsilon=epsilon,
        momentum=momentum,
        output_count=1 if is_test else output_count,
    )
    return (y.reshape(X.shape), *(s.reshape(mean.shape) for s in statistics))


@op("BatchNormalization", since=(9,))
def batch_normalization_9(
    X: Tensor,
    scale: Tensor,
    B: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Normalise each channel; that the node names more than one output means training.

    The last output, ``saved_var``, is the inverse standard deviation, as in onnxruntime.
    """
    if output_count == 1:
        return (_normalized(X, scale, B, mean, var, epsilon),)
    batch_mean, batch_var = _statistics(X)
    y = _normalized(X, scale, B, batch_mean, batch_var, epsilon)
    saved = batch_mean.to(mean.dtype), torch.rsqrt(batch_var + epsilon).to(var.dtype)
    running = _running(mean, batch_mean, momentum), _running(var, batch_var, momentum)
    return (y, *running, *saved)[:output_count]


@op("BatchNormalization", since=(14, 15))
def batch_normalization(
    X: Tensor,
    scale: Tensor,
    B: Tensor,
    input_mean: Tensor,
    input_var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> tuple[Tensor, ...]:
    """Normalise each channel with given statistics, or with those of the batch if training.

    In training mode also returns the running statistics; ONNX's variance divides by the number of
    values, torch's own running variance by one less.
    """
    if not training_mode:
        return (_normalized(X, scale, B, input_mean, input_var, epsilon),)
    mean, var = _statistics(X)
    y = _normalized(X, scale, B, mean, var, epsilon)
    return (y, _running(input_mean, mean, momentum), _running(input_var, var, momentum))


def _normalized(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, epsilon: float
) -> Tensor:
    if x.dtype == scale.dtype == mean.dtype and not mean.requires_grad and not var.requires_grad:
        return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)
    # ``F.batch_norm`` passes no gradient to statistics, and takes one type for all parameters.
    wide = torch.promote_types(accumulator(x), mean.dtype)
    shape = (-1, *[1] * (x.ndim - 2))
    factor = scale.to(wide) * torch.rsqrt(var.to(wide) + epsilon)
    y = (x.to(wide) - mean.to(wide).reshape(shape)) * factor.reshape(shape)
    return (y + bias.to(wide).reshape(shape)).to(x.dtype)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel over everything else."""
    axes = [0, *range(2, x.ndim)]
    var, mean = torch.var_mean(x.to(accumulator(x)), axes, correction=0)
    return mean, var


def _running(before: Tensor, current: Tensor, momentum: float) -> Tensor:
    return before * momentum + current.to(before.dtype) * (1 - momentum)
