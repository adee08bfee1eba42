"""Private inference of vision transformers, measured: the study's package."""

from .cct import CCT, MECHANISMS, METHODS, PRESETS, CCTConfig, ViTConfig, config_of, preset
from .vit import ViT, build

__version__ = "0.1.0"
__all__ = [
    "CCT",
    "MECHANISMS",
    "METHODS",
    "PRESETS",
    "CCTConfig",
    "ViT",
    "ViTConfig",
    "build",
    "config_of",
    "preset",
]
