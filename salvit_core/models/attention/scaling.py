"""Scaling attention (Wang et al., "Non-local neural networks"; SAL-ViT, Table 1, row 4)."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..operations import MatMul, of_kind
from .mechanism import MergedAttention

if TYPE_CHECKING:
    from ..config import TransformerConfig


class ScalingAttention(MergedAttention):
    """Q / sqrt(N) (K^T V / sqrt(N)) per head: nothing is normalised, so K^T V comes first and N^2 never appears.

    Cost: O(N D^2) per head, all of it linear algebra.
    """

    name = "scaling"

    def __init__(self, config: "TransformerConfig"):
        super().__init__(config)
        self.qkv = of_kind("projection", nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias))
        self.scores = of_kind("scores", MatMul())
        self.values = of_kind("values", MatMul())
        self.projection = of_kind("projection", nn.Linear(config.width, config.width))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries and keys (B, H, N, D), values (B, H, N, C) -> (B, H, N, C); of values one by one, Q K^T / N."""
        context = self.scores(key.transpose(-2, -1), value) * self.tokens**-0.5  # (B, H, D, C)
        return self.values(query * self.tokens**-0.5, context)
