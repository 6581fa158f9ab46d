"""BERT: Devlin et al., arXiv:1810.04805; names as in Hugging Face transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embeddings(nn.Module):
    """Words, positions and segments, summed and normalised."""

    def __init__(self, words: int, positions: int, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(words, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """Return ``[N, tokens, width]``."""
        positions = self.position_ids[:, : input_ids.shape[1]]
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.LayerNorm(x + self.position_embeddings(positions))


class SelfAttention(nn.Module):
    """Scaled dot-product attention over heads, with an additive mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.size = width // heads

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.size).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the attended values, the heads side by side."""
        query, key, value = (self._heads(f(x)) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return y.transpose(1, 2).reshape(x.shape)


class Output(nn.Module):
    """A linear layer, a shortcut, a normalisation."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Return the normalised sum."""
        return self.LayerNorm(self.dense(x) + shortcut)


class Attention(nn.Module):
    """Attention of the tokens to each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self = SelfAttention(width, heads)
        self.output = Output(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return ``x`` after attention."""
        return self.output(self.self(x, mask), x)


class Intermediate(nn.Module):
    """The wide half of the perceptron."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, tokens, hidden]``."""
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each normalised after its shortcut."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.intermediate = Intermediate(width, hidden)
        self.output = Output(hidden, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return ``x`` after one layer."""
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    """All layers."""

    def __init__(self, layers: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Layer(width, heads, hidden) for _ in range(layers)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return ``x`` after all layers."""
        for layer in self.layer:
            x = layer(x, mask)
        return x


class Pooler(nn.Module):
    """The first token's state, transformed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, width]``."""
        return torch.tanh(self.dense(x[:, 0]))


class Bert(nn.Module):
    """The encoder and the pooled first token."""

    def __init__(
        self,
        words: int = 30522,
        positions: int = 512,
        layers: int = 12,
        width: int = 768,
        heads: int = 12,
        hidden: int = 3072,
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(words, positions, width)
        self.encoder = Encoder(layers, width, heads, hidden)
        self.pooler = Pooler(width)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return all last states ``[N, tokens, width]`` and the pooled first one."""
        x = self.embeddings(input_ids, token_type_ids)
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        x = self.encoder(x, mask)
        return x, self.pooler(x)
