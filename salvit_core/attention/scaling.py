"""Scaling attention (Wang et al., "Non-local neural networks"; SAL-ViT, Table 1, row 4)."""

from collections.abc import Callable

import torch
from torch import nn

from .operations import MatMul


class ScalingAttention(nn.Module):
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head))  # (B, N, 3, H, D)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, H, N, D)
        context = self.scores(key.transpose(-2, -1), value) * self.tokens**-0.5  # (B, H, D, D)
        values = self.values(query * self.tokens**-0.5, context)  # (B, H, N, D)
        return self.projection(values.transpose(1, 2).flatten(2))  # (B, N, M)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> Q K^T / N, (B, H, N, N), of both signs: out_i = sum_j weights_ij value_j."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head))
        query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D)
        return query @ key.mT / self.tokens
