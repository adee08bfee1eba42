"""Several attentions at once, mixed by learnt alphas: a layer of the network that is searched (SAL-ViT, Eq. 3)."""

import torch
from torch import nn


class MixedAttention(nn.Module):
    """alpha SA(x) + (1 - alpha) EA(x), alpha unconstrained (Section 3.3, Eq. 3); or a cheap one that is not EA.

    With heads None one alpha mixes whole branches that map tokens to tokens (SAS-L); otherwise each of the H heads has
    its own alpha, the branches give heads apart, and the mixed heads are concatenated (SAS-H).

    Args:
        self_attention: (B, N, M) -> (B, N, M), or -> (B, H, N, D) where each head has its alpha.
        cheap_attention: the same for what the others get.
        heads: number of heads H that have an alpha each, or None.
        initial: value that alpha starts from; the paper has 0.1.
        cheap: the name of the cheap attention, of which its parameters have theirs.
    """

    kind = "scores"

    def __init__(
        self,
        self_attention: nn.Module,
        cheap_attention: nn.Module,
        heads: int | None = None,
        initial: float = 0.1,
        cheap: str = "external",
    ):
        super().__init__()
        self.names = ("self", cheap)
        self.self_attention = self_attention
        self.add_module(f"{cheap}_attention", cheap_attention)
        self.alpha = nn.Parameter(torch.full(() if heads is None else (heads, 1, 1), initial))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        costly, cheap = (getattr(self, f"{name}_attention")(x) for name in self.names)
        mixed = self.alpha * costly + (1 - self.alpha) * cheap
        return mixed if mixed.dim() == 3 else mixed.transpose(1, 2).flatten(2)  # heads are concatenated


class ChoiceAttention(nn.Module):
    """sum_c alpha_c branch_c(x) over any set of mechanisms, every alpha unconstrained: Eq. 3 for more than two.

    Args:
        branches: name to mechanism, (B, N, M) -> (B, N, M).
    """

    kind = "scores"

    def __init__(self, branches: dict[str, nn.Module]):
        super().__init__()
        self.names = tuple(branches)
        for name, branch in branches.items():
            self.add_module(f"{name}_attention", branch)
        self.alpha = nn.Parameter(torch.full((len(branches),), 1 / len(branches)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        branches = [getattr(self, f"{name}_attention") for name in self.names]
        return sum(alpha * branch(x) for alpha, branch in zip(self.alpha, branches, strict=True))
