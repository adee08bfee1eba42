"""SOFT: attention without softmax, a Gaussian kernel through landmarks (Lu et al., "SOFT", 2021)."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..operations import Exponential, MatMul, NewtonInverse, SegmentMeans, SquaredNorm, of_kind, unit_values
from .mechanism import Mechanism

if TYPE_CHECKING:
    from ..config import TransformerConfig


class Soft(Mechanism):
    """P^T A^-1 P V / N per head: Nystrom's approximation of S V / N, S_ij = exp(-|q_i - q_j|^2 / (2 sqrt(D))).

    Queries are also the keys, so that S is symmetric and positive definite. With landmarks l, means of the
    queries in m segments, P is the kernel between landmarks and tokens, (m, N), and A between landmarks, (m, m).
    Nothing is normalised: the kernel is at most one, and 1 / N, which the paper leaves to the projection, keeps the
    size of the output from growing with N.

    A^-1 is Newton's, of A plus a ridge on its diagonal. Landmarks that lie close together, as they all do before
    training, make A all but singular; without a ridge its inverse would be as large as rounding allows, and take as
    many steps. The ridge bounds both: |A^-1| <= 1 / ridge, the condition number by m / ridge + 1, which at m = 256
    needs 14 steps of the 20; and moves S by no more than the ridge where m = N.

    Cost: O(N m) kernel values per head, and O(m^3) for the inverse.

    Args:
        config: the architecture.
        iterations: steps of Newton's.
        ridge: added to the diagonal of A.
    """

    name = "soft"
    rows = {"SOFT": {}}
    sized = True

    def __init__(self, config: "TransformerConfig", iterations: int = 20, ridge: float = 0.1):
        super().__init__(config)
        self.count = min(config.memory, self.tokens)  # m
        self.query = of_kind("projection", nn.Linear(config.width, config.width, bias=config.qkv_bias))
        self.value = of_kind("projection", nn.Linear(config.width, config.width, bias=config.qkv_bias))
        self.landmarks = of_kind("scores", SegmentMeans(self.tokens, self.count))
        self.norms = of_kind("scores", SquaredNorm())
        self.scores = of_kind("scores", MatMul())
        self.kernel = of_kind("normaliser", Exponential(0))
        self.inverse = of_kind("normaliser", NewtonInverse(iterations, ridge))
        self.values = of_kind("values", nn.ModuleList(MatMul() for _ in range(3)))
        self.projection = of_kind("projection", nn.Linear(config.width, config.width))

    def attend(self, query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries (B, H, N, D), values (B, H, N, C) -> (B, H, N, C)."""
        landmarks = self.landmarks(query)  # (B, H, m, D)
        points = torch.cat([landmarks, query], -2)  # (B, H, m + N, D)
        norms = self.norms(points)  # (B, H, m + N, 1)
        # -|l - x|^2 / (2 sqrt(D)) = (l . x - |l|^2 / 2 - |x|^2 / 2) / sqrt(D)
        halves = (norms[:, :, : self.count] + norms.transpose(-2, -1)) * 0.5
        kernel = self.kernel((self.scores(landmarks, points.transpose(-2, -1)) - halves) * self.head**-0.5)
        inner, outer = kernel[..., : self.count], kernel[..., self.count :]  # A, (B, H, m, m), and P, (B, H, m, N)
        means = self.values[0](outer, value) * (1 / self.tokens)  # (B, H, m, C)
        means = self.values[1](self.inverse(inner), means)  # (B, H, m, C)
        return self.values[2](outer.transpose(-2, -1), means)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        query = self.query(x).unflatten(-1, (self.heads, self.head)).transpose(1, 2)  # (B, H, N, D)
        value = self.value(x).unflatten(-1, (self.heads, self.head)).transpose(1, 2)  # (B, H, N, D)
        return self.projection(self.attend(query, value).transpose(1, 2).flatten(2))  # (B, N, M)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> P^T A^-1 P / N, (B, H, N, N), symmetric: out_i = sum_j weights_ij value_j."""
        query = self.query(x).unflatten(-1, (self.heads, self.head)).transpose(1, 2)  # (B, H, N, D)
        return self.attend(query, unit_values(x, self.heads))
