"""Scaling attention (Wang et al., "Non-local neural networks"; SAL-ViT, Table 1, row 4)."""

from collections.abc import Callable

import torch
from torch import nn

from .merged import MergedAttention
from .operations import MatMul


class ScalingAttention(MergedAttention):
    """Q / sqrt(N) (K^T V / sqrt(N)) per head: nothing is normalised, so K^T V comes first and N^2 never appears.

    Cost: O(N D^2) per head, all of it linear algebra.

    Args:
        width: dimension M of the model.
        heads: number of heads H; D = M / H.
        tokens: number of tokens N.
        normalizer: ignored; there is nothing to normalise.
        dropout: ignored; there are no attention weights to drop.
    """

    def __init__(self, width: int, heads: int, tokens: int, normalizer: Callable[..., nn.Module], dropout: float = 0.1):
        super().__init__()
        self.heads, self.head, self.tokens = heads, width // heads, tokens
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.scores = MatMul()
        self.values = MatMul()
        self.projection = nn.Linear(width, width)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries and keys (B, H, N, D), values (B, H, N, C) -> (B, H, N, C); of values one by one, Q K^T / N."""
        context = self.scores(key.transpose(-2, -1), value) * self.tokens**-0.5  # (B, H, D, C)
        return self.values(query * self.tokens**-0.5, context)
