"""A decoder as Llama: Touvron et al., arXiv:2302.13971; names as in Hugging Face transformers.

RMSNorm (arXiv:1910.07467), rotary positions (arXiv:2104.09864), grouped queries
(arXiv:2305.13245) and SwiGLU (arXiv:2002.05202).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scale by the root of the mean square."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` normalised over its last axis, in float32 inside."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """Return ``(-x2, x1)`` of the halves ``(x1, x2)``."""
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


class Attention(nn.Module):
    """Causal attention with rotary positions; several query heads share a key and value head."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.size).transpose(1, 2)

    def _repeat(self, x: Tensor) -> Tensor:
        n, heads, tokens, size = x.shape
        groups = self.heads // self.kv_heads
        return x[:, :, None].expand(n, heads, groups, tokens, size).reshape(n, -1, tokens, size)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the attended values, and the keys and values with those of ``past`` before."""
        cos, sin = turn
        query, key, value = (self._split(f(x)) for f in (self.q_proj, self.k_proj, self.v_proj))
        query = query * cos + rotate_half(query) * sin
        key = key * cos + rotate_half(key) * sin
        key, value = torch.cat((past[0], key), 2), torch.cat((past[1], value), 2)
        y = F.scaled_dot_product_attention(query, self._repeat(key), self._repeat(value), mask)
        return self.o_proj(y.transpose(1, 2).reshape(x.shape)), (key, value)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``down(silu(gate(x)) * up(x))``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, each on a normalised input beside a shortcut."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int, epsilon: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, kv_heads)
        self.mlp = MLP(width, hidden)
        self.input_layernorm = RMSNorm(width, epsilon)
        self.post_attention_layernorm = RMSNorm(width, epsilon)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return ``x`` after one layer, and its keys and values."""
        y, present = self.self_attn(self.input_layernorm(x), turn, mask, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Llama(nn.Module):
    """Token ids and the keys and values of earlier tokens in, logits and all of them out."""

    def __init__(
        self,
        words: int = 32000,
        layers: int = 6,
        width: int = 512,
        heads: int = 8,
        kv_heads: int = 4,
        hidden: int = 1376,
        epsilon: float = 1e-6,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(words, width)
        self.layers = nn.ModuleList([
            DecoderLayer(width, heads, kv_heads, hidden, epsilon) for _ in range(layers)
        ])
        self.norm = RMSNorm(width, epsilon)
        self.lm_head = nn.Linear(width, words, bias=False)
        size = width // heads
        frequencies = 10000.0 ** -(torch.arange(0, size, 2).float() / size)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Return the logits, then the key and value of each layer, ``[N, kv_heads, all, size]``.

        Args:
            input_ids: int64 ``[N, tokens]``.
            past: key and value of each layer for the earlier tokens, which may be none.
        """
        x = self.embed_tokens(input_ids)
        before, tokens = past[0].shape[2], input_ids.shape[1]
        positions = torch.arange(before + tokens, device=x.device)
        angles = positions[before:, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), -1)
        turn = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        hidden = positions[None, :] > positions[before:, None]
        mask = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device)
        mask = mask.masked_fill(hidden, torch.finfo(x.dtype).min)
        presents: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x, present = layer(x, turn, mask, (past[2 * i], past[2 * i + 1]))
            presents.extend(present)
        return self.lm_head(self.norm(x)), *presents
