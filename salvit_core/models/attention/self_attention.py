"""Scaled dot-product self-attention, SA (SAL-ViT, Section 2.4 and Figure 2a, 2c)."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..normalizers import Softmax, normalizer_of
from ..operations import MatMul, of_kind
from . import fused
from .mechanism import Mechanism

if TYPE_CHECKING:
    from ..config import TransformerConfig


class SelfAttention(Mechanism):
    """softmax(Q K^T / sqrt(D)) V per head, any normaliser in softmax's place; Q, K, V from one merged projection.

    Cost: O(N^2) scores per head, each of which the normaliser must touch.
    """

    name = "self"

    def __init__(self, config: "TransformerConfig"):
        super().__init__(config)
        self.qkv = of_kind("projection", nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias))
        self.scores = of_kind("scores", MatMul())
        shape = (self.heads, self.tokens, self.tokens)
        self.normalizer = normalizer_of(config)(dim=-1, heads=self.heads, shape=shape)
        self.dropout = fused.Dropout(config.attention_dropout)
        self.values = of_kind("values", MatMul())
        self.projection = of_kind("projection", nn.Linear(config.width, config.width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head))  # (B, N, 3, H, D)
        flash = fused.flash(self, qkv)
        if not flash and fused.applies(self, qkv, Softmax):
            return self.projection(fused.self_attention(qkv, self.normalizer, self.dropout.p).flatten(2))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, H, N, D)
        if flash:
            values = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout.p)  # (B, H, N, D)
            return self.projection(values.transpose(1, 2).flatten(2))
        scores = self.scores(query, key.transpose(-2, -1)) * self.head**-0.5  # (B, H, N, N)
        weights = fused.weigh(self, scores, self.normalizer)  # (B, H, N, N)
        values = self.values(weights, value)  # (B, H, N, D)
        return self.projection(values.transpose(1, 2).flatten(2))  # (B, N, M)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> attention weights (B, H, N, N), none dropped: out_i = sum_j weights_ij value_j."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head))
        query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D)
        return self.normalizer(self.scores(query, key.transpose(-2, -1)) * self.head**-0.5)
