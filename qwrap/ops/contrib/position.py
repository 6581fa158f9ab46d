"""Biases of attention scores by the distance of query and key."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qwrap.ops.contrib.attention import heads, length_of
from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.contrib.packed import restore_padding


@microsoft("RelativePositionBias", host=(1, 2))
def relative_position_bias(
    bias_table: Tensor,
    query_length: int | Sequence[int],
    key_length: int | Sequence[int],
    *,
    max_distance: int,
    is_bidirectional: int = 0,
) -> Tensor:
    """Return ``[1, N, queries, keys]``: entries of a table by buckets of growing distance.

    Args:
        bias_table: ``[buckets, N]`` in name; the numbers lie as in ``[N, buckets]``.
        query_length: number of queries.
        key_length: number of keys.
        max_distance: from here on all distances share a bucket.
        is_bidirectional: half of the buckets are for keys after the query.

    Source: Raffel et al., arXiv:1910.10683, section 2.1.
    """
    queries, keys = length_of(query_length), length_of(key_length)
    device = bias_table.device
    assert queries is not None, "an input of the operator"
    assert keys is not None, "an input of the operator"
    distance = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
    buckets = bias_table.shape[0]
    half = buckets // 2 if is_bidirectional else buckets
    bucket = torch.where(distance > 0, half, 0) if is_bidirectional else torch.zeros_like(distance)
    far = distance.abs() if is_bidirectional else (-distance).clamp(min=0)
    exact = half // 2
    growth = torch.log(far.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    large = (exact + (growth * (half - exact)).to(torch.int64)).clamp(max=half - 1)
    bucket = bucket + torch.where(far < exact, far, large)
    return bias_table.reshape(-1, buckets)[:, bucket].unsqueeze(0)


@microsoft("GatedRelativePositionBias")
def gated_relative_position_bias(
    query_layer: Tensor,
    query_bias: Tensor,
    rel_pos: Tensor,
    weight: Tensor,
    bias: Tensor,
    eco_a: Tensor,
    token_offset: Tensor | None = None,
    *,
    num_heads: int,
) -> Tensor:
    """Return ``rel_pos`` ``[1, N, S, S]`` times a gate of each query, ``[B, N, S, S]``.

    ``query_layer`` is ``[B, S, N * H]``, or the real tokens ``[T, N * H]`` of ``token_offset``.
    """
    if token_offset is not None:
        query_layer = restore_padding(query_layer, token_offset)
    q = heads(query_layer + query_bias, num_heads)
    gates = torch.matmul(q, weight) + bias
    u, r = torch.sigmoid(gates.reshape(*q.shape[:3], 2, -1).sum(-1)).chunk(2, -1)
    return (u * (r * eco_a - 1.0) + 2.0) * rel_pos
