"""Attention mechanisms by name, one file each; each maps tokens (B, N, M) to tokens (B, N, M)."""

from .external import ExternalAttention
from .scaling import ScalingAttention
from .self_attention import SelfAttention

ATTENTION = {"self": SelfAttention, "external": ExternalAttention, "scaling": ScalingAttention}

# Those that let a set of fixed size stand for the N tokens, and take its size as `memory`.
SIZED = {"external"}
