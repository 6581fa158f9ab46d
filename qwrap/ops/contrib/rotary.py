"""Rotary position embedding.

Source: Su et al., arXiv:2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwrap.ops.contrib.domain import microsoft


def rotate(
    x: Tensor, positions: Tensor, cos_cache: Tensor, sin_cache: Tensor, interleaved: int
) -> Tensor:
    """Turn pairs of features of ``x`` by the angles of their positions.

    Args:
        x: ``[B, N, S, H]``; what is beyond twice the width of the caches stays as it is.
        positions: ``[B, S]`` or ``[1, S]``.
        cos_cache: ``[max, R / 2]``.
        sin_cache: likewise.
        interleaved: pairs are neighbours, instead of one from each half of the R features.
    """
    cos, sin = (cache[positions].unsqueeze(1) for cache in (cos_cache, sin_cache))
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pairs = (a * cos - b * sin, a * sin + b * cos)
    y = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return y if rest.shape[-1] == 0 else torch.cat((y, rest), -1)


@microsoft("RotaryEmbedding", ignored=("is_packed_batching", "scale"))
def rotary_embedding(
    input: Tensor,
    position_ids: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Turn pairs of features by the angles of their positions.

    Args:
        input: ``[B, S, N * H]`` or ``[B, N, S, H]``.
        position_ids: ``[B, S]``, or ``[1]``: that of the first token.
        cos_cache: ``[max, H / 2]``, or ``[max, rotary_embedding_dim / 2]``.
        sin_cache: likewise.
        interleaved: see ``rotate``.
        num_heads: N, needed where only a part of each head is turned.
        rotary_embedding_dim: how many features of each head are turned; all if 0.
    """
    if input.ndim == 4:
        x = input
    else:
        width = input.shape[-1] // num_heads if rotary_embedding_dim else 2 * cos_cache.shape[1]
        x = input.reshape(*input.shape[:-1], -1, width).transpose(1, 2)
    if position_ids.ndim == 1:
        position_ids = position_ids + torch.arange(x.shape[2], device=x.device).unsqueeze(0)
    y = rotate(x, position_ids, cos_cache, sin_cache, interleaved)
    return y if input.ndim == 4 else y.transpose(1, 2).reshape(input.shape)


@microsoft("GemmaRotaryEmbedding")
def gemma_rotary_embedding(
    emb: Tensor, q: Tensor, q_rot: Tensor, k: Tensor, k_rot: Tensor
) -> tuple[Tensor, Tensor]:
    """Mix queries and keys ``[B, N, S, H]`` with their turned selves by angles ``[B, S, H]``."""
    cos, sin = (f(emb).unsqueeze(1).to(q.dtype) for f in (torch.cos, torch.sin))
    return q * cos + q_rot * sin, k * cos + k_rot * sin
