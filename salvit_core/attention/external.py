"""External attention, EA (Guo et al., "Beyond self-attention"; SAL-ViT, Section 2.4 and Figure 2b, 2d)."""

from collections.abc import Callable

import torch
from torch import nn

from ..normalizers import L1, Scaling
from . import fused


class ExternalAttention(nn.Module):
    """Attention to S learnt memory slots instead of to the other tokens; both memories shared by all heads.

    a = M_k q; weights = L1_slots(normaliser_tokens(a)); out = W_o M_v weights + q, per head (the CIFAR setting of the
    released SAL-ViT code). The first normalisation runs over the tokens, the second over the slots: EANet's double
    normalisation. With the linear `Scaling` the second is left out, since scores of both signs have no L1 sum.

    Cost: O(N S) scores per head; S = 64 is a quarter of N = 256.

    Args:
        width: dimension M of the model.
        heads: number of heads H; D = M / H.
        tokens: number of tokens N.
        normalizer: builds the normaliser from dim, heads and shape.
        dropout: probability of dropping an attention weight in training.
        memory: number of memory slots S.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        tokens: int,
        normalizer: Callable[..., nn.Module],
        dropout: float = 0.1,
        memory: int = 64,
    ):
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.scores = nn.Linear(self.head, memory, bias=False)  # M_k
        self.normalizer = normalizer(dim=-2, heads=heads, shape=(1, tokens, memory))
        self.l1 = nn.Identity() if isinstance(self.normalizer, Scaling) else L1(dim=-1)
        self.dropout = fused.Dropout(dropout)
        self.values = nn.Linear(memory, self.head, bias=False)  # M_v
        self.projection = nn.Linear(self.head, self.head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        query = self.query(x).unflatten(-1, (self.heads, self.head))  # (B, N, H, D)
        if fused.applies(self, query):
            memories = self.scores.weight, self.normalizer, self.values.weight
            values = fused.external_attention(query, *memories, self.dropout.p)  # (B, N, H, D)
            return (self.projection(values) + query).flatten(2)
        query = query.transpose(1, 2)  # (B, H, N, D)
        scores = self.scores(query)  # (B, H, N, S)
        weights = self.dropout(self.l1(self.normalizer(scores)))  # (B, H, N, S)
        values = self.values(weights)  # (B, H, N, D)
        return (self.projection(values) + query).transpose(1, 2).flatten(2)  # (B, N, M)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> weights (B, H, N, S) of the memory slots, not of tokens; none dropped."""
        query = self.query(x).unflatten(-1, (self.heads, self.head)).transpose(1, 2)  # (B, H, N, D)
        return self.l1(self.normalizer(self.scores(query)))
