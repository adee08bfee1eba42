"""Attention that differs from head to head: what head-wise selective attention search, SAS-H, mixes and extracts.

Here no layer mixes the heads: a branch projects each head's values with one shared (D, D) projection and the heads'
outputs are concatenated, so that each head can be self-attention or external attention on its own (SAL-ViT, Eq. 3).
"""

from collections.abc import Callable

import torch
from torch import nn

from ..normalizers import L1, Scaling
from . import fused
from .operations import MatMul


class SelfHeads(nn.Module):
    """Self-attention in `heads` heads of size D, kept apart: softmax(Q K^T / sqrt(D)) V W_o per head, W_o shared.

    Args:
        width: dimension M of the model.
        heads: number h of heads in this branch; D need not be M / h.
        head: dimension D of a head.
        tokens: number of tokens N.
        normalizer: builds the normaliser from dim, heads and shape.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(
        self, width: int, heads: int, head: int, tokens: int, normalizer: Callable[..., nn.Module], dropout: float = 0.1
    ):
        super().__init__()
        self.heads, self.head = heads, head
        self.qkv = nn.Linear(width, 3 * heads * head, bias=False)
        self.scores = MatMul()
        self.normalizer = normalizer(dim=-1, heads=heads, shape=(heads, tokens, tokens))
        self.dropout = fused.Dropout(dropout)
        self.values = MatMul()
        self.projection = nn.Linear(head, head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> heads (B, h, N, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head))  # (B, N, 3, h, D)
        if fused.applies(self, qkv):
            return self.projection(fused.self_attention(qkv, self.normalizer, self.dropout.p)).transpose(1, 2)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, h, N, D)
        scores = self.scores(query, key.transpose(-2, -1)) * self.head**-0.5  # (B, h, N, N)
        weights = self.dropout(self.normalizer(scores))  # (B, h, N, N)
        return self.projection(self.values(weights, value))  # (B, h, N, D)


class ExternalHeads(nn.Module):
    """External attention in `heads` heads of size D, kept apart: `ExternalAttention` before its heads are merged.

    Args:
        width: dimension M of the model.
        heads: number h of heads in this branch; D need not be M / h.
        head: dimension D of a head.
        tokens: number of tokens N.
        normalizer: builds the normaliser from dim, heads and shape.
        dropout: probability of dropping an attention weight in training.
        memory: number of memory slots S.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head: int,
        tokens: int,
        normalizer: Callable[..., nn.Module],
        dropout: float = 0.1,
        memory: int = 64,
    ):
        super().__init__()
        self.heads, self.head = heads, head
        self.query = nn.Linear(width, heads * head, bias=False)
        self.scores = nn.Linear(head, memory, bias=False)  # M_k
        self.normalizer = normalizer(dim=-2, heads=heads, shape=(1, tokens, memory))
        self.l1 = nn.Identity() if isinstance(self.normalizer, Scaling) else L1(dim=-1)
        self.dropout = fused.Dropout(dropout)
        self.values = nn.Linear(memory, head, bias=False)  # M_v
        self.projection = nn.Linear(head, head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> heads (B, h, N, D)."""
        query = self.query(x).unflatten(-1, (self.heads, self.head))  # (B, N, h, D)
        if fused.applies(self, query):
            memories = self.scores.weight, self.normalizer, self.values.weight
            values = fused.external_attention(query, *memories, self.dropout.p)  # (B, N, h, D)
            return (self.projection(values) + query).transpose(1, 2)
        query = query.transpose(1, 2)  # (B, h, N, D)
        weights = self.dropout(self.l1(self.normalizer(self.scores(query))))  # (B, h, N, S)
        return self.projection(self.values(weights)) + query  # (B, h, N, D)


class HeadwiseAttention(nn.Module):
    """Self-attention in some heads, external attention in the others: holds and runs only what each head needs.

    Args:
        width: dimension M of the model.
        names: one name per head, "self" or "external"; H names, D = M / H.
        tokens: number of tokens N.
        normalizer: builds the normaliser from dim, heads and shape.
        dropout: probability of dropping an attention weight in training.
        memory: number of memory slots S of the external heads.
    """

    def __init__(
        self,
        width: int,
        names: tuple[str, ...],
        tokens: int,
        normalizer: Callable[..., nn.Module],
        dropout: float = 0.1,
        memory: int = 64,
    ):
        super().__init__()
        self.names, head = names, width // len(names)
        if count := names.count("self"):
            self.self_attention = SelfHeads(width, count, head, tokens, normalizer, dropout)
        if count := names.count("external"):
            self.external_attention = ExternalHeads(width, count, head, tokens, normalizer, dropout, memory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        branches = {"self": self.self_attention(x)} if "self" in self.names else {}
        if "external" in self.names:
            branches["external"] = self.external_attention(x)  # (B, h, N, D)
        place = [self.names[:head].count(name) for head, name in enumerate(self.names)]
        return torch.cat([branches[name][:, i] for name, i in zip(self.names, place, strict=True)], -1)  # (B, N, M)
