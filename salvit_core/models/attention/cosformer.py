"""cosFormer: ReLU features, re-weighted by the cosine of the distance (Qin et al., "cosFormer", 2022)."""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..operations import Divide, MatMul, Reweight, TokenSum, of_kind
from .mechanism import MergedAttention

if TYPE_CHECKING:
    from ..config import TransformerConfig


class Cosformer(MergedAttention):
    """out_i = sum_j w_ij v_j / sum_j w_ij, w_ij = (relu(q_i) . relu(k_j)) cos(i, j) per head (Section 3).

    The paper's cos(i, j) = cos(pi / 2 (i - j) / N) falls with the distance in a text. Here, where N is a square and
    its root n, tokens i and j lie in rows r, s and columns c, d of the image, and

        cos(i, j) = cos(pi / 2 (r - s) / n) cos(pi / 2 (c - d) / n),

    the paper's in each direction; where N is no square, as with a class token, the paper's own. `Reweight` splits it
    into factors of i and of j, so that sum_j k_j v_j^T comes first and N^2 never appears.

    Cost: O(N D^2) per head, four times scaling attention's in an image, twice else.
    """

    name = "cosformer"
    rows = {"CosFormer": {}}

    def __init__(self, config: "TransformerConfig"):
        super().__init__(config)
        self.qkv = of_kind("projection", nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias))
        self.features = of_kind("normaliser", nn.ReLU())
        self.reweight = of_kind("normaliser", Reweight(self.tokens))
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
        both = self.reweight(self.features(torch.cat([query * self.head**-0.5, key], 1)))  # (B, 2 H, N, F D)
        query, key = both[:, : self.heads], both[:, self.heads :]
        context = self.scores(key.transpose(-2, -1), value) * (1 / self.tokens)  # (B, H, F D, C)
        total = self.sum(key) * (1 / self.tokens)  # (B, H, 1, F D)
        denominator = self.denominator(query, total.transpose(-2, -1))  # (B, H, N, 1)
        return self.normalizer(self.values(query, context), denominator)
