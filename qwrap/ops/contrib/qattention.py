"""Attention and embedding with quantized weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.ops.contrib.attention import (
    MASK_FILTER,
    NO_ROTARY,
    attend,
    heads,
    total_bias,
    with_past,
)
from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.contrib.norm import EPSILON, ones_of
from qwrap.ops.contrib.qlinear import dequantized
from qwrap.ops.contrib.qproduct import matmul_integer_to_float
from qwrap.ops.limits import one_of


@microsoft(
    "QAttention",
    allowed={**NO_ROTARY, "past_present_share_buffer": one_of(0)},
)
def qattention(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    mask_index: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    weight_zero_point: Tensor | None = None,
    past: Tensor | None = None,
    *,
    num_heads: int,
    do_rotary: int = 0,
    mask_filter_value: float = MASK_FILTER,
    past_present_share_buffer: int = 0,
    scale: float = 0.0,
    unidirectional: int = 0,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Project codes to queries, keys and values and attend in float; see Attention.

    Args:
        input: codes ``[B, S, D]`` with one scale.
        weight: codes ``[D, 3 * N * H]`` with one scale or one per column.
        bias: real numbers ``[3 * N * H]``.
        input_scale: one number.
        weight_scale: one number or ``[3 * N * H]``.
        mask_index: see ``attention.mask_bias``.
        input_zero_point: one code.
        weight_zero_point: one code or ``[3 * N * H]``.
        past: keys and values ``[2, B, N, P, H]``.

    Returns:
        ``[B, S, N * H]`` and, if wanted, all keys and values.
    """
    del do_rotary, past_present_share_buffer
    zeros = (input_zero_point, weight_zero_point)
    packed = matmul_integer_to_float(input, weight, input_scale, weight_scale, *zeros, bias)
    q, k, v = (heads(part, num_heads) for part in packed.chunk(3, -1))
    k, _ = with_past(None if past is None else past[0], k, None)
    v, _ = with_past(None if past is None else past[1], v, None)
    added = total_bias(q, k.shape[2], mask_index, None, mask_filter_value, unidirectional)
    y = attend(q, k, v, added, scale)
    return (y,) if output_count == 1 else (y, torch.stack((k, v)))


@microsoft("QEmbedLayerNormalization")
def qembed_layer_normalization(
    input_ids: Tensor,
    segment_ids: Tensor | None,
    word_embedding_quant: Tensor,
    position_embedding_quant: Tensor,
    segment_embedding: Tensor | None,
    gamma_quant: Tensor,
    beta_quant: Tensor,
    mask: Tensor | None,
    word_embedding_scale: Tensor,
    position_embedding_scale: Tensor,
    segment_embedding_scale: Tensor | None,
    gamma_scale: Tensor,
    beta_scale: Tensor,
    word_embedding_zero_point: Tensor,
    position_embedding_zero_point: Tensor,
    segment_embedding_zero_point: Tensor | None,
    gamma_zero_point: Tensor,
    beta_zero_point: Tensor,
    *,
    epsilon: float = EPSILON,
) -> tuple[Tensor, Tensor]:
    """Add up quantized embeddings and normalise over the last axis; see EmbedLayerNormalization.

    Every table is codes ``[rows, hidden]`` with one scale and zero point. Returns the normalised
    sum and how many entries of each row of ``mask`` are 1.
    """
    words = F.embedding(input_ids, word_embedding_quant)
    total = dequantized(words, word_embedding_scale, word_embedding_zero_point)
    positions = position_embedding_quant[: input_ids.shape[1]]
    total = total + dequantized(positions, position_embedding_scale, position_embedding_zero_point)
    if segment_ids is not None and segment_embedding is not None:
        assert segment_embedding_scale is not None, "given with its table"
        segments = F.embedding(segment_ids, segment_embedding)
        total = total + dequantized(segments, segment_embedding_scale, segment_embedding_zero_point)
    gamma = dequantized(gamma_quant, gamma_scale, gamma_zero_point)
    beta = dequantized(beta_quant, beta_scale, beta_zero_point)
    y = F.layer_norm(total, total.shape[-1:], gamma, beta, epsilon)
    return y, ones_of(input_ids, mask)
