"""Configurations of networks, as plain data: JSON in a record, public to both parties; and presets by name."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeAlias

from ..fields import Among, Checked, Range, Share, Size, shown, whole
from .activations import ACTIVATIONS
from .attention import ATTENTION, SIZED
from .attention.headwise import HEADS
from .normalizers import GRANULARITIES, NORMALIZERS
from .rows import ROWS

LAYERS = Range(1, 1024)
Initial = Annotated[float, Range(-1000.0, 1000.0)]  # (d a + c)^2 of what is larger leaves float32


@dataclass(frozen=True)
class TransformerConfig(Checked):
    """What the configurations of all backbones share.

    `attention` is one name for all layers or one entry per layer; it is kept as one entry per layer. An entry that is
    itself a sequence names "self", "external" or "scaling" for each head (SAS-H). The `l2q_` fields matter only where
    `normalizer` is "l2q". A backbone's own configuration says how many `tokens` there are.

    Raises:
        ValueError: a value of another type or out of range, a name that is not known, or sizes that do not fit
            together.
    """

    image: Size = 32  # side, pixels
    channels: Size = 3
    classes: Size = 10
    layers: Annotated[int, LAYERS] = 7
    width: Size = 256  # M
    heads: Size = 4
    mlp_ratio: Annotated[float, Range(0.0, 64.0, open=True)] = 2.0
    attention: str | tuple[str | tuple[str, ...], ...] = "self"
    normalizer: Annotated[str, Among(*NORMALIZERS)] = "softmax"
    activation: Annotated[str, Among(*ACTIVATIONS)] = "gelu"  # of the MLP
    memory: Size = 64  # S, slots of external attention; what stands for the N tokens in the other mechanisms of `SIZED`
    qkv_bias: ClassVar[bool] = False  # of what makes queries, keys and values
    norm_eps: ClassVar[float] = 1e-5  # of LayerNorm
    l2q_granularity: Annotated[str, Among(*GRANULARITIES)] = "element"
    l2q_learn_c: bool = True
    l2q_learn_d: bool = True
    l2q_initial_c: Initial = 1.0
    l2q_initial_d: Initial = 1.0
    attention_dropout: Share = 0.1
    stochastic_depth: Share = 0.1

    def __post_init__(self):
        super().__post_init__()
        names = (self.attention,) * self.layers if isinstance(self.attention, str) else self.attention
        if not isinstance(names, tuple | list):
            raise ValueError(f"attention is {shown(names)}: give one name for all layers, or one entry per layer")
        names = tuple(tuple(name) if isinstance(name, list) else name for name in names)
        object.__setattr__(self, "attention", names)
        for name in names:
            if isinstance(name, tuple):
                if len(name) != self.heads or not all(isinstance(head, str) and head in HEADS for head in name):
                    raise ValueError(
                        f"attention {shown(name)} must name {' or '.join(HEADS)} for each of {self.heads} heads"
                    )
            elif not isinstance(name, str) or name not in ATTENTION:
                raise ValueError(f"attention {shown(name)} is unknown: choose from {', '.join(ATTENTION)}")
        if len(names) != self.layers:
            raise ValueError(f"attention names {len(names)} layers, the network has {self.layers}: give one per layer")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads: choose one that is")
        if int(self.width * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}: of width {self.width} it leaves the MLP nothing")

    @property
    def tokens(self) -> int:
        """N: the tokens of one image; each backbone says how many."""
        raise TypeError(f"{type(self).__name__} is of no backbone: use CCTConfig or ViTConfig")

    def ignored(self) -> set[str]:
        """The fields that this network does not depend on: L2Q's of another normaliser, slots that nothing has."""
        fields = set()
        if self.normalizer != "l2q":
            fields |= {field.name for field in dataclasses.fields(self) if field.name.startswith("l2q_")}
        if not any(name in SIZED or (isinstance(name, tuple) and "external" in name) for name in self.attention):
            fields |= {"memory"}
        return fields


