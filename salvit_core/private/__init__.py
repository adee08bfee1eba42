"""Two-party private inference of a torch model, with CrypTen: the only part of the study that needs it.

Who lacks it can import this package, for a `Link` in a record, and learns of it when asking for what runs.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .protocol import Protocol

# Found when they are asked for: a party's process, which imports this package too, starts a third sooner without them.
_HOMES = {
    "Estimate": "estimation",
    "Link": "links",
    "LINKS": "links",
    "PrivateInferenceError": "parties.launch",
    "Result": "parties.launch",
    "Speed": "estimation",
    "estimate": "estimation",
    "evaluate": "evaluation",
    "infer": "parties.launch",
}

__all__ = [
    "LINKS",
    "Estimate",
    "Link",
    "PrivateInferenceError",
    "Result",
    "Speed",
    "estimate",
    "evaluate",
    "infer",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Not imported: a party of `tuned` does without it, and starts sooner.
    if _HOMES[name] != "links" and importlib.util.find_spec("crypten") is None:
        raise ModuleNotFoundError("No module named 'crypten'", name="crypten")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def protocol_of(name: str) -> "Protocol":
    """The protocol of a name of `protocol.PROTOCOLS`; imported when asked for, since only `stock` needs CrypTen."""
    return importlib.import_module(f".{name}", __name__).PROTOCOL
