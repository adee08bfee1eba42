"""Private inference of vision transformers, measured: the study's package."""

import importlib

from .compat import declare_torchvision_operators
from .models.cct import CCT
from .models.config import PRESETS, CCTConfig, EfficientViTConfig, ViTConfig, config_of, preset
from .models.efficientvit import EfficientViT
from .models.foreign import adopt
from .models.rows import MECHANISMS, METHODS
from .models.vit import ViT, build

declare_torchvision_operators()

__version__ = "0.2.0"
__all__ = [
    "CCT",
    "MECHANISMS",
    "METHODS",
    "PRESETS",
    "CCTConfig",
    "EfficientViT",
    "EfficientViTConfig",
    "ViT",
    "ViTConfig",
    "adopt",
    "build",
    "config_of",
    "cost",
    "preset",
    "private",
    "sas",
]

# Names that stay, wherever their files are; imported when they are asked for, since not everybody has what they need.
_HOMES = {"cost": ".models.cost", "sas": ".search.sas", "private": ".private"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(_HOMES[name], __name__)
