"""Attention mechanisms by name, one file each; each maps tokens (B, N, M) to tokens (B, N, M).

Every file of this folder is imported here: a new mechanism is one new file (`mechanism.Mechanism` says what is in it).
"""

import importlib
import pkgutil

from .mechanism import MECHANISMS as ATTENTION

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

# Those that let a set of fixed size stand for the N tokens, and take its size as `memory`.
SIZED = {name for name, mechanism in ATTENTION.items() if mechanism.sized}

__all__ = ["ATTENTION", "SIZED"]
