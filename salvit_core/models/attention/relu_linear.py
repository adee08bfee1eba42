"""ReLU linear attention (Katharopoulos et al., 2020, Section 3.2, with EfficientViT's kernel, a ReLU, on one scale)."""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..operations import Divide, MatMul, TokenSum, of_kind
from .mechanism import MergedAttention

if TYPE_CHECKING:
    from ..config import TransformerConfig


class ReLULinear(MergedAttention):
    """out_i = sum_j (relu(q_i) . relu(k_j)) v_j / sum_j relu(q_i) . relu(k_j) per head.

    sum_j k_j v_j^T comes first, so that N^2 never appears. On shares the ReLU and one division per token are all that
    is not linear: CosFormer without its cosines, Performer's ReLU without its random features.

    Cost: O(N D^2) per head.
    """

    name = "relu_linear"
    rows = {"ReLU linear": {}}

    def __init__(self, config: "TransformerConfig"):
        super().__init__(config)
        self.qkv = of_kind("projection", nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias))
        self.features = of_kind("normaliser", nn.ReLU())
        self.scores = of_kind("scores", MatMul())
        self.sum = of_kind("normaliser", TokenSum())
        self.denominator = of_kind("normaliser", MatMul())
        self.values = of_kind("values", MatMul())
        # Queries and keys of variance one have E relu(q) relu(k) = 1 / (2 pi), D of them are summed.
        self.normalizer = of_kind("normaliser", Divide(scale=self.head**0.5 / (2 * math.pi)))
        self.projection = of_kind("projection", nn.Linear(config.width, config.width))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries and keys (B, H, N, D), values (B, H, N, C) -> (B, H, N, C)."""
        # 1 / sqrt(D) and 1 / N cancel in the quotient, and keep sums over features and tokens small.
        both = self.features(torch.cat([query * self.head**-0.5, key], 1))  # (B, 2 H, N, D)
        query, key = both[:, : self.heads], both[:, self.heads :]
        context = self.scores(key.transpose(-2, -1), value) * (1 / self.tokens)  # (B, H, D, C)
        total = self.sum(key) * (1 / self.tokens)  # (B, H, 1, D)
        denominator = self.denominator(query, total.transpose(-2, -1))  # (B, H, N, 1)
        return self.normalizer(self.values(query, context), denominator)
