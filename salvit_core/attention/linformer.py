"""Linformer: keys and values of N tokens projected to k rows (Wang et al., "Linformer", 2020)."""

from collections.abc import Callable

import torch
from torch import nn

from . import fused
from .merged import MergedAttention
from .operations import HeadLinear, MatMul


class Linformer(MergedAttention):
    """softmax(Q (E K)^T / sqrt(D)) E V per head, any normaliser in softmax's place (Section 4).

    E, k x N, is learnt and one for keys, values and all heads ("key-value sharing"). It ties the module to N tokens.

    Cost: O(N k) scores per head.

    Args:
        width: dimension M of the model.
        heads: number of heads H; D = M / H.
        tokens: number of tokens N.
        normalizer: builds the normaliser, over the k rows, from dim, heads and shape.
        dropout: probability of dropping an attention weight in training.
        memory: number of rows k, at most N.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        tokens: int,
        normalizer: Callable[..., nn.Module],
        dropout: float = 0.1,
        memory: int = 64,
    ):
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.rows = min(memory, tokens)  # k
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self._make_reduction(tokens)
        self.scores = MatMul()
        self.normalizer = normalizer(dim=-1, heads=heads, shape=(heads, tokens, self.rows))
        self.dropout = fused.Dropout(dropout)
        self.values = MatMul()
        self.projection = nn.Linear(width, width)

    def _make_reduction(self, tokens: int) -> None:
        self.reduction = nn.Linear(tokens, self.rows, bias=False)  # E

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

    Args, cost and shapes as `Linformer`.
    """

    def _make_reduction(self, tokens: int) -> None:
        self.reduction = nn.ModuleList(HeadLinear(self.heads, tokens, self.rows) for _ in "EF")

    def reduce(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, N, ...) -> (B, H, k, ...)."""
        return self.reduction[0](key), self.reduction[1](value)
