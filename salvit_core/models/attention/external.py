"""External attention, EA (Guo et al., "Beyond self-attention"; SAL-ViT, Section 2.4 and Figure 2b, 2d)."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..normalizers import L1, Normalizer, Scaling, normalizer_of
from ..operations import of_kind
from . import fused
from .mechanism import Mechanism

if TYPE_CHECKING:
    from ..config import TransformerConfig


class ExternalAttention(Mechanism):
    """Attention to S learnt memory slots instead of to the other tokens; both memories shared by all heads.

    a = M_k q; weights = L1_slots(normaliser_tokens(a)); out = W_o M_v weights + q, per head (the CIFAR setting of the
    released SAL-ViT code). The first normalisation runs over the tokens, the second over the slots: EANet's double
    normalisation. With the linear `Scaling` the second is left out, since scores of both signs have no L1 sum.

    Cost: O(N S) scores per head; S = 64 is a quarter of N = 256.
    """

    name = "external"
    sized = True

    def __init__(self, config: "TransformerConfig"):
        super().__init__(config)
        self.query = of_kind("projection", nn.Linear(config.width, config.width, bias=config.qkv_bias))
        self.scores = of_kind("scores", nn.Linear(self.head, config.memory, bias=False))  # M_k
        shape = (1, self.tokens, config.memory)
        self.normalizer = normalizer_of(config)(dim=-2, heads=self.heads, shape=shape)
        self.l1 = second(self.normalizer)
        self.dropout = fused.Dropout(config.attention_dropout)
        self.values = of_kind("values", nn.Linear(config.memory, self.head, bias=False))  # M_v
        self.projection = of_kind("projection", nn.Linear(self.head, self.head))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        query = self.query(x).unflatten(-1, (self.heads, self.head))  # (B, N, H, D)
        if fused.applies(self, query):
            memories = self.scores.weight, self.normalizer, self.values.weight
            values = fused.external_attention(query, *memories, self.dropout.p)  # (B, N, H, D)
            return (self.projection(values) + query).flatten(2)
        query = query.transpose(1, 2)  # (B, H, N, D)
        scores = self.scores(query)  # (B, H, N, S)
        weights = fused.weigh(self, scores, self.normalizer, self.l1)  # (B, H, N, S)
        values = self.values(weights)  # (B, H, N, D)
        return (self.projection(values) + query).transpose(1, 2).flatten(2)  # (B, N, M)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> weights (B, H, N, S) of the memory slots, not of tokens; none dropped."""
        query = self.query(x).unflatten(-1, (self.heads, self.head)).transpose(1, 2)  # (B, H, N, D)
        return self.l1(self.normalizer(self.scores(query)))


def second(normalizer: Normalizer) -> nn.Module:
    """What follows the first normalisation: L1 over the slots, or nothing after `Scaling`, which is linear."""
    return of_kind("normaliser", nn.Identity()) if isinstance(normalizer, Scaling) else L1(dim=-1)
