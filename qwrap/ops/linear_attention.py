"""Attention by a state that every position updates and reads: linear in the length."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import UnsupportedOpError
from qwrap.ops.limits import at_least, one_of
from qwrap.ops.precision import accumulator
from qwrap.ops.registry import op

UPDATE_RULES = {  # name -> (whether the state decays, whether it is corrected)
    "linear": (False, False),
    "gated": (True, False),
    "delta": (False, True),
    "gated_delta": (True, True),
}


@op(
    "LinearAttention",
    since=(27,),
    ignored=("chunk_size",),  # how many positions a kernel takes at once
    allowed={
        "kv_num_heads": at_least(1),
        "q_num_heads": at_least(1),
        "update_rule": one_of(*UPDATE_RULES),
    },
)
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_state: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    kv_num_heads: int,
    q_num_heads: int,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
) -> tuple[Tensor, Tensor]:
    """Read for each position the state that sums up the keys and values so far.

    The state ``S`` of each head maps keys to values. A position decays it by ``exp(decay)``, adds
    ``k v'`` (or, corrected, ``beta * k (v - S'k)'``), and reads ``scale * S'q``.

    Args:
        query: ``[N, length, q_num_heads * size]``; key and value with ``kv_num_heads``.
        past_state: ``[N, kv_num_heads, size of key, size of value]``; zeros without.
        decay: ``[N, length, kv_num_heads]``, or that times the size of a key.
        beta: ``[N, length, kv_num_heads or 1]``.

    Source: Yang et al., arXiv:2412.06464 (gated delta networks).
    """
    _check(update_rule, decay, beta)
    wide = accumulator(query)
    q, k, v = (
        _split(x, heads).to(wide)
        for x, heads in ((query, q_num_heads), (key, kv_num_heads), (value, kv_num_heads))
    )
    if past_state is None:
        state = q.new_zeros(q.shape[0], kv_num_heads, k.shape[3], v.shape[3])
    else:
        state = past_state.to(wide)
    kept = None if decay is None else _split(decay, kv_num_heads).to(wide).exp()
    rate = None if beta is None else beta.to(wide).unsqueeze(3)
    reads, state = _recurrence(q * (scale or 1 / math.sqrt(q.shape[3])), k, v, state, kept, rate)
    output = reads.flatten(2).to(query.dtype)
    return output, state.to(query.dtype if past_state is None else past_state.dtype)


def _check(update_rule: str, decay: Tensor | None, beta: Tensor | None) -> None:
    if UPDATE_RULES[update_rule] != (decay is not None, beta is not None):
        raise UnsupportedOpError(
            f"LinearAttention with update_rule {update_rule!r} takes decay if gated, and beta if "
            f"corrected by delta; decay is {'absent' if decay is None else 'given'}, beta is "
            f"{'absent' if beta is None else 'given'}"
        )


def _split(x: Tensor, heads: int) -> Tensor:
    """Return ``[N, length, heads, size]``."""
    return x.reshape(*x.shape[:2], heads, -1)


def _recurrence(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, kept: Tensor | None, rate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what each position reads, ``[N, length, heads, size]``, and the last state."""
    reads = []
    groups = q.shape[2] // k.shape[2]
    for t in range(q.shape[1]):
        if kept is not None:
            state = state * kept[:, t].unsqueeze(-1)
        written = v[:, t]
        if rate is not None:
            written = rate[:, t] * (written - (k[:, t].unsqueeze(2) @ state).squeeze(2))
        state = state + k[:, t].unsqueeze(-1) * written.unsqueeze(-2)
        # The query heads of a group read the same state.
        grouped = q[:, t].reshape(q.shape[0], k.shape[2], groups, -1)
        reads.append((grouped @ state).flatten(1, 2))
    return torch.stack(reads, 1), state


@op(
    "CausalConvWithState",
    since=(27,),
    allowed={"activation": one_of("none", "silu", "swish")},
)
def causal_conv_with_state(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past_state: Tensor | None = None,
    *,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its past; also return the end of the input, the next past.

    ``input`` is ``[N, C, length]``, ``weight`` ``[C, 1, k]``, ``past_state`` the ``k - 1``
    elements before the input, zeros without.
    """
    before = weight.shape[2] - 1
    past = input.new_zeros(*input.shape[:2], before) if past_state is None else past_state
    padded = torch.cat((past, input), 2)
    y = torch.conv1d(padded, weight, bias, groups=input.shape[1])
    y = y if activation == "none" else F.silu(y)
    return y, padded[:, :, padded.shape[2] - before :]
