"""Attention that differs from head to head: what head-wise selective attention search, SAS-H, mixes and extracts.

Here no layer mixes the heads: a branch projects each head's values with one shared (D, D) projection and the heads'
outputs are concatenated, so that each head can be self-attention or external attention on its own (SAL-ViT, Eq. 3).
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..normalizers import Softmax, normalizer_of
from ..operations import MatMul, of_kind
from . import fused
from .external import second

if TYPE_CHECKING:
    from ..config import TransformerConfig


class SelfHeads(nn.Module):
    """Self-attention in `heads` heads of size D, kept apart: softmax(Q K^T / sqrt(D)) V W_o per head, W_o shared.

    Args:
        config: the architecture; the size D of a head is that of its heads.
        heads: number h of heads in this branch.
    """

    kind = "scores"

    def __init__(self, config: "TransformerConfig", heads: int):
        super().__init__()
        self.heads, self.head = heads, config.width // config.heads
        tokens, head = config.tokens, self.head
        self.qkv = of_kind("projection", nn.Linear(config.width, 3 * heads * head, bias=config.qkv_bias))
        self.scores = of_kind("scores", MatMul())
        self.normalizer = normalizer_of(config)(dim=-1, heads=heads, shape=(heads, tokens, tokens))
        self.dropout = fused.Dropout(config.attention_dropout)
        self.values = of_kind("values", MatMul())
        self.projection = of_kind("projection", nn.Linear(head, head))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> heads (B, h, N, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head))  # (B, N, 3, h, D)
        if fused.applies(self, qkv, Softmax):
            return self.projection(fused.self_attention(qkv, self.normalizer, self.dropout.p)).transpose(1, 2)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, h, N, D)
        scores = self.scores(query, key.transpose(-2, -1)) * self.head**-0.5  # (B, h, N, N)
        weights = fused.weigh(self, scores, self.normalizer)  # (B, h, N, N)
        return self.projection(self.values(weights, value))  # (B, h, N, D)


class ExternalHeads(nn.Module):
    """External attention in `heads` heads of size D, kept apart: `ExternalAttention` before its heads are merged.

    Args:
        config: the architecture; the size D of a head is that of its heads.
        heads: number h of heads in this branch.
    """

    kind = "scores"

    def __init__(self, config: "TransformerConfig", heads: int):
        super().__init__()
        self.heads, self.head = heads, config.width // config.heads
        tokens, head, memory = config.tokens, self.head, config.memory
        self.query = of_kind("projection", nn.Linear(config.width, heads * head, bias=config.qkv_bias))
        self.scores = of_kind("scores", nn.Linear(head, memory, bias=False))  # M_k
        self.normalizer = normalizer_of(config)(dim=-2, heads=heads, shape=(1, tokens, memory))
        self.l1 = second(self.normalizer)
        self.dropout = fused.Dropout(config.attention_dropout)
        self.values = of_kind("values", nn.Linear(memory, head, bias=False))  # M_v
        self.projection = of_kind("projection", nn.Linear(head, head))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> heads (B, h, N, D)."""
        query = self.query(x).unflatten(-1, (self.heads, self.head))  # (B, N, h, D)
        if fused.applies(self, query):
            memories = self.scores.weight, self.normalizer, self.values.weight
            values = fused.external_attention(query, *memories, self.dropout.p)  # (B, N, h, D)
            return (self.projection(values) + query).transpose(1, 2)
        query = query.transpose(1, 2)  # (B, h, N, D)
        weights = fused.weigh(self, self.scores(query), self.normalizer, self.l1)  # (B, h, N, S)
        return self.projection(self.values(weights)) + query  # (B, h, N, D)


class ScalingHeads(nn.Module):
    """Scaling attention in `heads` heads of size D, kept apart: Q (K^T V) / N per head, then W_o, shared.

    What MPCViT gives to the heads that can do without ReLU softmax (Zeng et al., 2023).

    Args:
        config: the architecture; the size D of a head is that of its heads.
        heads: number h of heads in this branch.
    """

    kind = "scores"

    def __init__(self, config: "TransformerConfig", heads: int):
        super().__init__()
        self.heads, self.head, self.tokens = heads, config.width // config.heads, config.tokens
        self.qkv = of_kind("projection", nn.Linear(config.width, 3 * heads * self.head, bias=config.qkv_bias))
        self.scores = of_kind("scores", MatMul())
        self.values = of_kind("values", MatMul())
        self.projection = of_kind("projection", nn.Linear(self.head, self.head))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> heads (B, h, N, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head))  # (B, N, 3, h, D)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, h, N, D)
        context = self.scores(key.transpose(-2, -1), value) * self.tokens**-0.5  # (B, h, D, D)
        return self.projection(self.values(query * self.tokens**-0.5, context))


HEADS: dict[str, type[nn.Module]] = {"self": SelfHeads, "external": ExternalHeads, "scaling": ScalingHeads}


class HeadwiseAttention(nn.Module):
    """One attention in some heads, another in the others: holds and runs only what each head needs.

    Args:
        config: the architecture.
        names: one name per head, of `HEADS`; H names.
    """

    kind = "scores"

    def __init__(self, config: "TransformerConfig", names: tuple[str, ...]):
        super().__init__()
        self.names = names
        self.kinds = [name for name in HEADS if name in names]
        for name in self.kinds:
            self.add_module(f"{name}_attention", HEADS[name](config, names.count(name)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        branches = {name: getattr(self, f"{name}_attention")(x) for name in self.kinds}  # (B, h, N, D) each
        place = [self.names[:head].count(name) for head, name in enumerate(self.names)]
        return torch.cat([branches[name][:, i] for name, i in zip(self.names, place, strict=True)], -1)  # (B, N, M)
