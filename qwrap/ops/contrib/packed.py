"""Attention over the tokens of several sequences without padding between them.

``token_offset`` ``[B, S]`` tells where the tokens lie in the padded batch: those of the T real
tokens first, then those of padding. ``cumulative_sequence_length`` ``[B + 1]`` tells where each
sequence begins among the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwrap.ops.contrib.attention import MASK_FILTER, attention, multi_head_attention
from qwrap.ops.contrib.domain import microsoft


@microsoft("RemovePadding")
def remove_padding(
    input: Tensor, sequence_token_count: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the real tokens of ``input`` ``[B, S, D]``, and where they and each sequence lie."""
    size = input.shape[1]
    real = torch.arange(size, device=input.device) < sequence_token_count.unsqueeze(1)
    flat = real.flatten()
    token_offset = torch.cat((flat.nonzero(), (~flat).nonzero())).to(torch.int32)
    ends = sequence_token_count.cumsum(0, dtype=torch.int32)
    begins = torch.cat((torch.zeros_like(ends[:1]), ends))
    longest = sequence_token_count.amax(0, keepdim=True)
    return input.flatten(0, 1)[flat], token_offset.reshape(real.shape), begins, longest


@microsoft("RestorePadding")
def restore_padding(input: Tensor, token_offset: Tensor) -> Tensor:
    """Return ``[B, S, D]`` with the real tokens ``[T, D]`` in their places and zeros elsewhere."""
    batch, size = token_offset.shape
    places = token_offset.flatten()[: input.shape[0]].long()
    padded = input.new_zeros(batch * size, input.shape[1]).index_copy(0, places, input)
    return padded.reshape(batch, size, -1)


def _taken(padded: Tensor, token_offset: Tensor, count: int) -> Tensor:
    return padded.flatten(0, 1)[token_offset.flatten()[:count].long()]


def _lengths(cumulative_sequence_length: Tensor) -> Tensor:
    return cumulative_sequence_length[1:] - cumulative_sequence_length[:-1]


@microsoft("PackedAttention")
def packed_attention(
    input: Tensor,
    weights: Tensor,
    bias: Tensor,
    token_offset: Tensor,
    cumulative_sequence_length: Tensor,
    attention_bias: Tensor | None = None,
    *,
    num_heads: int,
    qkv_hidden_sizes: Sequence[int] | None = None,
    scale: float = 0.0,
) -> Tensor:
    """Apply Attention to the real tokens ``[T, D]``, each sequence to itself."""
    (y,) = attention(
        restore_padding(input, token_offset),
        weights,
        bias,
        _lengths(cumulative_sequence_length),
        None,
        attention_bias,
        num_heads=num_heads,
        qkv_hidden_sizes=qkv_hidden_sizes,
        scale=scale,
        mask_filter_value=torch.finfo(input.dtype).min,
    )
    return _taken(y, token_offset, input.shape[0])


@microsoft("PackedMultiHeadAttention")
def packed_multi_head_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    bias: Tensor | None,
    token_offset: Tensor,
    cumulative_sequence_length: Tensor,
    attention_bias: Tensor | None = None,
    *,
    num_heads: int,
    mask_filter_value: float = MASK_FILTER,
    scale: float = 0.0,
) -> Tensor:
    """Apply MultiHeadAttention to real tokens, each sequence to itself.

    ``query`` is ``[T, N * H]``, or with keys and values ``[T, N, 3, H]``.
    """
    if key is None or value is None:
        query, key, value = (part.flatten(1) for part in query.unbind(2))
    q, k, v = (restore_padding(x, token_offset) for x in (query, key, value))
    (y,) = multi_head_attention(
        q,
        k,
        v,
        bias,
        _lengths(cumulative_sequence_length),
        attention_bias,
        num_heads=num_heads,
        mask_filter_value=mask_filter_value,
        scale=scale,
    )
    return _taken(y, token_offset, query.shape[0])
