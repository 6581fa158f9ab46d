"""Normalisation and dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import UnsupportedOpError
from qwrap.ops.registry import op


@op("BatchNormalization", since=(1, 6, 7, 9), ignored=("is_test", "momentum"))
def batch_normalization(
    X: Tensor,
    scale: Tensor,
    B: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    spatial: int = 1,
) -> tuple[Tensor, ...]:
    """Normalise each channel with given statistics.

    The training form of these revisions, which returns five outputs, is never meant in a file
    that is used for inference.
    """
    if not spatial:
        raise UnsupportedOpError("BatchNormalization with spatial=0; only spatial=1 is supported")
    return (F.batch_norm(X, mean, var, scale, B, False, 0.0, epsilon),)


@op("BatchNormalization", since=(14, 15))
def batch_normalization_14(
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
        return (F.batch_norm(X, input_mean, input_var, scale, B, False, 0.0, epsilon),)
    y = F.batch_norm(X, None, None, scale, B, True, 0.0, epsilon)
    dims = [0, *range(2, X.ndim)]
    var, mean = torch.var_mean(X.to(input_mean.dtype), dims, correction=0)
    return (
        y,
        input_mean * momentum + mean * (1 - momentum),
        input_var * momentum + var * (1 - momentum),
    )


@op("InstanceNormalization", since=(1, 6, 22))
def instance_normalization(
    input: Tensor, scale: Tensor, B: Tensor, *, epsilon: float = 1e-5
) -> Tensor:
    """Normalise each channel of each sample.

    ``F.instance_norm`` would refuse a single spatial element, for which ONNX gives ``B``.
    """
    return torch.instance_norm(input, scale, B, None, None, True, 0.0, epsilon, False)


@op("LayerNormalization", since=(17,), ignored=("stash_type",))
def layer_normalization(
    X: Tensor,
    Scale: Tensor,
    B: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Normalise over the axes from ``axis`` on; scale and bias broadcast to ``X``.

    torch computes half precision in float32, which is what ``stash_type=1`` asks for.
    """
    shape = X.shape[axis:]
    if Scale.shape == shape and (B is None or B.shape == shape):
        y = F.layer_norm(X, shape, Scale, B, epsilon)
    else:
        y = F.layer_norm(X, shape, None, None, epsilon) * Scale
        y = y if B is None else y + B
    if output_count == 1:
        return (y,)
    dims = list(range(axis % X.ndim, X.ndim))
    stash = X.float() if X.dtype in (torch.float16, torch.bfloat16) else X
    var, mean = torch.var_mean(stash, dims, correction=0, keepdim=True)
    return (y, mean, torch.rsqrt(var + epsilon))[:output_count]


@op("Dropout", since=(1, 6, 7), ignored=("is_test", "ratio"))
def dropout_without_mask_type(data: Tensor, *, output_count: int = 1) -> tuple[Tensor, ...]:
    """Return ``data``; these revisions drop nothing in inference. The mask has its type."""
    return (data, torch.ones_like(data))[:output_count]


@op("Dropout", since=(10,), ignored=("ratio",))
def dropout_without_training(data: Tensor, *, output_count: int = 1) -> tuple[Tensor, ...]:
    """Return ``data``; the mask is left open in inference, and onnxruntime fills it with false."""
    return (data, torch.zeros_like(data, dtype=torch.bool))[:output_count]


@op("Dropout", since=(12, 13, 22), host=(1, 2), ignored=("seed",))
def dropout(
    data: Tensor,
    ratio: float | None = None,
    training_mode: bool | None = None,
    *,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Zero a random share ``ratio`` of ``data`` and scale the rest, if training.

    The random numbers are torch's; the attribute ``seed`` fixes them in no other runtime either.
    """
    ratio = 0.5 if ratio is None else ratio
    if not training_mode or ratio == 0:
        return (data, torch.ones_like(data, dtype=torch.bool))[:output_count]
    mask = torch.rand_like(data) >= ratio
    return (data * mask / (1 - ratio), mask)[:output_count]
