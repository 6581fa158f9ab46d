"""Normalisation with what onnxruntime's optimizer fuses into it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.limits import one_of
from qwrap.ops.norm import layer_normalization
from qwrap.ops.registry import op

FLOAT_STASH = {"stash_type": one_of(1)}  # float32
EPSILON = 9.999999960041972e-13  # 1e-12 as float32

# Before opset 17 onnxruntime had LayerNormalization as an operator of its own in ai.onnx.
op("LayerNormalization", since=(1,), ignored=("stash_type",), allowed=FLOAT_STASH)(
    layer_normalization
)


def _stash(x: Tensor) -> Tensor:
    """Return ``x`` in the type that statistics are computed in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _inverse_rms(x: Tensor, dims: list[int], epsilon: float) -> Tensor:
    return torch.rsqrt(x.square().mean(dims, keepdim=True) + epsilon)


@op("SimplifiedLayerNormalization", since=(1,), ignored=("stash_type",), allowed=FLOAT_STASH)
def simplified_layer_normalization(
    X: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, output_count: int = 1
) -> tuple[Tensor, ...]:
    """Divide by the root mean square over the axes from ``axis`` on.

    An operator that onnxruntime adds to ai.onnx: what became RMSNormalization-23.
    """
    stash = _stash(X)
    inverse = _inverse_rms(stash, list(range(axis % X.ndim, X.ndim)), epsilon)
    y = (stash * inverse * scale.to(stash.dtype)).to(scale.dtype)
    return (y, inverse)[:output_count]


def _skip_sum(input: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    total = _stash(input) + _stash(skip)
    return total if bias is None else total + bias


@microsoft("SkipLayerNormalization")
def skip_layer_normalization(
    input: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = EPSILON,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Normalise ``input + skip + bias`` over the last axis; the fourth output is that sum.

    Args:
        input: ``[..., hidden]``.
        skip: of that shape, or one that broadcasts to it.
        gamma: ``[hidden]``.
        beta: ``[hidden]``.
        bias: ``[hidden]``.
    """
    total = _skip_sum(input, skip, bias)
    shift = None if beta is None else beta.to(total.dtype)
    y = F.layer_norm(total, total.shape[-1:], gamma.to(total.dtype), shift, epsilon)
    y = y.to(input.dtype)
    if output_count == 1:
        return (y,)
    var, mean = torch.var_mean(total, -1, correction=0, keepdim=True)
    return (y, mean, torch.rsqrt(var + epsilon), total.to(input.dtype))[:output_count]


@microsoft("SkipSimplifiedLayerNormalization")
def skip_simplified_layer_normalization(
    input: Tensor,
    skip: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float = EPSILON,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Divide ``input + skip + bias`` by its root mean square over the last axis.

    The second output, a mean, does not exist here and is zero; the fourth is the sum.
    """
    total = _skip_sum(input, skip, bias)
    inverse = _inverse_rms(total, [-1], epsilon)
    y = (total * inverse * gamma).to(input.dtype)
    return (y, torch.zeros_like(inverse), inverse, total.to(input.dtype))[:output_count]


@microsoft("EmbedLayerNormalization", ignored=("mask_index_type",))
def embed_layer_normalization(
    input_ids: Tensor,
    segment_ids: Tensor | None,
    word_embedding: Tensor,
    position_embedding: Tensor,
    segment_embedding: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    epsilon: float = EPSILON,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Add up the embeddings of words, positions and segments and normalise over the last axis.

    Args:
        input_ids: int32 ``[batch, sequence]``.
        segment_ids: int32 ``[batch, sequence]``.
        word_embedding: ``[words, hidden]``; the other tables likewise.
        position_embedding: rows are taken in order where there are no ``position_ids``.
        segment_embedding: see ``segment_ids``.
        gamma: ``[hidden]``.
        beta: ``[hidden]``.
        mask: int32 ``[batch, sequence]``.
        position_ids: int32 ``[batch, sequence]`` or ``[1, sequence]``.

    Returns:
        The normalised sum, how many entries of each row of ``mask`` are 1, and the sum.
    """
    if position_ids is None:
        positions = position_embedding[: input_ids.shape[1]]
    else:
        positions = F.embedding(position_ids, position_embedding)
    total = F.embedding(input_ids, word_embedding) + positions
    if segment_ids is not None and segment_embedding is not None:
        total = total + F.embedding(segment_ids, segment_embedding)
    y = F.layer_norm(total, total.shape[-1:], gamma, beta, epsilon)
    return (y, ones_of(input_ids, mask), total)[:output_count]


def ones_of(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return int32 ``[batch]``: how many ones each row of ``mask`` has, 0 without a mask."""
    if mask is None:
        return torch.zeros_like(input_ids[:, 0], dtype=torch.int32)
    return (mask == 1).sum(1, dtype=torch.int32)


@microsoft("GroupNorm")
def group_norm(
    X: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    activation: int,
    groups: int,
    channels_last: int = 1,
    epsilon: float = 9.999999747378752e-06,
) -> Tensor:
    """Normalise groups of channels, then apply SiLU if ``activation`` is 1."""
    x = _stash(X).movedim(-1, 1) if channels_last else _stash(X)
    y = F.group_norm(x, groups, gamma.to(x.dtype), beta.to(x.dtype), epsilon)
    y = F.silu(y) if activation else y
    return (y.movedim(1, -1) if channels_last else y).to(X.dtype)


@microsoft("SkipGroupNorm")
def skip_group_norm(
    X: Tensor,
    gamma: Tensor,
    beta: Tensor,
    skip: Tensor,
    bias: Tensor | None = None,
    *,
    activation: int,
    groups: int,
    channels_last: int = 1,
    epsilon: float = 9.999999747378752e-06,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Apply GroupNorm to ``X + skip + bias``, which is the second output.

    ``skip`` is ``[N, C]`` or of rank 4; its spatial axes may be 1.
    """
    rest = [1] * (X.ndim - 2)
    channels = (skip.shape[0], *rest, skip.shape[1]) if channels_last else (*skip.shape, *rest)
    total = X + (skip.reshape(channels) if skip.ndim == 2 else skip)
    if bias is not None:
        total = total + (bias if channels_last else bias.reshape(-1, *rest))
    y = group_norm(
        total,
        gamma,
        beta,
        activation=activation,
        groups=groups,
        channels_last=channels_last,
        epsilon=epsilon,
    )
    return (y, total)[:output_count]
