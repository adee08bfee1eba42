"""Self-attention with a projection each for queries, keys and values, as it was published (Vaswani et al., 2017)."""

from collections.abc import Callable

import torch
from torch import nn

from . import fused
from .operations import MatMul
from .self_attention import SelfAttention


class StandardAttention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V per head (Eq. 1), Q = W_q x, K = W_k x, V = W_v x.

    The same function as `SelfAttention`, which merges the three matrices into one: what the merging saves is the
    difference between the two.

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
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.scores = MatMul()
        self.normalizer = normalizer(dim=-1, heads=heads, shape=(heads, tokens, tokens))
        self.dropout = fused.Dropout(dropout)
        self.values = MatMul()
        self.projection = nn.Linear(width, width)

    def load_merged(self, merged: SelfAttention) -> None:
        """Take over the weights of self-attention with a merged projection, of the same sizes and normaliser."""
        with torch.no_grad():
            parts = merged.qkv.weight.chunk(3)
            for linear, part in zip((self.query, self.key, self.value), parts, strict=True):
                linear.weight.copy_(part)
        self.normalizer.load_state_dict(merged.normalizer.state_dict())
        self.projection.load_state_dict(merged.projection.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        value = self.value(x).unflatten(-1, (self.heads, self.head)).transpose(1, 2)  # (B, H, N, D)
        values = self.values(self.dropout(self.weights(x)), value)  # (B, H, N, D)
        return self.projection(values.transpose(1, 2).flatten(2))  # (B, N, M)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> attention weights (B, H, N, N), none dropped: out_i = sum_j weights_ij value_j."""
        query = self.query(x).unflatten(-1, (self.heads, self.head)).transpose(1, 2)  # (B, H, N, D)
        key = self.key(x).unflatten(-1, (self.heads, self.head)).transpose(1, 2)  # (B, H, N, D)
        return self.normalizer(self.scores(query, key.transpose(-2, -1)) * self.head**-0.5)
