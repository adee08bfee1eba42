"""Nystromformer: attention through landmarks, Nystrom's method (Xiong et al., "Nystromformer", 2021)."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..normalizers import normalizer_of
from ..operations import MatMul, PseudoInverse, SegmentMeans, TokenConv, of_kind
from . import fused
from .mechanism import MergedAttention

if TYPE_CHECKING:
    from ..config import TransformerConfig


class Nystromformer(MergedAttention):
    """R(Q L_k^T) R(L_q L_k^T)^+ R(L_q K^T) V + conv(V) per head, R the normaliser over keys.

    The landmarks L_q and L_k are means of the queries / sqrt(D) and of the keys in m segments. The convolution runs
    over the tokens in their order, one kernel per head, and stands for what landmarks lose nearby.

    Cost: O(N m) scores per head, and O(m^3) for the pseudo-inverse.

    Args:
        config: the architecture.
        iterations: steps of the pseudo-inverse.
        kernel: taps of the convolution; the largest odd number up to N if that is less.
    """

    name = "nystromformer"
    rows = {"Nystromformer": {}, "Nystromformer L2Q": {"normalizer": "l2q"}}
    sized = True

    def __init__(self, config: "TransformerConfig", iterations: int = 6, kernel: int = 33):
        super().__init__(config)
        heads, tokens, count = self.heads, self.tokens, min(config.memory, self.tokens)  # H, N, m
        shapes = (heads, tokens, count), (heads, count, count), (heads, count, tokens)
        normalizer = normalizer_of(config)
        self.qkv = of_kind("projection", nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias))
        self.landmarks = of_kind("scores", SegmentMeans(tokens, count))
        self.scores = of_kind("scores", nn.ModuleList(MatMul() for _ in shapes))
        self.normalizer = nn.ModuleList(normalizer(dim=-1, heads=heads, shape=shape) for shape in shapes)
        self.dropout = fused.Dropout(config.attention_dropout)
        self.inverse = of_kind("normaliser", PseudoInverse(iterations))
        self.values = of_kind("values", nn.ModuleList(MatMul() for _ in shapes))
        self.conv = of_kind("values", TokenConv(heads, min(kernel, tokens - 1 + tokens % 2)))
        self.projection = of_kind("projection", nn.Linear(config.width, config.width))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries and keys (B, H, N, D), values (B, H, N, C) -> (B, H, N, C)."""
        query = query * self.head**-0.5
        both = self.landmarks(torch.cat([query, key], 1))  # (B, 2 H, m, D)
        few_queries, few_keys = both[:, : self.heads], both[:, self.heads :]
        pairs = (query, few_keys), (few_queries, few_keys), (few_queries, key)
        left, middle, right = (
            normalizer(scores(rows, columns.transpose(-2, -1)))
            for normalizer, scores, (rows, columns) in zip(self.normalizer, self.scores, pairs)
        )  # (B, H, N, m), (B, H, m, m), (B, H, m, N)
        means = self.values[1](self.inverse(middle), self.values[0](right, value))  # (B, H, m, C)
        return self.values[2](self.dropout(left), means) + self.conv(value)
