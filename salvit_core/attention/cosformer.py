"""cosFormer: ReLU features, re-weighted by the cosine of the distance (Qin et al., "cosFormer", 2022)."""

import math
from collections.abc import Callable

import torch
from torch import nn

from .merged import MergedAttention
from .operations import Divide, MatMul, Reweight, TokenSum


class Cosformer(MergedAttention):
    """out_i = sum_j w_ij v_j / sum_j w_ij, w_ij = (relu(q_i) . relu(k_j)) cos(i, j) per head (Section 3).

    The paper's cos(i, j) = cos(pi / 2 (i - j) / N) falls with the distance in a text. Here, where N is a square and
    its root n, tokens i and j lie in rows r, s and columns c, d of the image, and

        cos(i, j) = cos(pi / 2 (r - s) / n) cos(pi / 2 (c - d) / n),

    the paper's in each direction; where N is no square, as with a class token, the paper's own. `Reweight` splits it
    into factors of i and of j, so that sum_j k_j v_j^T comes first and N^2 never appears.

    Cost: O(N D^2) per head, four times scaling attention's in an image, twice else.

    Args:
        width: dimension M of the model.
        heads: number of heads H; D = M / H.
        tokens: number of tokens N.
        normalizer: ignored; the mechanism divides by its own sum.
        dropout: ignored; there are no attention weights to drop.
    """

    def __init__(self, width: int, heads: int, tokens: int, normalizer: Callable[..., nn.Module], dropout: float = 0.1):
        super().__init__()
        self.heads, self.head, self.tokens = heads, width // heads, tokens
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.features = nn.ReLU()
        self.reweight = Reweight(tokens)
        self.scores = MatMul()
        self.sum = TokenSum()
        self.denominator = MatMul()
        self.values = MatMul()
        # Queries and keys of variance one have E relu(q) relu(k) = 1 / (2 pi), D of them are summed.
        self.normalizer = Divide(scale=self.head**0.5 / (2 * math.pi))
        self.projection = nn.Linear(width, width)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries and keys (B, H, N, D), values (B, H, N, C) -> (B, H, N, C)."""
        # 1 / sqrt(D) and 1 / N cancel in the quotient, and keep sums over features and tokens small.
        both = self.reweight(self.features(torch.cat([query * self.head**-0.5, key], 1)))  # (B, 2 H, N, F D)
        query, key = both[:, : self.heads], both[:, self.heads :]
        context = self.scores(key.transpose(-2, -1), value) * (1 / self.tokens)  # (B, H, F D, C)
        total = self.sum(key) * (1 / self.tokens)  # (B, H, 1, F D)
        denominator = self.denominator(query, total.transpose(-2, -1))  # (B, H, N, 1)
        return self.normalizer(self.values(query, context), denominator)
