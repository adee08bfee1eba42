"""The product of two activations as a module, so that a graph, a FLOP count or a protocol can name it."""

import torch
from torch import nn


class MatMul(nn.Module):
    """Matrix product of two activations: the only products in attention in which neither side is a weight."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """(..., N, K) and (..., K, D) -> (..., N, D)."""
        return left @ right
