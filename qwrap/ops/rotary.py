"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from qwrap.errors import UnsupportedOpError
from qwrap.ops.limits import between
from qwrap.ops.precision import accumulator
from qwrap.ops.registry import op


@op(
    "RotaryEmbedding",
    since=(23,),
    allowed={"num_heads": between(0, 2**31 - 1), "rotary_embedding_dim": between(0, 2**31 - 1)},
)
def rotary_embedding(
    X: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Rotate pairs of features of each position by the angles of that position.

    ``X`` is ``[N, heads, length, size]`` or ``[N, length, heads * size]``; the caches hold a row
    per position, ``[positions, pairs]``, or without ``position_ids`` are ``[N, length, pairs]``.
    """
    if X.ndim == 3 and not num_heads:
        raise UnsupportedOpError("RotaryEmbedding of a 3-D input needs num_heads")
    heads = X.transpose(1, 2) if X.ndim == 4 else X.reshape(*X.shape[:2], num_heads, -1)
    size = rotary_embedding_dim or heads.shape[3]
    if size > heads.shape[3] or size != 2 * cos_cache.shape[-1]:
        raise UnsupportedOpError(
            f"RotaryEmbedding: {cos_cache.shape[-1]} angles for {size} of {heads.shape[3]} features"
        )
    if position_ids is not None:
        cos_cache, sin_cache = cos_cache[position_ids], sin_cache[position_ids]
    wide = accumulator(X)
    cos, sin = cos_cache.to(wide).unsqueeze(2), sin_cache.to(wide).unsqueeze(2)
    rotated = _rotated(heads[..., :size].to(wide), cos, sin, bool(interleaved)).to(X.dtype)
    y = torch.cat((rotated, heads[..., size:]), -1) if size < heads.shape[3] else rotated
    return y.transpose(1, 2) if X.ndim == 4 else y.reshape(X.shape)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs of features: neighbours if ``interleaved``, else halves apart."""
    real, imaginary = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    parts = cos * real - sin * imaginary, sin * real + cos * imaginary
    return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
