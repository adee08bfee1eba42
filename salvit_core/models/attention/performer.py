"""Performer: softmax's kernel from random features, FAVOR+ (Choromanski et al., "Rethinking attention", 2021)."""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..operations import Divide, Exponential, MatMul, SquaredNorm, TokenSum, of_kind
from .mechanism import MergedAttention

if TYPE_CHECKING:
    from ..config import TransformerConfig


# Added to every feature, so that no denominator is zero. Fixed point with 13 fractional bits still holds it.
EPS = 2.0**-12


class Performer(MergedAttention):
    """out_i = sum_j (f(q_i) . f(k_j)) v_j / sum_j f(q_i) . f(k_j) per head (Section 2), f of m random features.

    f(x) = exp(W x' - |x'|^2 / 2) / sqrt(m), x' = x / D^(1/4): positive, and E f(q) . f(k) = exp(q . k / sqrt(D))
    (Lemma 1). From the exponents the largest is subtracted, per query, and per head among all keys; that cancels in
    the quotient. A small eps is added to every feature, as in the paper's code.

    W, m x D, is no weight that is learnt: `redraw` draws blocks of D orthogonal rows (Section 3.2), whose lengths are
    those of independent Gaussian vectors, chi-distributed with D degrees of freedom, so that every row is Gaussian
    and the estimate unbiased; rows all sqrt(D) long would vary less and be biased.

    Cost: O(N m D) per head.

    Args:
        config: the architecture.
        eps: added to every feature.
    """

    name = "performer"
    rows = {"Performer": {}}
    sized = True

    def __init__(self, config: "TransformerConfig", eps: float = EPS):
        super().__init__(config)
        self.eps = eps
        self.qkv = of_kind("projection", nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias))
        features = nn.Linear(self.head, config.memory, bias=False).requires_grad_(False)  # W
        self.features = of_kind("normaliser", features)
        self._make_kernel()
        self.scores = of_kind("scores", MatMul())
        self.sum = of_kind("normaliser", TokenSum())
        self.denominator = of_kind("normaliser", MatMul())
        self.values = of_kind("values", MatMul())
        self.projection = of_kind("projection", nn.Linear(config.width, config.width))
        self.redraw()

    def _make_kernel(self) -> None:
        self.norms = of_kind("scores", SquaredNorm())
        self.kernel = of_kind("normaliser", nn.ModuleList([Exponential(1), Exponential(2)]))  # of queries, of keys
        self.normalizer = of_kind(
            "normaliser", Divide()
        )  # at most N, but the largest features, which become one, are far above the others
        self.scale = 1 / self.features.out_features

    def redraw(self) -> None:
        """Draw W anew, from torch's global generator."""
        count, size = self.features.weight.shape
        blocks, triangles = torch.linalg.qr(torch.randn(-(-count // size), size, size))
        # Only with the signs that make R's diagonal positive is Q uniform: Householder's method leaves others.
        blocks = blocks * triangles.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        rows = blocks.mT.flatten(0, 1)[:count] * torch.randn(count, size).norm(dim=1, keepdim=True)
        with torch.no_grad():
            self.features.weight.copy_(rows)

    def feature_maps(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys (B, H, N, D) -> sqrt(m) f of both, (B, H, N, m)."""
        both = torch.cat([query, key], 1) * self.head**-0.25  # (B, 2 H, N, D)
        exponents = self.features(both) - self.norms(both) * 0.5
        query = self.kernel[0](exponents[:, : self.heads])
        key = self.kernel[1](exponents[:, self.heads :])
        return query + self.eps, key + self.eps

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries and keys (B, H, N, D), values (B, H, N, C) -> (B, H, N, C)."""
        query, key = self.feature_maps(query, key)
        context = self.scores(key.transpose(-2, -1), value)  # (B, H, m, C)
        total = self.sum(key)  # (B, H, 1, m)
        denominator = self.denominator(query, total.transpose(-2, -1)) * self.scale  # (B, H, N, 1)
        return self.normalizer(self.values(query, context) * self.scale, denominator)


class ReLUPerformer(Performer):
    """Performer with f(x) = relu(W x') / sqrt(m): generalised attention, which approximates no softmax (Section 2.2).

    Cost and shapes as `Performer`.
    """

    name = "performer_relu"
    rows = {"Performer ReLU": {}}

    def _make_kernel(self) -> None:
        self.kernel = of_kind("normaliser", nn.ReLU())
        # E relu(a) relu(b) of independent a, b of variance one.
        self.normalizer = of_kind("normaliser", Divide(scale=1 / (2 * math.pi)))
        self.scale = 1 / (self.features.out_features * self.tokens)  # 1 / N cancels, and keeps denominators small

    def feature_maps(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys (B, H, N, D) -> sqrt(m) f of both, (B, H, N, m)."""
        both = self.kernel(self.features(torch.cat([query, key], 1) * self.head**-0.25)) + self.eps
        return both[:, : self.heads], both[:, self.heads :]
