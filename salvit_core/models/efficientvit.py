"""EfficientViT (Cai et al., "EfficientViT: multi-scale linear attention", 2023): the softmax-free network of Trio-ViT.

Convolutions, batch norms and hard-swish; in the last stages linear attention, whose kernel is a ReLU, on two scales.
Letters in the shape comments: B batch, C channels, M channels of a stage, H heads, D dimension of a head, N tokens,
which here are the pixels of a stage, side by side in a square.
"""

import math

import torch
from torch import nn

from .blocks import refuse_other_images
from .config import EfficientViTConfig
from .operations import Divide, MatMul, Sum, TokenSum, of_kind


def convolution(
    before: int,
    after: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    norm: bool = True,
    activation: bool = True,
) -> nn.Sequential:
    """A convolution, (B, before, height, width) -> (B, after, height / stride, width / stride), rounded up.

    Args:
        before: channels read.
        after: channels made.
        kernel: side, odd; zeros stand beyond the borders.
        stride: in both directions.
        groups: `after` where it is depth-wise.
        norm: a batch norm follows; without it the convolution has a bias.
        activation: hard-swish follows.
    """
    steps = nn.Sequential()
    steps.conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=not norm)
    if norm:
        steps.norm = nn.BatchNorm2d(after)
    if activation:
        steps.activation = of_kind("activation", nn.Hardswish())
    return steps


def separable(width: int) -> nn.Sequential:
    """A depth-wise separable convolution of the stem, (B, M, height, width) -> the same shape."""
    steps = nn.Sequential()
    steps.depthwise = convolution(width, width, 3, groups=width)
    steps.pointwise = convolution(width, width, activation=False)
    return steps


def mbconv(before: int, after: int, ratio: int, stride: int = 1, norm: bool = True) -> nn.Sequential:
    """MBConv: more channels, a depth-wise convolution, fewer channels.

    Args:
        before: channels read.
        after: channels made.
        ratio: of the channels between to `before`.
        stride: of the depth-wise convolution.
        norm: all three have a batch norm; otherwise the last alone, and the others a bias, as beside attention.
    """
    hidden = before * ratio
    steps = of_kind("MLP", nn.Sequential())
    steps.expand = convolution(before, hidden, norm=norm)
    steps.depthwise = convolution(hidden, hidden, 3, stride, groups=hidden, norm=norm)
    steps.contract = convolution(hidden, after, activation=False)
    return steps


