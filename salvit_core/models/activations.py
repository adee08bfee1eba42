"""Activations of the MLP: GELU, or a square that is cheaper on secret shares."""

import torch
from torch import nn

from .operations import Operation, of_kind


class Quad(Operation):
    """x^2 / 8 + x / 4 + 1 / 2, MPCFormer's stand-in for GELU (Li et al., ICLR 2023, Section 4.1)."""

    kind = "activation"
    coefficients = (0.125, 0.25, 0.5)  # of x^2, x and 1

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """Horner: two products, two sums."""
        return 4 * result.numel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., M) -> (..., M)."""
        a, b, c = self.coefficients
        return (a * x + b) * x + c


class TanhGELU(Operation):
    """GELU by a tanh, x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel, 2016, Section 2).

    It differs from the exact GELU by up to 5e-4.
    """

    kind = "activation"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(...) -> the same shape."""
        return nn.functional.gelu(x, approximate="tanh")

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """As GELU."""
        return result.numel()


class LearnedQuad(Operation):
    """a x^2 + b x + c with a, b and c learnt for every unit: what L2Q is to 2Quad, this is to `Quad`, where it starts.

    Args:
        units: M, the size of the last dimension.
    """

    kind = "activation"

    def __init__(self, units: int):
        super().__init__()
        a, b, c = Quad.coefficients
        self.a = nn.Parameter(torch.full((units,), a))
        self.b = nn.Parameter(torch.full((units,), b))
        self.c = nn.Parameter(torch.full((units,), c))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., M) -> (..., M)."""
        return (self.a * x + self.b) * x + self.c

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """Horner: two products, two sums."""
        return 4 * result.numel()


ACTIVATIONS = {
    "gelu": lambda units: of_kind("activation", nn.GELU()),
    "quad": lambda units: Quad(),
    "learned_quad": LearnedQuad,
}
