"""Private inference of vision transformers, measured: the study's package."""

from .cct import CCT, METHODS, PRESETS, CCTConfig, preset

__version__ = "0.1.0"
__all__ = ["CCT", "METHODS", "PRESETS", "CCTConfig", "preset"]
