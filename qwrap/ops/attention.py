"""Scaled dot-product attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from qwrap.errors import UnsupportedOpError
from qwrap.ops.element_types import TORCH_DTYPES
from qwrap.ops.limits import POSITIVE, at_least, one_of
from qwrap.ops.precision import accumulator
from qwrap.ops.registry import op

SCORES, CAPPED, BIASED, PROBABILITIES = range(4)  # values of ``qk_matmul_output_mode``


@op(
    "Attention",
    since=(23, 24, 25),
    allowed={
        "kv_num_heads": at_least(1),
        "q_num_heads": at_least(1),
        "qk_matmul_output_mode": one_of(0, 1, 2, 3),
        "scale": POSITIVE,
        "softmax_precision": one_of(
            TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16
        ),
    },
)
def attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = SCORES,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Average ``V``, weighted by the softmax of the products of ``Q`` and ``K``.

    Queries, keys and values are ``[N, heads, length, size]`` or, with the numbers of heads given,
    ``[N, length, heads * size]``. A query that no key is left for gives zeros.

    ``softmax_precision`` can widen, not narrow, the type of the softmax: below float32
    onnxruntime ignores it.
    """
    flat = Q.ndim == 3
    query, key, value = _heads(Q, q_num_heads), _heads(K, kv_num_heads), _heads(V, kv_num_heads)
    if past_key is not None and past_value is not None:
        key, value = torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)
    present = key, value
    first = _first_position(query, past_key, nonpad_kv_seqlen)
    window = (left_window_size, 0 if is_causal else right_window_size)
    allowed = _in_window(query, key, first, window)
    if nonpad_kv_seqlen is not None:
        real = _positions(key, 1) < nonpad_kv_seqlen.reshape(-1, 1, 1, 1)
        allowed = real if allowed is None else allowed & real
    mask = _joined(attn_mask, allowed, key.shape[2], query.dtype)
    double = softmax_precision == TensorProto.DOUBLE and query.dtype != torch.float64
    if output_count < 4 and not softcap and not double:
        y = _fused(query, *present, mask, scale)
        return (_merged(y) if flat else y, *present)[:output_count]
    if scale is None:
        scale = 1 / math.sqrt(query.shape[3])
    y, scores = _explained(query, *present, mask, scale, softcap, softmax_precision)
    y = _merged(y) if flat else y
    return (y, *present, scores[qk_matmul_output_mode].to(Q.dtype))[:output_count]


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Return the average from torch's kernel; a row of which nothing is left gives zeros there.

    On the CPU that kernel rounds the weights to half precision before it applies them, which
    onnxruntime does not.
    """
    wide = accumulator(query) if query.device.type == "cpu" else query.dtype
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(wide)
    inputs = query.to(wide), key.to(wide), value.to(wide), mask
    if query.shape[1] == key.shape[1]:
        y = F.scaled_dot_product_attention(*inputs, scale=scale)
    else:
        y = F.scaled_dot_product_attention(*inputs, scale=scale, enable_gqa=True)
    return y.to(query.dtype)


def _heads(x: Tensor, count: int | None) -> Tensor:
    """Return ``[N, heads, length, size]``."""
    if x.ndim == 4:
        if count not in (None, x.shape[1]):
            raise UnsupportedOpError(f"Attention of {x.shape[1]} heads, but {count} are said")
        return x
    if count is None:
        raise UnsupportedOpError("Attention of 3-D inputs needs q_num_heads and kv_num_heads")
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    """Return ``[N, length, heads * size]``."""
    return x.transpose(1, 2).flatten(2)


def _first_position(query: Tensor, past_key: Tensor | None, lengths: Tensor | None) -> int | Tensor:
    """Return at which key the first query stands: behind the past, or such that it ends last."""
    if past_key is not None:
        return past_key.shape[2]
    return 0 if lengths is None else lengths.reshape(-1, 1, 1, 1) - query.shape[2]


def _positions(x: Tensor, axes_after: int) -> Tensor:
    return torch.arange(x.shape[2], device=x.device).reshape(1, 1, -1, *[1] * (axes_after - 1))


def _in_window(
    query: Tensor, key: Tensor, first: int | Tensor, window: tuple[int, int]
) -> Tensor | None:
    """Return which keys each query may see: at most ``window`` positions to the left and right."""
    left, right = window
    if left < 0 and right < 0:
        return None
    distance = _positions(key, 1) - (_positions(query, 2) + first)
    if left < 0:
        return distance <= right
    return distance >= -left if right < 0 else (distance >= -left) & (distance <= right)


def _joined(
    mask: Tensor | None, allowed: Tensor | None, length: int, dtype: torch.dtype
) -> Tensor | None:
    """Return one mask: of truth values if all are, else numbers to add."""
    if mask is None:
        return allowed
    missing = length - mask.shape[-1]
    if mask.dtype == torch.bool:
        mask = F.pad(mask, (0, missing), value=False) if missing else mask
        return mask if allowed is None else mask & allowed
    mask = F.pad(mask, (0, missing), value=-math.inf) if missing else mask
    return mask if allowed is None else torch.where(allowed, mask, -math.inf)


def _explained(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    softmax_precision: int | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return the average and every stage of the scores, in the order of the output modes."""
    wide = accumulator(query)
    if softmax_precision is not None:
        wide = torch.promote_types(wide, TORCH_DTYPES[softmax_precision])
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    root = math.sqrt(scale)
    scores = (query.to(wide) * root) @ (key.to(wide) * root).transpose(2, 3)
    capped = softcap * torch.tanh(scores / softcap) if softcap else scores
    if mask is None:
        biased, probabilities = capped, capped.softmax(-1)
    else:
        biased, probabilities = _masked_softmax(capped, mask)
    y = probabilities @ value.to(wide)
    return y.to(query.dtype), (scores, capped, biased, probabilities)


def _masked_softmax(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores plus mask, and their softmax; zeros where nothing is left of a row."""
    allowed = mask if mask.dtype == torch.bool else mask > -math.inf
    bias = torch.where(mask, 0.0, -math.inf) if mask.dtype == torch.bool else mask
    biased = scores + bias.to(scores.dtype)
    some = allowed.any(-1, keepdim=True)
    # A row of minus infinity would make NaN, and NaN times zero in the gradient is NaN.
    return biased, torch.where(some, torch.where(some, biased, 0.0).softmax(-1), 0.0)
