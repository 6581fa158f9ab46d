"""Attention of heads whose weights and masks come in the many forms of com.microsoft.

Letters: B batch, S queries, L new keys, P past keys, T = P + L all keys, N heads, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import InputError
from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.limits import at_least, one_of

MASK_FILTER = -10000.0


def heads(x: Tensor, count: int) -> Tensor:
    """Return ``[B, S, N * H]`` as ``[B, N, S, H]``."""
    return x.reshape(*x.shape[:-1], count, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """Return ``[B, N, S, H]`` as ``[B, S, N * H]``."""
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """Return the attention of ``q`` ``[B, N, S, H]`` to ``k`` and ``v``, as ``[B, S, N * H]``."""
    return joined(F.scaled_dot_product_attention(q, k, v, bias, scale=scale or None))


def scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """Return what goes into the softmax of ``attend``, ``[B, N, S, T]``."""
    product = torch.matmul(q, k.transpose(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    return product if bias is None else product + bias


def mask_bias(mask: Tensor, q: Tensor, total: int, filter_value: float) -> Tensor | None:
    """Return what a mask adds to scores ``[B, N, S, T]``: 0 or ``filter_value``.

    Args:
        mask: int32. Of rank 1 the lengths of the sequences ``[B]``, those and where they start
            ``[2 * B]``, or the lengths and more ``[3 * B + 2]``; else 0 where not to attend:
            ``[B, T]``, ``[B, S, T]``, or from the start of all tokens ``[B, 1, max, max]``. A
            second axis of 1 in ``[B, 1]`` masks nothing.
        q: queries ``[B, N, S, H]``.
        total: T.
        filter_value: what makes a score negligible.
    """
    batch, queries = q.shape[0], q.shape[2]
    if mask.ndim == 1:
        position = torch.arange(total, device=mask.device)
        keep = position < mask[:batch, None]
        if mask.shape[0] == 2 * batch:
            keep = keep & (position >= mask[batch:, None])
        keep = keep[:, None, None]
    elif mask.ndim == 2:
        if mask.shape[1] == 1 and total != 1:
            return None
        keep = (mask > 0)[:, None, None]
    elif mask.ndim == 3:
        keep = (mask > 0)[:, None]
    else:
        keep = (mask > 0)[:, :, total - queries : total, :total]
    return torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, filter_value)


def causal_bias(q: Tensor, total: int) -> Tensor:
    """Return what keeps each query from later keys: the lowest number of the type."""
    queries = q.shape[2]
    position = torch.arange(total, device=q.device)
    later = position > position[total - queries :, None]
    lowest = torch.finfo(q.dtype).min
    return torch.zeros_like(later, dtype=q.dtype).masked_fill(later, lowest)


def total_bias(
    q: Tensor,
    total: int,
    mask: Tensor | None,
    attention_bias: Tensor | None,
    filter_value: float,
    unidirectional: int,
) -> Tensor | None:
    """Return the sum of all that is added to the scores, None if nothing is."""
    parts = [] if attention_bias is None else [attention_bias]
    masking = None if mask is None else mask_bias(mask, q, total, filter_value)
    if unidirectional and q.shape[2] > 1:
        causal = causal_bias(q, total)
        # The lowest number replaces what a mask adds: a sum of both would be -inf.
        masking = causal if masking is None else torch.minimum(causal, masking)
    if masking is not None:
        parts.append(masking)
    return sum(parts[1:], parts[0]) if parts else None


def with_past(past: Tensor | None, new: Tensor, length: int | None) -> tuple[Tensor, Tensor]:
    """Return all keys (or values) ``[B, N, T, H]`` and what to hand to the next call.

    Args:
        past: ``[B, N, P, H]``, or with ``length`` a buffer ``[B, N, max, H]``.
        new: ``[B, N, L, H]``.
        length: P where ``past`` is a buffer; what to hand on is then one too.
    """
    if past is None:
        return new, new
    if length is None:
        keys = torch.cat((past, new), 2)
        return keys, keys
    keys = torch.cat((past[:, :, :length], new), 2)
    return keys, torch.cat((keys, past[:, :, keys.shape[2] :]), 2)


def length_of(past_sequence_length: int | Sequence[int] | None) -> int | None:
    """Return the one number of an input that may be a scalar or a list of one."""
    if isinstance(past_sequence_length, Sequence):
        return past_sequence_length[0]
    return past_sequence_length


NO_ROTARY = {"do_rotary": one_of(0), "num_heads": at_least(1)}  # no CPU kernel has do_rotary


@microsoft("Attention", host=(6,), ignored=("rotary_embedding_dim",), allowed=NO_ROTARY)
def attention(
    input: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    mask_index: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_sequence_length: int | Sequence[int] | None = None,
    *,
    num_heads: int,
    do_rotary: int = 0,
    mask_filter_value: float = MASK_FILTER,
    past_present_share_buffer: int = 0,
    qkv_hidden_sizes: Sequence[int] | None = None,
    scale: float = 0.0,
    unidirectional: int = 0,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Project ``input`` to queries, keys and values and attend to past and present keys.

    Args:
        input: ``[B, S, D]``.
        weights: ``[D, 2 * N * H + N * Hv]``.
        bias: ``[2 * N * H + N * Hv]``.
        mask_index: see ``mask_bias``.
        past: keys and values ``[2, B, N, P, H]``, or buffers with ``past_present_share_buffer``.
        attention_bias: added to the scores ``[B, N, S, T]``.
        past_sequence_length: P where ``past`` holds buffers.

    Returns:
        ``[B, S, N * Hv]`` and, if wanted, keys and values for the next call.
    """
    del do_rotary
    packed = torch.matmul(input, weights)
    packed = packed if bias is None else packed + bias
    sizes = list(qkv_hidden_sizes) if qkv_hidden_sizes else [weights.shape[1] // 3] * 3
    q, k, v = (heads(part, num_heads) for part in torch.split(packed, sizes, -1))
    length = length_of(past_sequence_length) if past_present_share_buffer else None
    k, next_k = with_past(None if past is None else past[0], k, length)
    v, next_v = with_past(None if past is None else past[1], v, length)
    total = k.shape[2]
    added = total_bias(q, total, mask_index, attention_bias, mask_filter_value, unidirectional)
    y = attend(q, k, v, added, scale)
    return (y,) if output_count == 1 else (y, torch.stack((next_k, next_v)))


@microsoft(
    "MultiHeadAttention",
    host=(8,),
    allowed={"num_heads": at_least(1)},
    absent={9: "cache_indirection"},
)
def multi_head_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_sequence_length: int | Sequence[int] | None = None,
    cache_indirection: Tensor | None = None,
    *,
    num_heads: int,
    mask_filter_value: float = MASK_FILTER,
    scale: float = 0.0,
    unidirectional: int = 0,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Attend with projected queries, keys and values.

    Args:
        query: ``[B, S, N * H]``, or with keys and values ``[B, S, N, 3, H]``.
        key: ``[B, L, N * H]``; with values ``[B, L, N, 2, H]``; or all keys ``[B, N, L, H]``.
        value: ``[B, L, N * Hv]`` or ``[B, N, L, Hv]``.
        bias: of queries, keys and values one after the other.
        key_padding_mask: see ``mask_bias``.
        attention_bias: added to the scores ``[B, N, S, T]``.
        past_key: ``[B, N, P, H]``, or a buffer if there is a ``past_sequence_length``.
        past_value: likewise.
        past_sequence_length: P where the past is in buffers.
        cache_indirection: must be None: which beam a past token came from.

    Returns:
        ``[B, S, N * Hv]``; if wanted keys and values for the next call and the scores.
    """
    del cache_indirection
    q, k, v = projected(query, key, value, bias, num_heads)
    length = length_of(past_sequence_length)
    k, next_k = with_past(past_key, k, length)
    v, next_v = with_past(past_value, v, length)
    total = k.shape[2]
    added = total_bias(
        q, total, key_padding_mask, attention_bias, mask_filter_value, unidirectional
    )
    y = attend(q, k, v, added, scale)
    if output_count < 4:
        return (y, next_k, next_v)[:output_count]
    return y, next_k, next_v, scores(q, k, added, scale)


def projected(
    query: Tensor, key: Tensor | None, value: Tensor | None, bias: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values ``[B, N, length, H]`` of whatever form they came in."""
    if query.ndim == 5:
        q, k, v = query.unbind(3)
        return _biased(q.flatten(2), k.flatten(2), v.flatten(2), bias, num_heads)
    if key is None:  # one after the other along the last axis
        q, k, v = query.chunk(3, -1)
        return _biased(q, k, v, bias, num_heads)
    if key.ndim == 5:
        k, v = (part.flatten(2) for part in key.unbind(3))
        return _biased(query, k, v, bias, num_heads)
    if value is None:
        raise InputError(f"a key of rank {key.ndim}, but the value is left out")
    if key.ndim == 4:
        own = query if bias is None else query + bias[: query.shape[-1]]
        return heads(own, num_heads), key, value
    return _biased(query, key, value, bias, num_heads)


def _biased(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    if bias is not None:
        parts = torch.split(bias, [q.shape[-1], k.shape[-1], v.shape[-1]])
        q, k, v = (x + part for x, part in zip((q, k, v), parts, strict=True))
    return heads(q, num_heads), heads(k, num_heads), heads(v, num_heads)
