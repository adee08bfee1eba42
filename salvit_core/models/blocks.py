"""What both backbones are made of: a block, its residual branches, and the initial weights.

Letters in the shape comments: B batch, N tokens, M dimension of the model, H heads, D of a head.
"""

import torch
from torch import nn

from .activations import ACTIVATIONS
from .attention import ATTENTION
from .attention.headwise import HeadwiseAttention
from .config import Network, TransformerConfig
from .normalizers import L2Q, Softmax
from .operations import MatMul, Operation, of_kind


class StochasticDepth(Operation):
    """Drops a residual branch for a whole image with probability p while training, and rescales the others."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, M) -> (B, N, M)."""
        if not self.training or self.p == 0.0:
            return x
        keep = 1.0 - self.p
        return x * (x.new_empty(x.shape[0], 1, 1).bernoulli_(keep) / keep)

    def flops(self, result: torch.Tensor, *inputs: torch.Tensor) -> int:
        """Nothing: at inference it does nothing."""
        return 0


def attention_of(config: TransformerConfig, layer: int) -> nn.Module:
    """The attention, (B, N, M) -> (B, N, M), that the configuration names for a layer (from 0)."""
    name = config.attention[layer]
    return HeadwiseAttention(config, name) if isinstance(name, tuple) else ATTENTION[name](config)


class Block(nn.Module):
    """Attention and MLP. Unlike in a pre-norm block, the second norm replaces the residual stream (as published)."""

    kind = "MLP"  # of residual additions

    def __init__(self, config: TransformerConfig, layer: int, attention: nn.Module):
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        drop = config.stochastic_depth * layer / max(1, config.layers - 1)
        self.norm1 = of_kind("LayerNorm", nn.LayerNorm(config.width, config.norm_eps))
        self.attention = attention
        self.norm2 = of_kind("LayerNorm", nn.LayerNorm(config.width, config.norm_eps))
        self.mlp = nn.Sequential()
        self.mlp.expand = nn.Linear(config.width, hidden)
        self.mlp.activation = ACTIVATIONS[config.activation](hidden)
        self.mlp.contract = nn.Linear(hidden, config.width)
        self.drop = StochasticDepth(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        x = x + self.drop(self.attention(self.norm1(x)))
        x = self.norm2(x)
        return x + self.drop(self.mlp(x))


class SequencePool(nn.Module):
    """A learnt weighted mean of the tokens; its softmax over N tokens is part of every private inference."""

    kind = "pooling"

    def __init__(self, width: int):
        super().__init__()
        self.scores = nn.Linear(width, 1)
        self.normalizer = of_kind("pooling", Softmax(dim=-2))
        self.values = MatMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> features (B, M)."""
        weights = self.normalizer(self.scores(x))  # (B, N, 1)
        return self.values(weights.transpose(1, 2), x).squeeze(1)


def refuse_other_images(config: Network, images: torch.Tensor) -> None:
    """Refuse images of a size that a network is not for: some leave as many tokens, and would be answered.

    While a network is traced there are no images yet.

    Raises:
        ValueError: names the shape, and what is expected.
    """
    side = config.image
    if isinstance(images, torch.Tensor) and images.shape[1:] != (config.channels, side, side):
        raise ValueError(f"images have shape {tuple(images.shape)}: give (B, {config.channels}, {side}, {side})")


def initialize(model: nn.Module, position: float) -> None:
    """Initial weights of a network with `position`, and one pair of c and d for all its layers if L2Q's are global.

    Args:
        model: a CCT or a ViT.
        position: standard deviation of the position embedding.
    """
    nn.init.trunc_normal_(model.position, std=position)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    redraw(model)  # what is drawn from a distribution of its own, and not learnt, is no weight like the others
    pairs = [module for module in model.modules() if isinstance(module, L2Q) and module.granularity == "global"]
    for module in pairs[1:]:
        module.c, module.d = pairs[0].c, pairs[0].d


def redraw(model: nn.Module) -> None:
    """Draw anew what mechanisms draw at random, such as Performer's features: calls `redraw` where a module has it."""
    for module in model.modules():
        if hasattr(module, "redraw"):
            module.redraw()