class LiteMSA(nn.Module):
    """Multi-scale linear attention: out_i = relu(q_i) sum_j relu(k_j)^T v_j / sum_j relu(q_i) . relu(k_j) per head.

    The second scale's heads are the first's queries, keys and values, each gathered from its 5x5 neighbours by a
    depth-wise convolution, then a map of the D channels of one head's queries, keys or values. Keys are divided by N,
    which cancels in the quotient and keeps both of its sides small; what keeps the denominator from zero is
    `operations.EPS`, which fixed point holds, and not the published 1e-15 of the sums.

    Cost: O(N D^2) per head.

    Args:
        width: channels M of the stage, a multiple of `head`.
        head: dimension D of a head.
        side: of the picture in pixels, N = side^2.
    """

    kind = "scores"

    def __init__(self, width: int, head: int, side: int):
        super().__init__()
        self.heads, self.head, self.side = 2 * (width // head), head, side  # of both scales
        self.qkv = of_kind("projection", nn.Conv2d(width, 3 * width, 1, bias=False))
        self.aggregate = of_kind("projection", nn.Sequential())
        self.aggregate.depthwise = nn.Conv2d(3 * width, 3 * width, 5, padding=2, groups=3 * width, bias=False)
        self.aggregate.pointwise = nn.Conv2d(3 * width, 3 * width, 1, groups=3 * width // head, bias=False)
        self.kernel = of_kind("normaliser", nn.ReLU())
        self.scores = of_kind("scores", MatMul())
        self.sum = of_kind("normaliser", TokenSum())
        self.denominator = of_kind("normaliser", MatMul())
        self.values = of_kind("values", MatMul())
        # D times E relu(a) relu(b) of independent a, b of variance one.
        self.normalizer = of_kind("normaliser", Divide(scale=head / (2 * math.pi)))
        self.projection = of_kind("projection", convolution(2 * width, width, activation=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, M, side, side) -> the same shape."""
        qkv = self.qkv(x)  # (B, 3 M, side, side)
        qkv = torch.cat([qkv, self.aggregate(qkv)], 1)  # (B, 6 M, side, side)
        heads = qkv.flatten(2).unflatten(1, (self.heads, 3 * self.head)).transpose(-2, -1)  # (B, H, N, 3 D)
        both = self.kernel(heads[..., : 2 * self.head])  # (B, H, N, 2 D)
        query, value = both[..., : self.head], heads[..., 2 * self.head :]  # (B, H, N, D)
        key = both[..., self.head :] * self.side**-2  # (B, H, N, D)
        context = self.scores(key.transpose(-2, -1), value)  # (B, H, D, D)
        denominator = self.denominator(query, self.sum(key).transpose(-2, -1))  # (B, H, N, 1)
        out = self.normalizer(self.values(query, context), denominator)  # (B, H, N, D)
        out = out.transpose(-2, -1).flatten(1, 2).unflatten(-1, (self.side, self.side))  # (B, 2 M, side, side)
        return self.projection(out)


class Residual(nn.Module):
    """Adds what it is given to what the branch makes of it."""

    kind = "MLP"  # of the addition

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, M, height, width) -> the same shape."""
        return x + self.branch(x)


class AveragePool(nn.Module):
    """The mean of every channel over the picture, of more channels than the last stage has.

    Args:
        before: channels read.
        after: channels made and averaged.
        side: of the picture in pixels.
    """

    kind = "pooling"

    def __init__(self, before: int, after: int, side: int):
        super().__init__()
        self.expand = convolution(before, after)
        self.sum, self.side = Sum((-2, -1)), side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, before, height, width) -> features (B, after)."""
        return self.sum(self.expand(x)) * self.side**-2


class EfficientViT(nn.Module):
    """Stem, stages of MBConv, stages of MBConv and attention by turns, pooling, head of two layers.

    Each stage begins with an MBConv of stride 2 and no residual branch. Weights start as torch's modules draw them.

    Args:
        config: the architecture. `model.config` keeps it.
    """

    def __init__(self, config: EfficientViTConfig):
        super().__init__()
        self.config = config
        width, *widths = config.widths
        stem, *depths = config.depths
        self.tokenizer = of_kind("tokenizer", nn.Sequential())
        self.tokenizer.conv = convolution(config.channels, width, 3, config.stem_stride)
        self.tokenizer.separable = nn.Sequential(*(Residual(separable(width)) for _ in range(stem)))
        side = -(-config.image // config.stem_stride)
        blocks: list[nn.Module] = []
        for stage, (after, depth) in enumerate(zip(widths, depths, strict=True)):
            attends = stage >= len(widths) - config.attention_stages
            blocks.append(mbconv(width, after, config.expand, stride=2, norm=not attends))
            width, side = after, -(-side // 2)
            if attends:
                for _ in range(depth):
                    blocks.append(Residual(LiteMSA(width, config.head, side)))
                    blocks.append(Residual(mbconv(width, width, config.expand, norm=False)))
            else:
                blocks += [Residual(mbconv(width, width, config.expand)) for _ in range(depth - 1)]
        self.blocks = nn.Sequential(*blocks)
        pooled, hidden = config.head_widths
        self.pool = AveragePool(width, pooled, side)
        self.head = of_kind("head", nn.Sequential())
        self.head.expand = nn.Linear(pooled, hidden, bias=False)
        self.head.norm = of_kind("LayerNorm", nn.LayerNorm(hidden))
        self.head.activation = of_kind("activation", nn.Hardswish())
        self.head.classify = nn.Linear(hidden, config.classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, height, width) -> logits (B, classes)."""
        return self.head(self.features(images))  # (B, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, height, width) -> what the head reads, (B, head_widths[0])."""
        refuse_other_images(self.config, images)
        return self.pool(self.blocks(self.tokenizer(images)))


def load_published(model: EfficientViT, weights: dict) -> None:
    """Put weights into an EfficientViT: under our names, or those of timm and of the release, in the network's order.

    Args:
        model: of a configuration of the same sizes.
        weights: what a training wrote here, what timm's `state_dict` gives, or what the released checkpoints hold, with
            it as "state_dict".

    Raises:
        ValueError: weights that are not those of this network: each by name, or by shape.
    """
    weights = weights.get("state_dict", weights)
    own = list(model.state_dict())
    if set(weights) != set(own) and len(weights) == len(own):
        weights = dict(zip(own, weights.values(), strict=True))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the weights are not those of this EfficientViT: {reason[:500]}") from error
