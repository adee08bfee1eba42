"""The plain vision transformer, ViT (Dosovitskiy et al., "An image is worth 16x16 words", 2021): the other backbone.

It takes any mechanism, normaliser and activation that CCT takes, and any network is built from its configuration here.
Letters in the shape comments: B batch, C channels, N tokens, the class token first, M dimension of the model.
"""

import re
from collections.abc import Callable

import torch
from torch import nn

from .blocks import Block, attention_of, initialize, refuse_other_images
from .cct import CCT
from .config import CCTConfig, EfficientViTConfig, Network, ViTConfig
from .efficientvit import EfficientViT
from .operations import of_kind


class PatchEmbedding(nn.Module):
    """Images to tokens: a linear map of each patch, and a learnt class token before them (Section 3.1, Eq. 1).

    The class token is added to a token times zero instead of being repeated for every image: the batch's size is
    unknown while a graph is traced, and on secret shares both steps are local.
    """

    kind = "tokenizer"

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.embed = nn.Conv2d(config.channels, config.width, config.patch, config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, height, width) -> tokens (B, N, M)."""
        patches = self.embed(images).flatten(2).transpose(1, 2)  # (B, N - 1, M)
        return torch.cat([patches[:, :1] * 0 + self.class_token, patches], 1)


class PreNormBlock(Block):
    """Attention and MLP, each on the normalised residual stream and added to it (Eq. 2 and 3)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> tokens (B, N, M)."""
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class ClassToken(nn.Module):
    """What is read of the tokens: the class token."""

    kind = "pooling"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> features (B, M)."""
        return x[:, 0]


class ViT(nn.Module):
    """Patch embedding, position embedding, pre-norm blocks, norm of the class token, linear head.

    The last norm works token by token: only the class token, which alone is read, goes through it.

    Args:
        config: the architecture. `model.config` keeps it.
        attention: builds the attention of a layer (from 0) in place of the one that `config` names.
    """

    def __init__(self, config: ViTConfig, attention: Callable[[ViTConfig, int], nn.Module] = attention_of):
        super().__init__()
        if not isinstance(config, ViTConfig):
            raise ValueError(f"config is {type(config).__name__}: give a ViTConfig, such as preset('vit_tiny')")
        self.config = config
        self.tokenizer = PatchEmbedding(config)
        self.position = nn.Parameter(torch.empty(1, config.tokens, config.width))
        blocks = (PreNormBlock(config, layer, attention(config, layer)) for layer in range(config.layers))
        self.blocks = nn.Sequential(*blocks)
        self.pool = ClassToken()
        self.norm = of_kind("LayerNorm", nn.LayerNorm(config.width, config.norm_eps))
        self.head = of_kind("head", nn.Linear(config.width, config.classes))
        initialize(self, position=0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, height, width) -> logits (B, classes)."""
        return self.head(self.features(images))  # (B, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, height, width) -> what the head reads, (B, M)."""
        refuse_other_images(self.config, images)
        x = self.tokenizer(images) + self.position  # (B, N, M)
        return self.norm(self.pool(self.blocks(x)))  # (B, M)


# What timm and DeiT call the parts of a ViT, and what they are called here.
_NAMES = {
    "cls_token": "tokenizer.class_token",
    "pos_embed": "position",
    "patch_embed.proj": "tokenizer.embed",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.projection",
    "mlp.fc1": "mlp.expand",
    "mlp.fc2": "mlp.contract",
}


def load_deit(model: ViT, weights: dict) -> None:
    """Load weights that timm or DeiT made, of a network without distillation, under their own names.

    Args:
        model: a ViT with QKV biases and LayerNorm's eps of 1e-6, such as preset "deit_tiny" gives.
        weights: the state dict of timm's `VisionTransformer`, or what DeiT's checkpoints hold, with it as "model".

    Raises:
        ValueError: weights that are not those of this network: each by name, or by shape.
    """
    weights = weights.get("model", weights)
    named = {}
    for name, tensor in weights.items():
        for theirs, ours in _NAMES.items():
            name = re.sub(rf"(^|(?<=\.)){re.escape(theirs)}(?=\.|$)", ours, name)
        named[name] = tensor
    try:
        model.load_state_dict(named)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the weights are not those of this ViT: {reason[:500]}") from error


def build(config: Network) -> nn.Module:
    """The network of a configuration: a `ViT` of a `ViTConfig`, a `CCT` of a `CCTConfig`, and so on.

    Raises:
        ValueError: any other configuration.
    """
    if isinstance(config, ViTConfig):
        return ViT(config)
    if isinstance(config, CCTConfig):
        return CCT(config)
    if isinstance(config, EfficientViTConfig):
        return EfficientViT(config)
    raise ValueError(f"config is {type(config).__name__}: give a CCTConfig, a ViTConfig or an EfficientViTConfig")
