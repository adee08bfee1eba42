"""The compact convolutional transformer, CCT (Hassani et al.; SAL-ViT, Section 4), and the configurations of networks.

The paper's backbone. `vit` has the other one; what both are made of, and how they are named, is here.

Letters in the shape comments: B batch, C channels, N tokens, M dimension of the model, H heads, D of a head.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .activations import ACTIVATIONS
from .attention import ATTENTION, SIZED
from .attention.headwise import HeadwiseAttention
from .attention.operations import MatMul
from .normalizers import L2Q, NORMALIZERS, Softmax


@dataclass(frozen=True)
class TransformerConfig:
    """What the configurations of all backbones share.

    `attention` is one name for all layers or one entry per layer; it is kept as one entry per layer. An entry that is
    itself a sequence names "self" or "external" for each head (SAS-H). The `l2q_` fields matter only where `normalizer`
    is "l2q". A backbone's own configuration adds `tokens`, N.

    Raises:
        ValueError: a name that is not known, or sizes that do not fit together.
    """

    image: int = 32  # side, pixels
    channels: int = 3
    classes: int = 10
    layers: int = 7
    width: int = 256  # M
    heads: int = 4
    mlp_ratio: float = 2.0
    attention: str | tuple[str | tuple[str, ...], ...] = "self"
    normalizer: str = "softmax"
    activation: str = "gelu"  # of the MLP
    memory: int = 64  # S, slots of external attention; what stands for the N tokens in the other mechanisms of `SIZED`
    l2q_granularity: str = "element"
    l2q_learn_c: bool = True
    l2q_learn_d: bool = True
    l2q_initial_c: float = 1.0
    l2q_initial_d: float = 1.0
    attention_dropout: float = 0.1
    stochastic_depth: float = 0.1

    def __post_init__(self):
        names = (self.attention,) * self.layers if isinstance(self.attention, str) else self.attention
        names = tuple(name if isinstance(name, str) else tuple(name) for name in names)
        object.__setattr__(self, "attention", names)
        for name in names:
            if isinstance(name, tuple):
                if len(name) != self.heads or set(name) - {"self", "external"}:
                    raise ValueError(f"attention {name!r} must name self or external for each of {self.heads} heads")
            elif name not in ATTENTION:
                raise ValueError(f"attention {name!r} is unknown: choose from {', '.join(ATTENTION)}")
        if len(names) != self.layers:
            raise ValueError(f"attention names {len(names)} layers, the network has {self.layers}: give one per layer")
        if self.normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer {self.normalizer!r} is unknown: choose from {', '.join(NORMALIZERS)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown: choose from {', '.join(ACTIVATIONS)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads: choose one that is")


@dataclass(frozen=True)
class CCTConfig(TransformerConfig):
    """Everything that fixes a CCT's architecture, as plain data: JSON in a record, public to both parties.

    Raises:
        ValueError: as `TransformerConfig`, or an image too small to leave a token.
    """

    convolutions: int = 1  # each followed by ReLU and a 3x3 max-pool of stride 2
    kernel: int = 3
    stride: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.tokens < 1:
            raise ValueError(f"an image of {self.image} pixels leaves no tokens: use fewer convolutions or strides")

    @property
    def tokens(self) -> int:
        """N: the tokens that the tokenizer makes of one image."""
        side = self.image
        for _ in range(self.convolutions):
            side = (side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1  # convolution
            side = (side + 2 - 3) // 2 + 1  # max-pool 3/2/1
        return side * side


@dataclass(frozen=True)
class ViTConfig(TransformerConfig):
    """Everything that fixes a plain vision transformer's architecture (`vit.ViT`), as plain data.

    Raises:
        ValueError: as `TransformerConfig`, or an image that patches do not tile.
    """

    patch: int = 4  # side, pixels

    def __post_init__(self):
        super().__post_init__()
        if self.patch < 1 or self.image < 1 or self.image % self.patch:
            raise ValueError(f"an image of {self.image} pixels is not a multiple of patches of {self.patch}")

    @property
    def tokens(self) -> int:
        """N: the patches of one image, and the class token."""
        return (self.image // self.patch) ** 2 + 1


PRESETS = {
    # For tests: seconds to train on scikit-learn's 8x8 digits.
    "cct_2_3x1": dict(image=8, channels=1, layers=2, width=32, heads=2, memory=16),
    "cct_4_3x1": dict(image=8, channels=1, layers=4, width=32, heads=2, memory=16),
    # For a laptop: 28x28 Fashion-MNIST, 49 tokens.
    "cct_4_3x2": dict(image=28, channels=1, convolutions=2, layers=4, width=64, heads=4, memory=16),
    # The paper's three networks (Section 4, "Experimental setup").
    "cct_7_3x1": dict(),
    "cct_9_7x2": dict(image=224, classes=200, convolutions=2, kernel=7, stride=2, layers=9, width=192, heads=12),
    "cct_14_7x2": dict(
        image=224, classes=1000, convolutions=2, kernel=7, stride=2, layers=14, width=384, heads=6, mlp_ratio=3.0
    ),
    # Plain vision transformers: 16 patches and the class token on 8x8 digits, 64 and it on CIFAR.
    "vit_2": dict(patch=2, image=8, channels=1, layers=2, width=32, heads=2, memory=8),
    "vit_tiny": dict(patch=4, layers=4, width=48, heads=4, mlp_ratio=4.0, memory=16),
}

# The paper's rows. Where a budget B of self-attention layers stands, the paper's search chose them but it does not say
# which; private latency depends on their number alone, so the first B stand in for measurements of latency.
METHODS = {
    "SA softmax": dict(attention="self", normalizer="softmax"),
    "SA 2Quad": dict(attention="self", normalizer="2quad"),
    "SA 2ReLU": dict(attention="self", normalizer="2relu"),
    "SA L2Q": dict(attention="self", normalizer="l2q"),
    "SA scaling": dict(attention="scaling"),
    "EA softmax": dict(attention="external", normalizer="softmax"),
    "EA 2Quad": dict(attention="external", normalizer="2quad"),
    "EA 2ReLU": dict(attention="external", normalizer="2relu"),
    "EA L2Q": dict(attention="external", normalizer="l2q"),
    "EA scaling": dict(attention="external", normalizer="scaling"),
    "SAL-ViT B=3": dict(attention=3, normalizer="l2q"),
    "SAL-ViT B=2": dict(attention=2, normalizer="l2q"),
    "SAL-ViT B=1": dict(attention=1, normalizer="l2q"),
}

# Efficient attention with its own paper's normaliser: the other rows of Table 2, and what is compared besides.
MECHANISMS = {
    "Linformer": dict(attention="linformer"),
    "Linformer, heads": dict(attention="linformer_heads"),
    "CosFormer": dict(attention="cosformer"),
    "Hamburger": dict(attention="hamburger"),
    "SOFT": dict(attention="soft"),
    "Performer": dict(attention="performer"),
    "Performer ReLU": dict(attention="performer_relu"),
    "Nystromformer": dict(attention="nystromformer"),
    "Dilated hybrid": dict(attention="dilated"),
    "Linformer L2Q": dict(attention="linformer", normalizer="l2q"),
    "Nystromformer L2Q": dict(attention="nystromformer", normalizer="l2q"),
    "Dilated L2Q": dict(attention="dilated", normalizer="l2q"),
    "SA separate": dict(attention="standard"),
}
ROWS = METHODS | MECHANISMS


def config_of(fields: dict) -> TransformerConfig:
    """A configuration from its fields, such as JSON of one holds: of a ViT if `patch` is among them, else of a CCT.

    Raises:
        ValueError: unknown field or value.
    """
    made = ViTConfig if "patch" in fields else CCTConfig
    known = {field.name for field in dataclasses.fields(made)}
    if unknown := set(fields) - known:
        names = f"{', '.join(sorted(unknown))}: choose from {', '.join(sorted(known))}"
        raise ValueError(f"{made.__name__} has no field {names}")
    return made(**fields)


def preset(name: str, method: str | None = None, **changes) -> TransformerConfig:
    """A named configuration, with changes.

    Args:
        name: a key of `PRESETS`, such as "cct_7_3x1" or "vit_tiny".
        method: a row of the tables, a key of `METHODS` or `MECHANISMS`, such as "SA softmax" or "Linformer".
        changes: fields of the configuration to set, such as attention="external" or classes=100.

    Returns:
        a `CCTConfig` or a `ViTConfig`, whichever `name` is.

    Raises:
        ValueError: unknown name, method, field or value.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown: choose from {', '.join(PRESETS)}")
    if method is not None and method not in ROWS:
        raise ValueError(f"method {method!r} is unknown: choose from {', '.join(ROWS)}")
    if "patch" in changes and "patch" not in PRESETS[name]:
        raise ValueError(f"{name} is a CCT, which has no field patch")
    fields = {**PRESETS[name], **(ROWS[method] if method else {}), **changes}
    if isinstance(budget := fields.get("attention"), int):
        layers = fields.get("layers", TransformerConfig.layers)
        if not 0 <= budget <= layers:
            raise ValueError(f"a budget of {budget} self-attention layers: {name} has {layers}")
        fields["attention"] = ("self",) * budget + ("external",) * (layers - budget)
    return config_of(fields)


