"""The compact convolutional transformer, CCT (Hassani et al.; SAL-ViT, Section 4): the paper's backbone.

Letters in the shape comments: B batch, C channels, N tokens, M dimension of the model, H heads, D of a head.
"""

from collections.abc import Callable

import torch
from torch import nn

from .blocks import Block, SequencePool, attention_of, initialize, refuse_other_images
from .config import CCTConfig
from .operations import of_kind


class Tokenizer(nn.Sequential):
    """Images to tokens: convolutions, each with ReLU and max-pooling; every remaining pixel is a token."""

    kind = "tokenizer"

    def __init__(self, config: CCTConfig):
        widths = [config.channels] + [64] * (config.convolutions - 1) + [config.width]
        steps = []
        for before, after in zip(widths, widths[1:], strict=False):
            conv = nn.Conv2d(before, after, config.kernel, config.stride, config.kernel // 2, bias=False)
            steps += [conv, nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        super().__init__(*steps)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, height, width) -> tokens (B, N, M)."""
        return super().forward(images).flatten(2).transpose(1, 2)


class CCT(nn.Module):
    """Tokenizer, position embedding, blocks, norm, sequence pooling, linear head.

    Args:
        config: the architecture. `model.config` keeps it.
        attention: builds the attention of a layer (from 0) in place of the one that `config` names, as a search does.
    """

    def __init__(self, config: CCTConfig, attention: Callable[[CCTConfig, int], nn.Module] = attention_of):
        super().__init__()
        if not isinstance(config, CCTConfig):
            raise ValueError(f"config is {type(config).__name__}: give a CCTConfig, such as preset('cct_7_3x1')")
        self.config = config
        self.tokenizer = Tokenizer(config)
        self.position = nn.Parameter(torch.empty(1, config.tokens, config.width))
        self.blocks = nn.Sequential(*(Block(config, layer, attention(config, layer)) for layer in range(config.layers)))
        self.norm = of_kind("LayerNorm", nn.LayerNorm(config.width, config.norm_eps))
        self.pool = SequencePool(config.width)
        self.head = of_kind("head", nn.Linear(config.width, config.classes))
        initialize(self, position=0.2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, height, width) -> logits (B, classes)."""
        return self.head(self.features(images))  # (B, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, height, width) -> what the head reads, (B, M)."""
        refuse_other_images(self.config, images)
        x = self.tokenizer(images) + self.position  # (B, N, M)
        return self.pool(self.norm(self.blocks(x)))  # (B, M)
