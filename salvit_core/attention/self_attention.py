"""Scaled dot-product self-attention, SA (SAL-ViT, Section 2.4 and Figure 2a, 2c)."""

from collections.abc import Callable

import torch
from torch import nn

from . import fused
from .operations import MatMul


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V per head, any normaliser in softmax's place; Q, K, V from one merged projection.

    Cost: O(N^2) scores per head, each of which the normaliser must touch.

    Args:
        width: dimension M of the model.
        heads: number of heads H; D = M / H.
        tokens: number of tokens N.
        normalizer: builds the normaliser from dim, heads and shape.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(self, width: int, heads: int, tokens: int, normalizer: Callable[..., nn.Module], dropout: float = 0.1):
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.scores = MatMul()
        self.normalizer = normalizer(dim=-1, heads=heads, shape=(heads, tokens, tokens))
        self.dropout = fused.Dropout(dropout)
        self.values = MatMul()
        self.projection = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head))  # (B, N, 3, H, D)
        if fused.applies(self, qkv):
            return self.projection(fused.self_attention(qkv, self.normalizer, self.dropout.p).flatten(2))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, H, N, D)
        scores = self.scores(query, key.transpose(-2, -1)) * self.head**-0.5  # (B, H, N, N)
        weights = self.dropout(self.normalizer(scores))  # (B, H, N, N)
        values = self.values(weights, value)  # (B, H, N, D)
        return self.projection(values.transpose(1, 2).flatten(2))  # (B, N, M)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> attention weights (B, H, N, N), none dropped: out_i = sum_j weights_ij value_j."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head))
        query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D)
        return self.normalizer(self.scores(query, key.transpose(-2, -1)) * self.head**-0.5)