class StochasticDepth(nn.Module):
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


class Tokenizer(nn.Sequential):
    """Images to tokens: convolutions, each with ReLU and max-pooling; every remaining pixel is a token."""

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


def normalizer_of(config: TransformerConfig) -> Callable[..., nn.Module]:
    """The configuration's normaliser, still to be given dim, heads and shape."""
    options = {}
    if config.normalizer == "l2q":
        options = {name.removeprefix("l2q_"): value for name, value in vars(config).items() if name.startswith("l2q_")}
    return partial(NORMALIZERS[config.normalizer], **options)


def attention_of(config: TransformerConfig, layer: int) -> nn.Module:
    """The attention, (B, N, M) -> (B, N, M), that the configuration names for a layer (from 0)."""
    name = config.attention[layer]
    common = (config.tokens, normalizer_of(config), config.attention_dropout)
    if isinstance(name, tuple):
        return HeadwiseAttention(config.width, name, *common, config.memory)
    extra = {"memory": config.memory} if name in SIZED else {}
    return ATTENTION[name](config.width, config.heads, *common, **extra)


class Block(nn.Module):
    """Attention and MLP. Unlike in a pre-norm block, the second norm replaces the residual stream (as published)."""

    def __init__(self, config: TransformerConfig, layer: int, attention: nn.Module):
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        drop = config.stochastic_depth * layer / max(1, config.layers - 1)
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = attention
        self.norm2 = nn.LayerNorm(config.width)
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

    def __init__(self, width: int):
        super().__init__()
        self.scores = nn.Linear(width, 1)
        self.normalizer = Softmax(dim=-2)
        self.values = MatMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, M) -> features (B, M)."""
        weights = self.normalizer(self.scores(x))  # (B, N, 1)
        return self.values(weights.transpose(1, 2), x).squeeze(1)


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


class CCT(nn.Module):
    """Tokenizer, position embedding, blocks, norm, sequence pooling, linear head.

    Args:
        config: the architecture. `model.config` keeps it.
        attention: builds the attention of a layer (from 0) in place of the one that `config` names, as a search does.
    """

    def __init__(self, config: CCTConfig, attention: Callable[[CCTConfig, int], nn.Module] = attention_of):
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(config)
        self.position = nn.Parameter(torch.empty(1, config.tokens, config.width))
        self.blocks = nn.Sequential(*(Block(config, layer, attention(config, layer)) for layer in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        self.pool = SequencePool(config.width)
        self.head = nn.Linear(config.width, config.classes)
        initialize(self, position=0.2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, height, width) -> logits (B, classes)."""
        return self.head(self.features(images))  # (B, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, height, width) -> what the head reads, (B, M)."""
        x = self.tokenizer(images) + self.position  # (B, N, M)
        return self.pool(self.norm(self.blocks(x)))  # (B, M)
