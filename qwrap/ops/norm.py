"""Normalisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from qwrap.ops.element_types import TORCH_DTYPES
from qwrap.ops.limits import at_least, one_of
from qwrap.ops.precision import accumulator
from qwrap.ops.registry import op


@op("InstanceNormalization", since=(1, 6, 22))
def instance_normalization(
    input: Tensor, scale: Tensor, B: Tensor, *, epsilon: float = 1e-5
) -> Tensor:
    """Normalise each channel of each sample.

    ``F.instance_norm`` would refuse a single spatial element, for which ONNX gives ``B``.
    """
    return torch.instance_norm(input, scale, B, None, None, True, 0.0, epsilon, False)


STASH_TYPES: Mapping[int, torch.dtype] = MappingProxyType({
    dtype: TORCH_DTYPES[dtype]
    for dtype in (
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.DOUBLE,
        TensorProto.BFLOAT16,
    )
})

STASH = one_of(*STASH_TYPES)
"""What ``stash_type`` may name."""


def _widened(x: Tensor, stash_type: int) -> Tensor:
    """Return ``x`` in the type that ``stash_type`` asks for, or a wider one."""
    return x.to(torch.promote_types(accumulator(x), STASH_TYPES[stash_type]))


@op("LayerNormalization", since=(17,), allowed={"stash_type": STASH})
def layer_normalization(
    X: Tensor,
    Scale: Tensor,
    B: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Normalise over the axes from ``axis`` on; scale and bias broadcast to ``X``.

    torch computes half precision in float32, which is what ``stash_type=1`` asks for.
    """
    shape = X.shape[axis:]
    wide = X if stash_type == TensorProto.FLOAT else _widened(X, stash_type)
    if wide.dtype == X.dtype and Scale.shape == shape and (B is None or B.shape == shape):
        y = F.layer_norm(X, shape, Scale, B, epsilon)
    else:
        y = F.layer_norm(wide, shape, None, None, epsilon).to(X.dtype) * Scale
        y = y if B is None else y + B
    if output_count == 1:
        return (y,)
    axes = list(range(axis % X.ndim, X.ndim))
    var, mean = torch.var_mean(_widened(X, stash_type), axes, correction=0, keepdim=True)
    stash = STASH_TYPES[stash_type]
    return (y, mean.to(stash), torch.rsqrt(var + epsilon).to(stash))[:output_count]


@op("RMSNormalization", since=(23,), allowed={"stash_type": STASH})
def rms_normalization(
    X: Tensor,
    scale: Tensor,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    """Divide by the root of the mean square over the axes from ``axis`` on, then scale."""
    wide = _widened(X, stash_type)
    normalized = F.rms_norm(wide, X.shape[axis:], None, epsilon)
    return normalized.to(X.dtype) * scale


@op("GroupNormalization", since=(21,), allowed={"num_groups": at_least(1), "stash_type": STASH})
def group_normalization(
    X: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    epsilon: float = 1e-5,
    num_groups: int,
    stash_type: int = 1,
) -> Tensor:
    """Normalise each group of channels of each sample; scale and bias are per channel.

    ``F.group_norm`` would refuse groups of a single element, for which ONNX gives ``bias``.
    """
    if stash_type == TensorProto.FLOAT:  # torch computes half precision in float32
        return torch.group_norm(X, num_groups, scale, bias, epsilon, False)
    y = torch.group_norm(_widened(X, stash_type), num_groups, None, None, epsilon, False)
    shape = (-1, *[1] * (X.ndim - 2))
    return y.to(X.dtype) * scale.reshape(shape) + bias.reshape(shape)


@op("GroupNormalization", since=(18,), allowed={"num_groups": at_least(1)})
def group_normalization_18(
    X: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5, num_groups: int
) -> Tensor:
    """Normalise each group of channels of each sample; scale and bias are per group."""
    repeats = X.shape[1] // num_groups
    scale, bias = scale.repeat_interleave(repeats), bias.repeat_interleave(repeats)
    return group_normalization(X, scale, bias, epsilon=epsilon, num_groups=num_groups)


@op("LpNormalization", since=(1, 22), allowed={"p": one_of(1, 2)})
def lp_normalization(input: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Divide by the ``p``-norm along ``axis``; where that is zero, so is the result."""
    wide = input.to(accumulator(input))
    norm = torch.linalg.vector_norm(wide, p, axis, keepdim=True)
    y: Tensor = wide / torch.where(norm == 0, 1.0, norm)
    return y.to(input.dtype)


@op("MeanVarianceNormalization", since=(9, 13))
def mean_variance_normalization(X: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    """Subtract the mean over ``axes`` and divide by the standard deviation.

    The 1e-9 is that of the schema's function body. The deviation is computed as a norm because
    that has a gradient where it is zero.
    """
    dims = tuple(axes)
    wide = X.to(accumulator(X))
    centred = wide - wide.mean(dims, keepdim=True)
    count = math.prod([X.shape[axis] for axis in dims])
    deviation = torch.linalg.vector_norm(centred, 2, dims, keepdim=True) / math.sqrt(count)
    y: Tensor = centred / (deviation + 1e-9)
    return y.to(X.dtype)


@op("LRN", since=(1, 13), allowed={"size": at_least(1)})
def local_response_normalization(
    X: Tensor, *, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int
) -> Tensor:
    """Divide by a power of the sum of squares of ``size`` neighbouring channels.

    An even ``size`` reaches one channel further up than down; in torch it is the other way round.
    """
    wide = X.to(accumulator(X))
    rows = wide.reshape(X.shape[0], 1, X.shape[1], -1)
    squares = F.pad(rows * rows, (0, 0, (size - 1) // 2, size // 2))
    mean = F.avg_pool2d(squares, (size, 1), (1, 1)).reshape(X.shape)
    y: Tensor = wide / (bias + alpha * mean) ** beta
    return y.to(X.dtype)
