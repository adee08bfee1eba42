"""Attention mechanisms by name, one file each; each maps tokens (B, N, M) to tokens (B, N, M)."""

from .cosformer import Cosformer
from .dilated import DilatedAttention
from .external import ExternalAttention
from .hamburger import Hamburger
from .linformer import HeadLinformer, Linformer
from .nystromformer import Nystromformer
from .performer import Performer, ReLUPerformer
from .scaling import ScalingAttention
from .self_attention import SelfAttention
from .soft import Soft
from .standard import StandardAttention

ATTENTION = {
    "self": SelfAttention,
    "external": ExternalAttention,
    "scaling": ScalingAttention,
    "standard": StandardAttention,
    "linformer": Linformer,
    "linformer_heads": HeadLinformer,
    "cosformer": Cosformer,
    "hamburger": Hamburger,
    "soft": Soft,
    "performer": Performer,
    "performer_relu": ReLUPerformer,
    "nystromformer": Nystromformer,
    "dilated": DilatedAttention,
}

# Those that let a set of fixed size stand for the N tokens, and take its size as `memory`.
SIZED = {
    "external",
    "linformer",
    "linformer_heads",
    "hamburger",
    "soft",
    "performer",
    "performer_relu",
    "nystromformer",
}
