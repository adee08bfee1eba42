"""Self-attention with a projection each for queries, keys and values, as it was published (Vaswani et al., 2017)."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..normalizers import normalizer_of
from ..operations import MatMul, of_kind
from . import fused
from .mechanism import Mechanism

if TYPE_CHECKING:
    from ..config import TransformerConfig


class StandardAttention(Mechanism):
    """softmax(Q K^T / sqrt(D)) V per head (Eq. 1), Q = W_q x, K = W_k x, V = W_v x.

    The same function as `SelfAttention`, which merges the three matrices into one: what the merging saves is the
    difference between the two.
    """

    name = "standard"
    rows = {"SA separate": {}}

    def __init__(self, config: "TransformerConfig"):
        super().__init__(config)
        self.query = of_kind("projection", nn.Linear(config.width, config.width, bias=config.qkv_bias))
        self.key = of_kind("projection", nn.Linear(config.width, config.width, bias=config.qkv_bias))
        self.value = of_kind("projection", nn.Linear(config.width, config.width, bias=config.qkv_bias))
        self.scores = of_kind("scores", MatMul())
        shape = (self.heads, self.tokens, self.tokens)
        self.normalizer = normalizer_of(config)(dim=-1, heads=self.heads, shape=shape)
        self.dropout = fused.Dropout(config.attention_dropout)
        self.values = of_kind("values", MatMul())
        self.projection = of_kind("projection", nn.Linear(config.width, config.width))

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
