"""Nystromformer: attention through landmarks, Nystrom's method (Xiong et al., "Nystromformer", 2021)."""

from collections.abc import Callable

import torch
from torch import nn

from . import fused
from .merged import MergedAttention
from .operations import MatMul, PseudoInverse, SegmentMeans, TokenConv


class Nystromformer(MergedAttention):
    """R(Q L_k^T) R(L_q L_k^T)^+ R(L_q K^T) V + conv(V) per head, R the normaliser over keys.

    The landmarks L_q and L_k are means of the queries / sqrt(D) and of the keys in m segments. The convolution runs
    over the tokens in their order, one kernel per head, and stands for what landmarks lose nearby.

    Cost: O(N m) scores per head, and O(m^3) for the pseudo-inverse.

    Args:
        width: dimension M of the model.
        heads: number of heads H; D = M / H.
        tokens: number of tokens N.
        normalizer: builds each of the three normalisers from dim, heads and shape; rows must sum to one.
        dropout: probability of dropping a weight of a landmark for a token in training.
        memory: number of landmarks m, at most N.
        iterations: steps of the pseudo-inverse.
        kernel: taps of the convolution; the largest odd number up to N if that is less.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        tokens: int,
        normalizer: Callable[..., nn.Module],
        dropout: float = 0.1,
        memory: int = 64,
        iterations: int = 6,
        kernel: int = 33,
    ):
        super().__init__()
        self.heads, self.head = heads, width // heads
        count = min(memory, tokens)  # m
        shapes = (heads, tokens, count), (heads, count, count), (heads, count, tokens)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.landmarks = SegmentMeans(tokens, count)
        self.scores = nn.ModuleList(MatMul() for _ in shapes)
        self.normalizer = nn.ModuleList(normalizer(dim=-1, heads=heads, shape=shape) for shape in shapes)
        self.dropout = fused.Dropout(dropout)
        self.inverse = PseudoInverse(iterations)
        self.values = nn.ModuleList(MatMul() for _ in shapes)
        self.conv = TokenConv(heads, min(kernel, tokens - 1 + tokens % 2))
        self.projection = nn.Linear(width, width)

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
