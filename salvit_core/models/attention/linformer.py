"""Linformer: keys and values of N tokens projected to k rows (Wang et al., "Linformer", 2020)."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..normalizers import normalizer_of
from ..operations import HeadLinear, MatMul, of_kind
from . import fused
from .mechanism import MergedAttention

if TYPE_CHECKING:
    from ..config import TransformerConfig


class Linformer(MergedAttention):
    """softmax(Q (E K)^T / sqrt(D)) E V per head, any normaliser in softmax's place (Section 4).

    E, k x N, is learnt and one for keys, values and all heads ("key-value sharing"). It ties the module to N tokens.

    Cost: O(N k) scores per head.
    """

    name = "linformer"
    rows = {"Linformer": {}, "Linformer L2Q": {"normalizer": "l2q"}}
    sized = True

    def __init__(self, config: "TransformerConfig"):
        super().__init__(config)
        self.count = min(config.memory, self.tokens)  # k
        self.qkv = of_kind("projection", nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias))
        self.reduction = of_kind("scores", self._reduction())
        self.scores = of_kind("scores", MatMul())
        shape = (self.heads, self.tokens, self.count)
        self.normalizer = normalizer_of(config)(dim=-1, heads=self.heads, shape=shape)
        self.dropout = fused.Dropout(config.attention_dropout)
        self.values = of_kind("values", MatMul())
        self.projection = of_kind("projection", nn.Linear(config.width, config.width))

    def _reduction(self) -> nn.Module:
        return nn.Linear(self.tokens, self.count, bias=False)  # E

    def reduce(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, N, ...) -> (B, H, k, ...)."""
        # Side by side, so that E is applied once.
        both = self.reduction(torch.cat([key, value], -1).transpose(-2, -1)).transpose(-2, -1)
        return both[..., : self.head], both[..., self.head :]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries and keys (B, H, N, D), values (B, H, N, C) -> (B, H, N, C)."""
        key, value = self.reduce(key, value)
        scores = self.scores(query, key.transpose(-2, -1)) * self.head**-0.5  # (B, H, N, k)
        return self.values(self.dropout(self.normalizer(scores)), value)


class HeadLinformer(Linformer):
    """Linformer with matrices of each head's own: softmax(Q (E_h K)^T / sqrt(D)) F_h V, no sharing (Section 4).

    Cost and shapes as `Linformer`.
    """

    name = "linformer_heads"
    rows = {"Linformer, heads": {}}

    def _reduction(self) -> nn.Module:
        return nn.ModuleList(HeadLinear(self.heads, self.tokens, self.count) for _ in "EF")

    def reduce(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, N, ...) -> (B, H, k, ...)."""
        return self.reduction[0](key), self.reduction[1](value)
