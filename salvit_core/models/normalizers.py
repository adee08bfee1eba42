"""Normalisers: attention scores in, attention weights out (SAL-ViT, Table 1 and Eq. 1-2).

Each one maps scores a of shape (B, H, N, K) to R(a) / (sum R(a) + eps), the sum running along `dim`: the keys
(-1) in self-attention, the tokens (-2) in external attention. They differ in the re-weighting function R, which is
what makes them dear or cheap on secret shares.

Letters: B batch, H heads, N tokens, K keys (N in self-attention, S memory slots in external attention).
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from .operations import EPS, Operation

if TYPE_CHECKING:
    from .config import TransformerConfig

GRANULARITIES = ("global", "head", "element")


class Normalizer(Operation):
    """What all normalisers share: the dimension along which the weights sum to one.

    Args:
        dim: dimension of the scores to normalise along.
        heads: number of heads H; only L2Q needs it.
        shape: shape of one image's scores, (H, N, K), or (1, N, K) where all heads share; only L2Q needs it.
    """

    kind = "normaliser"
    per_element = 3  # FLOPs

    def __init__(self, dim: int = -1, heads: int = 1, shape: tuple[int, int, int] = (1, 1, 1)):
        super().__init__()
        self.dim = dim

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """Per element, and for L2Q one per element of C and D."""
        return self.per_element * result.numel() + sum(parameter.numel() for parameter in self.parameters())

    def extra_repr(self) -> str:
        """Options that show in the model's text and so in its fingerprint."""
        return f"dim={self.dim}"


class Softmax(Normalizer):
    """softmax(a) = exp(a) / sum exp(a) (Table 1, row 1)."""

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, H, N, K) -> weights of the same shape."""
        return scores.softmax(self.dim)


class TwoQuad(Normalizer):
    """2Quad(a) = (a + c)^2 / sum (a + c)^2, c = 5 (Table 1, row 2; MPCFormer)."""

    c = 5.0
    per_element = 4

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, H, N, K) -> weights of the same shape."""
        squares = (scores + self.c).square()
        return squares / squares.sum(self.dim, keepdim=True)


class TwoReLU(Normalizer):
    """2ReLU(a) = relu(a) / (sum relu(a) + eps) (Table 1, row 3; SecureML)."""

    eps = EPS

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, H, N, K) -> weights of the same shape; a row without a positive score becomes zero."""
        positive = scores.relu()
        return positive / (positive.sum(self.dim, keepdim=True) + self.eps)


class Scaling(Normalizer):
    """Scale(a) = a / n, n the number of entries along `dim` (Table 1, row 4): linear, and not a normalisation.

    With self-attention it is what `ScalingAttention` computes in a cheaper order. Table 3 of the paper also lists it
    inside external attention, where it collapses to 33.45 % on CIFAR-10.
    """

    per_element = 1

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, H, N, K) -> weights of the same shape; they need not sum to one."""
        return scores / scores.shape[self.dim]


class L2Q(Normalizer):
    """L2Q(a) = (d a + c)^2 / (sum (d a + c)^2 + eps), c and d learnt (Eq. 2).

    Args:
        dim: dimension of the scores to normalise along.
        heads: number of heads H.
        shape: shape of one image's scores, (H, N, K), or (1, N, K) where all heads share.
        granularity: who has a pair (c, d) of its own (Section 3.2, Figure 3): "element", every entry of `shape`;
            "head", every head of this layer; "global", nobody: one pair, which `CCT` shares between all layers.
        learn_c: learn the shift c; if False it stays the number `initial_c` (Figure 8, "D only").
        learn_d: learn the scale d; if False it stays the number `initial_d` (Figure 8, "C only").
        initial_c: value that c starts from. The released code has 1 (2 in self-attention under its flag initcd).
        initial_d: value that d starts from.

    Raises:
        ValueError: unknown granularity.
    """

    eps = EPS

    def __init__(
        self,
        dim: int = -1,
        heads: int = 1,
        shape: tuple[int, int, int] = (1, 1, 1),
        granularity: str = "element",
        learn_c: bool = True,
        learn_d: bool = True,
        initial_c: float = 1.0,
        initial_d: float = 1.0,
    ):
        super().__init__(dim)
        if granularity not in GRANULARITIES:
            raise ValueError(f"L2Q granularity {granularity!r} is unknown: choose one of {', '.join(GRANULARITIES)}")
        self.granularity = granularity
        size = {"global": (1, 1, 1, 1), "head": (1, heads, 1, 1), "element": (1, *shape)}[granularity]
        self.c = nn.Parameter(torch.full(size, initial_c)) if learn_c else initial_c
        self.d = nn.Parameter(torch.full(size, initial_d)) if learn_d else initial_d

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, H, N, K) -> weights of the same shape."""
        squares = (self.d * scores + self.c).square()
        return squares / (squares.sum(self.dim, keepdim=True) + self.eps)

    def extra_repr(self) -> str:
        """Options that show in the model's text and so in its fingerprint."""
        fixed = [f"{name}={getattr(self, name)}" for name in "cd" if not isinstance(getattr(self, name), nn.Parameter)]
        return ", ".join([f"dim={self.dim}", f"granularity={self.granularity}", *fixed])


class L1(Normalizer):
    """a / (sum a + eps): the second normalisation of external attention, over the memory slots (facts: EA, EANet).

    The clear text has eps = 1e-9 as published; in 16-bit fixed point that is zero.
    """

    eps = 1e-9
    per_element = 0

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        """Non-negative weights (B, H, N, S) -> weights of the same shape, each token's sum one."""
        return weights / (weights.sum(self.dim, keepdim=True) + self.eps)


NORMALIZERS = {"softmax": Softmax, "2quad": TwoQuad, "2relu": TwoReLU, "l2q": L2Q, "scaling": Scaling}


def normalizer_of(config: "TransformerConfig") -> Callable[..., Normalizer]:
    """The configuration's normaliser, still to be given dim, heads and shape."""
    options = {}
    if config.normalizer == "l2q":
        options = {name.removeprefix("l2q_"): value for name, value in vars(config).items() if name.startswith("l2q_")}
    return partial(NORMALIZERS[config.normalizer], **options)
