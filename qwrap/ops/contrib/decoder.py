"""Attention of one new token to a past that may be kept for several beams."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwrap.ops.contrib.attention import (
    MASK_FILTER,
    NO_ROTARY,
    attend,
    attention,
    length_of,
    projected,
    scores,
    total_bias,
    with_past,
)
from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.limits import at_least


def _of_beams(past: Tensor, cache_indirection: Tensor | None, length: int | None) -> Tensor:
    """Return the past of each beam, its tokens taken from the beams they came from.

    Args:
        past: ``[B * beams, N, max, H]``.
        cache_indirection: ``[B, beams, max]``.
        length: how many tokens of the past are in use.
    """
    if cache_indirection is None:
        return past
    beams = cache_indirection.shape[1]
    origin = cache_indirection[:, :, :length].long().flatten(0, 1)
    rows = torch.arange(past.shape[0], device=past.device) // beams * beams
    tokens = torch.arange(origin.shape[1], device=past.device)
    chosen = past[rows.unsqueeze(1) + origin, :, tokens].transpose(1, 2)
    return torch.cat((chosen, past[:, :, origin.shape[1] :]), 2)


@microsoft(
    "DecoderMaskedMultiHeadAttention",
    host=(7,),
    ignored=("output_qk",),
    allowed={"num_heads": at_least(1)},
)
def decoder_masked_multi_head_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    mask_index: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_sequence_length: int | Sequence[int] | None = None,
    beam_width: Tensor | None = None,
    cache_indirection: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_heads: int,
    mask_filter_value: float = MASK_FILTER,
    past_present_share_buffer: int = 0,
    scale: float = 0.0,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Attend with one projected query.

    Args:
        query: ``[B, 1, N * H]``, or with keys and values behind.
        key: ``[B, 1, N * H]``, or all keys of another sequence ``[B, N, L, H]``.
        value: likewise.
        mask_index: ``[B, T]``, 0 where not to attend.
        attention_bias: added to the scores ``[B, N, 1, T]``.
        past_key: ``[B, N, P, H]``, or a buffer with ``past_present_share_buffer``.
        past_value: likewise.
        past_sequence_length: P where the past is in buffers.
        beam_width: as the shape of ``cache_indirection`` has it.
        cache_indirection: ``[B / beams, beams, max]``: which beam each past token came from.
        bias: of queries, keys and values one after the other.

    Returns:
        ``[B, 1, N * Hv]``; if wanted keys and values for the next call and the scores.
    """
    del beam_width
    q, k, v = projected(query, key, value, bias, num_heads)
    length = length_of(past_sequence_length) if past_present_share_buffer else None
    next_k = next_v = k
    if past_key is not None and past_value is not None:
        _, next_k = with_past(past_key, k, length)
        _, next_v = with_past(past_value, v, length)
        k, _ = with_past(_of_beams(past_key, cache_indirection, length), k, length)
        v, _ = with_past(_of_beams(past_value, cache_indirection, length), v, length)
    else:
        next_v = v
    added = total_bias(q, k.shape[2], mask_index, attention_bias, mask_filter_value, 0)
    y = attend(q, k, v, added, scale)
    if output_count < 4:
        return (y, next_k, next_v)[:output_count]
    return y, next_k, next_v, scores(q, k, added, scale)


@microsoft(
    "DecoderMaskedSelfAttention",
    host=(6,),
    allowed=NO_ROTARY,
    absent={8: "cache_indirection"},
)
def decoder_masked_self_attention(
    input: Tensor,
    weights: Tensor,
    bias: Tensor,
    mask_index: Tensor | None,
    past: Tensor,
    attention_bias: Tensor | None,
    past_sequence_length: int | Sequence[int],
    beam_width: Tensor | None = None,
    cache_indirection: Tensor | None = None,
    *,
    num_heads: int,
    do_rotary: int = 0,
    mask_filter_value: float = MASK_FILTER,
    past_present_share_buffer: int = 0,
    scale: float = 0.0,
    output_count: int = 2,
) -> tuple[Tensor, ...]:
    """Apply Attention to one token; inputs and outputs as there, beams as one operator up."""
    del beam_width, cache_indirection
    return attention(
        input,
        weights,
        bias,
        mask_index,
        past,
        attention_bias,
        past_sequence_length,
        num_heads=num_heads,
        do_rotary=do_rotary,
        mask_filter_value=mask_filter_value,
        past_present_share_buffer=past_present_share_buffer,
        scale=scale,
        output_count=output_count,
    )
