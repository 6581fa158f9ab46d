"""Attention where several heads of queries share one of keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qwrap.errors import InputError
from qwrap.ops.contrib.attention import heads, joined, length_of
from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.contrib.rotary import rotate
from qwrap.ops.limits import at_least, one_of


@microsoft(
    "GroupQueryAttention",
    host=(6,),
    ignored=("kv_cache_bit_width",),  # of a quantized cache, which is refused
    allowed={
        "k_quant_type": one_of("NONE"),
        "kv_num_heads": at_least(1),
        "num_heads": at_least(1),
        "qk_output": one_of(0, 1, 2),
        "sliding_window_cache": one_of(0),
        "v_quant_type": one_of("NONE"),
    },
    absent={12: "k_scale", 13: "v_scale"},
)
def group_query_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    seqlens_k: Tensor,
    total_sequence_length: int | Sequence[int],
    cos_cache: Tensor | None = None,
    sin_cache: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_bias: Tensor | None = None,
    head_sink: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    causal: int = 1,
    do_rotary: int = 0,
    k_quant_type: str = "NONE",
    local_window_size: int = -1,
    qk_norm_epsilon: float = 9.999999974752427e-07,
    qk_output: int = 0,
    rotary_interleaved: int = 0,
    scale: float = 0.0,
    sliding_window_cache: int = 0,
    smooth_softmax: int = -1,
    softcap: float = 0.0,
    v_quant_type: str = "NONE",
    output_count: int = 3,
) -> tuple[Tensor, ...]:
    """Attend to keys in buffers that hold a sequence of its own length for each batch entry.

    Letters as in ``attention``; G heads of keys, M the length of the buffers.

    Args:
        query: ``[B, S, N * H]``, or with keys and values behind ``[B, S, (N + 2 * G) * H]``.
        key: ``[B, S, G * H]``.
        value: likewise.
        past_key: ``[B, G, M, H]``, the first entries of which are in use.
        past_value: likewise.
        seqlens_k: ``[B]``: the length of each sequence, these queries included, less one.
        total_sequence_length: the largest of these lengths; S if there is no past.
        cos_cache: ``[max, R / 2]``, for ``do_rotary``.
        sin_cache: likewise.
        position_ids: ``[B, S]``; counted from the length of the past if None.
        attention_bias: added to the scores, ``[B or 1, N or 1, S, T]``.
        head_sink: ``[N]``: a score of each head that takes a share and attends to nothing.
        k_scale: must be None, like all that a quantized buffer needs.
        v_scale: likewise.
        q_norm_weight: ``[H]``: queries of each head are divided by their root mean square.
        k_norm_weight: likewise for keys.

    Returns:
        ``[B, S, N * H]``, buffers of keys and of values, and scores (before the softmax with
        ``qk_output=1``, after it with 2).
    """
    del sliding_window_cache, k_quant_type, v_quant_type, k_scale, v_scale
    q, k, v = _projected(query, key, value, num_heads, kv_num_heads)
    if q_norm_weight is not None and k_norm_weight is not None:
        q = _normalized(q, q_norm_weight, qk_norm_epsilon)
        k = _normalized(k, k_norm_weight, qk_norm_epsilon)
    total, count = length_of(total_sequence_length), q.shape[2]
    assert total is not None
    first = _past_lengths(seqlens_k, count, total)
    positions = first.unsqueeze(1) + torch.arange(count, device=q.device)
    if do_rotary:
        if cos_cache is None or sin_cache is None:
            raise InputError("do_rotary=1, but cos_cache or sin_cache is left out")
        angles = _angles(positions, position_ids, count == total)
        q, k = (rotate(x, angles, cos_cache, sin_cache, rotary_interleaved) for x in (q, k))
    next_k, next_v = (_stored(p, x, first, total) for p, x in ((past_key, k), (past_value, v)))
    weights = _Scores(scale, softcap, smooth_softmax == 1, head_sink)
    allowed = _allowed(positions, next_k.shape[2], causal, local_window_size, seqlens_k)
    k, v = (x.repeat_interleave(num_heads // kv_num_heads, 1) for x in (next_k, next_v))
    before, after = weights(q, k, allowed, attention_bias)
    y = joined(torch.matmul(after, v))
    qk = (before if qk_output == 1 else after)[..., :total]
    return (y, next_k, next_v, qk)[:output_count]


def _projected(
    query: Tensor, key: Tensor | None, value: Tensor | None, num_heads: int, kv_num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    if key is not None and value is not None:
        return heads(query, num_heads), heads(key, kv_num_heads), heads(value, kv_num_heads)
    packed = heads(query, num_heads + 2 * kv_num_heads)
    q, k, v = torch.split(packed, [num_heads, kv_num_heads, kv_num_heads], 1)
    return q, k, v


def _normalized(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide by the root mean square over the last axis, in float32 at least."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * inverse * weight).to(x.dtype)


def _past_lengths(seqlens_k: Tensor, count: int, total: int) -> Tensor:
    """Return ``[B]``: how many keys came before these; none if there is nothing but these."""
    lengths = seqlens_k.reshape(-1).long()
    return torch.zeros_like(lengths) if count == total else lengths + 1 - count


def _angles(positions: Tensor, position_ids: Tensor | None, prompt: bool) -> Tensor:
    """Return the position of each token for the rotary embedding."""
    if position_ids is None:
        return positions
    if prompt:  # only the first of them counts
        return position_ids[:1, :1] + positions
    return position_ids


def _stored(past: Tensor | None, new: Tensor, first: Tensor, total: int) -> Tensor:
    """Return the buffer with ``new`` put behind the ``first`` entries of ``past``, then zeros."""
    size = total if past is None else max(past.shape[2], total)
    old = new.new_zeros(*new.shape[:2], 0, new.shape[3]) if past is None else past
    slots = torch.arange(size, device=new.device)
    start, kept, count = first.unsqueeze(1), old.shape[2], new.shape[2]
    source = torch.where(slots < start, slots, slots - start + kept)
    source = torch.where(slots < start + count, source, kept + count)
    everything = torch.cat((old, new, torch.zeros_like(new[:, :, :1])), 2)
    index = source[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return everything.gather(2, index)


def _allowed(positions: Tensor, size: int, causal: int, window: int, seqlens_k: Tensor) -> Tensor:
    """Return ``[B, 1, S, M]``: which entries of the buffer each query may attend to."""
    slots = torch.arange(size, device=positions.device)
    last = positions.unsqueeze(-1)
    if not causal:
        last = seqlens_k.reshape(-1, 1, 1).long()
        return (slots <= last).expand(-1, positions.shape[1], -1).unsqueeze(1)
    keep = slots <= last
    if window >= 0:
        keep = keep & (slots > last - window)
    return keep.unsqueeze(1)


class _Scores:
    """How scores become shares of attention: scaled, capped, biased, with a share for nothing."""

    def __init__(self, scale: float, softcap: float, smooth: bool, sink: Tensor | None) -> None:
        self.scale, self.softcap, self.smooth, self.sink = scale, softcap, smooth, sink

    def __call__(
        self, q: Tensor, k: Tensor, allowed: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return scores before and shares after the softmax, ``[B, N, S, M]``."""
        factor = self.scale or 1 / math.sqrt(q.shape[-1])
        x = torch.matmul(q, k.transpose(-1, -2)) * factor
        if self.softcap > 0:
            x = self.softcap * torch.tanh(x / self.softcap)
        if bias is not None:
            missing = x.shape[-1] - bias.shape[-1]
            x = x + torch.nn.functional.pad(bias, (0, missing))
        masked = x.masked_fill(~allowed, -math.inf)
        if not self.smooth and self.sink is None:
            return x.masked_fill(~allowed, 0.0), masked.softmax(-1)
        sink = x.new_zeros(1) if self.sink is None else self.sink.to(x.dtype)
        column = sink.reshape(1, -1, 1, 1).expand(*x.shape[:3], 1)
        shares = torch.cat((masked, column), -1).softmax(-1)[..., :-1]
        return x.masked_fill(~allowed, 0.0), shares
