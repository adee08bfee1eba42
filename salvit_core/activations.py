"""Activations of the MLP: GELU, or a square that is cheaper on secret shares."""

import torch
from torch import nn


class Quad(nn.Module):
    """x^2 / 8 + x / 4 + 1 / 2, MPCFormer's stand-in for GELU (Li et al., ICLR 2023, Section 4.1)."""

    coefficients = (0.125, 0.25, 0.5)  # of x^2, x and 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., M) -> (..., M)."""
        a, b, c = self.coefficients
        return (a * x + b) * x + c


class LearnedQuad(nn.Module):
    """a x^2 + b x + c with a, b and c learnt for every unit: what L2Q is to 2Quad, this is to `Quad`, where it starts.

    Args:
        units: M, the size of the last dimension.
    """

    def __init__(self, units: int):
        super().__init__()
        a, b, c = Quad.coefficients
        self.a = nn.Parameter(torch.full((units,), a))
        self.b = nn.Parameter(torch.full((units,), b))
        self.c = nn.Parameter(torch.full((units,), c))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., M) -> (..., M)."""
        return (self.a * x + self.b) * x + self.c


ACTIVATIONS = {"gelu": lambda units: nn.GELU(), "quad": lambda units: Quad(), "learned_quad": LearnedQuad}
