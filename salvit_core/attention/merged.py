"""What mechanisms with one projection for queries, keys and values share; each says only how it attends."""

from collections.abc import Callable

import torch
from torch import nn

from .operations import unit_values


class MergedAttention(nn.Module):
    """W_o attend(Q, K, V), heads merged, Q, K and V from one projection of the tokens.

    A subclass makes `qkv`, `projection`, `heads` (H) and `head` (D) in its own order, and defines `attend`: queries and
    keys (B, H, N, D), values (B, H, N, C) -> (B, H, N, C), linear in the values.
    """

    heads: int
    head: int
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        query, key, value = self._heads(x)
        values = self.attend(query, key, value)  # (B, H, N, D)
        return self.projection(values.transpose(1, 2).flatten(2))  # (B, N, M)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> effective weights (B, H, N, N), some of both signs: out_i = sum_j weights_ij value_j."""
        query, key, _ = self._heads(x)
        return self.attend(query, key, unit_values(x, self.heads))

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head))  # (B, N, 3, H, D)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, H, N, D)