@dataclass(frozen=True)
class CCTConfig(TransformerConfig):
    """Everything that fixes a CCT's architecture, as plain data: JSON in a record, public to both parties.

    Raises:
        ValueError: as `TransformerConfig`.
    """

    convolutions: Annotated[int, Range(1, 64)] = 1  # each followed by ReLU and a 3x3 max-pool of stride 2
    kernel: Size = 3
    stride: Size = 1

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
        if self.patch < 1 or self.image % self.patch:
            raise ValueError(f"an image of {self.image} pixels is not a multiple of patches of {self.patch}")

    @property
    def tokens(self) -> int:
        """N: the patches of one image, and the class token."""
        return (self.image // self.patch) ** 2 + 1


@dataclass(frozen=True)
class EfficientViTConfig(Checked):
    """Everything that fixes an EfficientViT's architecture (`efficientvit.EfficientViT`), as plain data.

    Raises:
        ValueError: a value of another type or out of range, or sizes that do not fit together.
    """

    image: Size = 224  # side, pixels
    channels: Size = 3
    classes: Size = 1000
    widths: tuple[Size, ...] = (16, 32, 64, 128, 256)  # channels of the stem and of each stage
    # Of the stem's separable convolutions, MBConvs of a stage, or pairs of attention and MBConv after its first MBConv.
    depths: tuple[Annotated[int, LAYERS], ...] = (1, 2, 3, 3, 4)
    attention_stages: Annotated[int, LAYERS] = 2  # how many of the last stages have attention
    head: Size = 16  # D
    head_widths: tuple[Size, ...] = (1536, 1600)  # what is pooled, and between the classifier's two layers
    expand: Annotated[int, Range(1, 64)] = 4  # of MBConv: channels between to channels before
    stem_stride: Annotated[int, Range(1, 2)] = 2

    def __post_init__(self):
        super().__post_init__()
        if len(self.widths) < 2 or len(self.depths) != len(self.widths):
            sizes = f"{len(self.widths)} widths and {len(self.depths)} depths"
            raise ValueError(f"{sizes}: give as many of both, for the stem and for at least one stage")
        if len(self.head_widths) != 2:
            raise ValueError(f"head_widths is {shown(self.head_widths)}: give two numbers")
        if self.attention_stages >= len(self.widths):
            stages = len(self.widths) - 1
            raise ValueError(f"attention_stages is {self.attention_stages}: of {stages} stages give at most {stages}")
        for width in self.widths[-self.attention_stages :]:
            if width % self.head:
                raise ValueError(f"a stage of width {width} is not a multiple of heads of {self.head}: change one")


@dataclass(frozen=True)
class DeiTConfig(ViTConfig):
    """A ViT with what DeiT has besides (Touvron et al., 2021) and timm: biases of Q, K and V, LayerNorm's eps.

    A class of its own: records hold every field of a network's configuration, and those of plain ViTs stay as they are.

    Raises:
        ValueError: as `ViTConfig`.
    """

    qkv_bias: bool = False  # type: ignore[misc]  # of a class here an option
    norm_eps: Annotated[float, Range(0.0, 1.0)] = 1e-5  # type: ignore[misc]

    def ignored(self) -> set[str]:
        """As `TransformerConfig`, and the biases where nothing makes queries, keys or values."""
        queried = any(not isinstance(name, str) or ATTENTION[name].queried for name in self.attention)
        return super().ignored() | (set() if queried else {"qkv_bias"})


Network: TypeAlias = TransformerConfig | EfficientViTConfig  # what fixes a network of ours

DEIT: dict[str, Any] = dict(
    **dict(image=224, patch=16, classes=1000, layers=12, mlp_ratio=4.0),
    **dict(qkv_bias=True, norm_eps=1e-6, attention_dropout=0.0),
)
PRESETS: dict[str, dict[str, Any]] = {
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
    # The geometries of two other systems: MPCViT's on CIFAR, PriViT's ViT-Tiny (peers: without biases of Q, K and V).
    "vit_7_4_32": dict(patch=4, layers=7, width=256, heads=4),
    "vit_tiny_224": dict(image=224, patch=16, classes=200, layers=12, width=192, heads=3, mlp_ratio=4.0),
    # DeiT (Touvron et al., 2021, Table 1), without distillation, exactly: `vit.load_deit` reads its weights.
    "deit_tiny": dict(DEIT, width=192, heads=3),
    "deit_small": dict(DEIT, width=384, heads=6),
    "deit_base": dict(DEIT, width=768, heads=12),
}

# EfficientViTs: convolutions, and attention that is theirs, so that no row of the tables has a say in them.
EFFICIENTVITS: dict[str, dict[str, Any]] = {
    # For tests on 8x8 digits; for two cores on CIFAR-10 and on Imagenette at 64 pixels.
    "efficientvit_test": dict(
        image=8,
        channels=1,
        classes=10,
        widths=(8, 16, 16),
        depths=(1, 1, 1),
        attention_stages=1,
        head=8,
        head_widths=(32, 32),
        stem_stride=1,
    ),
    "efficientvit_micro_32": dict(
        image=32, classes=10, widths=(8, 16, 32, 64), depths=(1, 1, 1, 1), head=8, head_widths=(128, 128), stem_stride=1
    ),
    "efficientvit_micro_64": dict(
        image=64, classes=10, widths=(8, 16, 32, 64), depths=(1, 1, 1, 1), head=8, head_widths=(128, 128)
    ),
    # As published, at 224 pixels; `image` sets another resolution.
    "efficientvit_b0": dict(widths=(8, 16, 32, 64, 128), depths=(1, 2, 2, 2, 2), head_widths=(1024, 1280)),
    "efficientvit_b1": dict(),
    "efficientvit_b2": dict(widths=(24, 48, 96, 192, 384), depths=(1, 3, 4, 4, 6), head=32, head_widths=(2304, 2560)),
    "efficientvit_b3": dict(widths=(32, 64, 128, 256, 512), depths=(1, 4, 6, 6, 9), head=32, head_widths=(2304, 2560)),
}


def config_of(fields: dict) -> Any:
    """A configuration from its fields, such as JSON of one holds.

    It is an EfficientViT's if `widths` is among them, a ViT's if `patch` is (a DeiT's with a field of its own), else a
    CCT's.

    Raises:
        ValueError: unknown field or value.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"fields are {shown(fields)}: give a dict, such as JSON of a configuration holds")
    made: Any = EfficientViTConfig if "widths" in fields else ViTConfig if "patch" in fields else CCTConfig
    if made is ViTConfig and {"qkv_bias", "norm_eps"} & set(fields):
        made = DeiTConfig
    known = {field.name for field in dataclasses.fields(made)}
    if unknown := set(fields) - known:
        names = ", ".join(sorted(shown(name).strip("'") for name in unknown))
        raise ValueError(f"{made.__name__} has no field {names}: choose from {', '.join(sorted(known))}")
    return made(**fields)


def usual(name: str, method: str | None, otherwise: str) -> str | None:
    """The row that is meant where a command names a preset and may leave its method out: an EfficientViT has none."""
    return otherwise if method is None and name not in EFFICIENTVITS else method


def preset(name: str, method: str | None = None, **changes) -> Any:
    """A named configuration, with changes.

    Args:
        name: a key of `PRESETS` or `EFFICIENTVITS`, such as "cct_7_3x1", "vit_tiny" or "efficientvit_b1".
        method: a row of the tables, a key of `METHODS` or `MECHANISMS`, such as "SA softmax" or "Linformer"; none for
            an EfficientViT.
        changes: fields of the configuration to set, such as attention="external" or classes=100.

    Returns:
        a `CCTConfig`, a `ViTConfig` or an `EfficientViTConfig`, whichever `name` is: no type can say it.

    Raises:
        ValueError: unknown name, method, field or value.
    """
    if not isinstance(name, str) or name not in PRESETS | EFFICIENTVITS:
        raise ValueError(f"preset {shown(name)} is unknown: choose from {', '.join(PRESETS | EFFICIENTVITS)}")
    if method is not None and (not isinstance(method, str) or method not in ROWS):
        raise ValueError(f"method {shown(method)} is unknown: choose from {', '.join(ROWS)}")
    if name in EFFICIENTVITS:
        if method is not None:
            raise ValueError(f"{name} is an EfficientViT, whose attention is its own: leave the method out")
        return config_of({"widths": EfficientViTConfig.widths, **EFFICIENTVITS[name], **changes})
    if "patch" in changes and "patch" not in PRESETS[name]:
        raise ValueError(f"{name} is a CCT, which has no field patch")
    fields = {**PRESETS[name], **(ROWS[method] if method else {}), **changes}
    budget, layers = fields.get("attention"), fields.get("layers", TransformerConfig.layers)
    if whole(budget) and whole(layers) and LAYERS.holds(layers):
        if not 0 <= budget <= layers:
            raise ValueError(f"a budget of {budget} self-attention layers: {name} has {layers}")
        fields["attention"] = ("self",) * budget + ("external",) * (layers - budget)
    return config_of(fields)
