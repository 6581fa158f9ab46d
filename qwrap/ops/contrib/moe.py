"""Layers of several experts, a few of which see each token."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import UnsupportedOpError
from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.limits import at_least, one_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda x: x,
}


@microsoft(
    "MoE",
    allowed={
        "activation_type": one_of(*ACTIVATIONS, "swiglu"),
        "k": at_least(1),
        "swiglu_fusion": one_of(0, 1, 2),
        "use_sparse_mixer": one_of(0),
    },
)
def mixture_of_experts(
    input: Tensor,
    router_probs: Tensor,
    fc1_experts_weights: Tensor,
    fc1_experts_bias: Tensor | None,
    fc2_experts_weights: Tensor,
    fc2_experts_bias: Tensor | None = None,
    fc3_experts_weights: Tensor | None = None,
    fc3_experts_bias: Tensor | None = None,
    *,
    activation_alpha: float = 1.0,
    activation_beta: float = 0.0,
    activation_type: str = "relu",
    k: int = 1,
    normalize_routing_weights: int = 0,
    swiglu_fusion: int = 0,
    swiglu_limit: float = math.inf,
    use_sparse_mixer: int = 0,
) -> Tensor:
    """Return the mean of what the ``k`` experts with the largest shares make of each token.

    Every expert is computed for every token, so that no shape depends on the data.

    Args:
        input: ``[tokens, hidden]`` or ``[batch, sequence, hidden]``.
        router_probs: scores ``[tokens, experts]``; their softmax gives the shares.
        fc1_experts_weights: ``[experts, inner, hidden]``, twice ``inner`` with ``swiglu_fusion``.
        fc1_experts_bias: ``[experts, inner]``, likewise.
        fc2_experts_weights: ``[experts, hidden, inner]``.
        fc2_experts_bias: ``[experts, hidden]``.
        fc3_experts_weights: as the first; what it makes is multiplied with the activation.
        fc3_experts_bias: likewise.
        activation_alpha: see ``_swiglu``.
        activation_beta: see ``_swiglu``.
        activation_type: ``"swiglu"`` or one of ``ACTIVATIONS``.
        k: how many experts count.
        normalize_routing_weights: the shares of these add up to 1.
        swiglu_fusion: gate and linear part alternate along the rows (1) or follow one another (2).
        swiglu_limit: see ``_swiglu``.
        use_sparse_mixer: must be 0.
    """
    del use_sparse_mixer
    shares = _shares(router_probs, k, normalize_routing_weights)
    x = input.reshape(1, -1, input.shape[-1])
    inner = _layer(x, fc1_experts_weights, fc1_experts_bias)
    other = None
    if fc3_experts_weights is not None:
        other = _layer(x, fc3_experts_weights, fc3_experts_bias)
    if activation_type == "swiglu":
        gate, linear = _parts(inner, other, swiglu_fusion)
        inner = _swiglu(gate, linear, activation_alpha, activation_beta, swiglu_limit)
    else:
        inner = ACTIVATIONS[activation_type](inner)
        inner = inner if other is None else inner * other
    y = _layer(inner, fc2_experts_weights, fc2_experts_bias)
    return torch.einsum("te,eth->th", shares, y).reshape(input.shape)


def _shares(scores: Tensor, k: int, normalize: int) -> Tensor:
    """Return ``[tokens, experts]``: the share of each expert, zero but for ``k`` of them."""
    shares = scores.softmax(-1)
    values, indices = shares.topk(k, -1)
    if normalize:
        values = values / values.sum(-1, keepdim=True)
    return torch.zeros_like(shares).scatter(-1, indices, values)


def _layer(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``[experts, tokens, out]`` for tokens ``[experts or 1, tokens, in]``."""
    y = torch.matmul(x, weights.mT)
    return y if bias is None else y + bias.unsqueeze(1)


def _parts(inner: Tensor, other: Tensor | None, fusion: int) -> tuple[Tensor, Tensor]:
    """Return gate and linear part."""
    if fusion == 1:
        return inner[..., ::2], inner[..., 1::2]
    if fusion == 2:
        gate, linear = inner.chunk(2, -1)
        return gate, linear
    if other is None:
        raise UnsupportedOpError("MoE with swiglu, swiglu_fusion=0 and no fc3_experts_weights")
    return inner, other


def _swiglu(gate: Tensor, linear: Tensor, alpha: float, beta: float, limit: float) -> Tensor:
    """Return ``g * sigmoid(alpha * g) * (l + beta)``, both kept within ``limit``."""
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (linear.clamp(-limit, limit) + beta)
