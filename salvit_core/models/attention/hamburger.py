"""Hamburger: a matrix factorisation in attention's place (Geng et al., "Is attention better...?", 2021)."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..normalizers import Softmax
from ..operations import Divide, MatMul, Multiply, of_kind
from .mechanism import Mechanism

if TYPE_CHECKING:
    from ..config import TransformerConfig


class MultiplicativeUpdate(nn.Module):
    """One factor of X = A B^T / R made better, the other kept: A <- A o (X B) / (A B^T B / R) (Lee and Seung, 2001).

    Numerator and denominator are both divided by the length n of B's columns: means instead of sums, which keeps them
    about as large as the entries. The product with A comes before the quotient: A o X B / (A B^T B) is bounded even
    where an entry of A, and with it the denominator, goes to zero.

    Args:
        size: length n of B's columns.
        rank: number R of columns of A and B.
        scale: about how large the denominators are.
    """

    kind = "normaliser"

    def __init__(self, size: int, rank: int, scale: float):
        super().__init__()
        self.size, self.rank = size, rank
        self.numerator, self.gram, self.denominator = MatMul(), MatMul(), MatMul()
        self.multiply, self.divide = Multiply(), Divide(scale)

    def forward(self, x: torch.Tensor, factor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """X (B, l, n), A (B, l, R), B (B, n, R), all >= 0 -> A (B, l, R)."""
        numerator = self.numerator(x, other) * (1 / self.size)  # (B, l, R)
        gram = self.gram(other.transpose(-2, -1), other) * (1 / self.size)  # (B, R, R)
        denominator = self.denominator(factor, gram) * (1 / self.rank)  # (B, l, R)
        return self.divide(self.multiply(factor, numerator), denominator)


class Hamburger(Mechanism):
    """W_2 NMF(relu(W_1 x)): tokens replaced by their best non-negative approximation of rank R (Section 2.2).

    The features X, (N, M), of an image are factored as X = C D^T / R with codes C, (N, R), and bases D, (M, R), both
    >= 0. D starts at random but fixed, C at R softmax(t X D / sqrt(M)) over the bases; then `steps` times C and D are
    updated in turn, and C once more. Of the paper's factorisations this is NMF; there is no vector quantisation,
    whose codes stay a softmax, and so one softmax in all.

    NMF does not mind how size is divided between C and D: columns of D start with norm sqrt(M), and 1 / R stands
    outside, so that entries of C and D are about as large as X's, whatever N, M and R.

    In training only the last update of C has a gradient, that of X, everything before being a constant: the
    one-step gradient (Section 2.3). There are no heads: the M features are factored at once.

    Cost: O(N M R) per step.

    Args:
        config: the architecture.
        steps: updates of both factors.
        temperature: the inverse temperature t; the larger, the closer the first codes are to one basis per token.
    """

    name = "hamburger"
    rows = {"Hamburger": {}}
    sized = True
    queried = False

    def __init__(self, config: "TransformerConfig", steps: int = 6, temperature: float = 1.0):
        super().__init__(config)
        width, tokens = config.width, self.tokens
        self.rank, self.temperature = min(config.memory, tokens), temperature * width**-0.5  # R, t / sqrt(M)
        self.lower = of_kind("projection", nn.Linear(width, width, bias=False))  # the lower half of the bun, W_1
        self.activation = of_kind("activation", nn.ReLU())
        # A parameter, though fixed: torch.fx follows what is done to parameters, but not to buffers.
        self.bases = nn.Parameter(torch.empty(1, width, self.rank), requires_grad=False)
        self.scores = of_kind("scores", MatMul())
        self.normalizer = Softmax(dim=-1)
        # One more update of the codes than of the bases.
        self.code_updates = nn.ModuleList(MultiplicativeUpdate(width, self.rank, 0.5) for _ in range(steps + 1))
        self.base_updates = nn.ModuleList(MultiplicativeUpdate(tokens, self.rank, 0.25) for _ in range(steps))
        self.values = of_kind("values", MatMul())
        self.projection = of_kind("projection", nn.Linear(config.width, config.width))  # the upper half, W_2
        bases = torch.rand(self.bases.shape)
        self.bases.copy_(bases / bases.square().mean(1, keepdim=True).sqrt())

    def decompose(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, N, M) -> codes (B, N, R) before the last update and bases (B, M, R)."""
        bases = self.bases
        codes = self.normalizer(self.scores(x, bases) * self.temperature) * self.rank
        for code_update, base_update in zip(self.code_updates, self.base_updates, strict=False):
            codes = code_update(x, codes, bases)
            bases = base_update(x.transpose(1, 2), bases, codes)
        return codes, bases

    def factors(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, N, M) -> codes (B, N, R) and bases (B, M, R)."""
        if self.training:
            with torch.no_grad():
                codes, bases = self.decompose(x)
        else:
            codes, bases = self.decompose(x)
        return self.code_updates[-1](x, codes, bases), bases

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        codes, bases = self.factors(self.activation(self.lower(x)))
        return self.projection(self.values(codes, bases.transpose(1, 2)) * (1 / self.rank))  # (B, N, M)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> how much the features of token j enter token i's, (B, 1, N, N), for one head.

        Another update of the bases would write the approximation of feature m as sum_j w^m_ij x_jm, w^m = C
        diag(d_m / y_m) C^T / (N R), d_m the m-th row of D and y_m of the update's denominator. It is the mean of w^m
        over the features that is returned.
        """
        codes, bases = self.factors(self.activation(self.lower(x)))
        tokens = x.shape[1]
        denominator = bases @ (codes.mT @ codes) / (tokens * self.rank) + Divide.eps  # (B, M, R)
        share = (bases / denominator).mean(1, keepdim=True)  # (B, 1, R)
        return ((codes * share) @ codes.mT / (tokens * self.rank)).unsqueeze(1)
