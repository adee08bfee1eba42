"""Two-party private inference of a torch model, with CrypTen: the only part of the study that needs it."""

import importlib

from .. import compat

compat.repair()  # before anything imports crypten
import crypten  # noqa: E402, F401  who lacks it learns it here

# Found when they are asked for: a party's process, which imports this package too, starts a third sooner without them.
_HOMES = {
    "EvaluationRun": "evaluation",
    "Link": "network",
    "LINKS": "network",
    "PrivateInferenceError": "launch",
    "Result": "launch",
    "evaluate": "evaluation",
    "infer": "launch",
}

__all__ = ["LINKS", "EvaluationRun", "Link", "PrivateInferenceError", "Result", "evaluate", "infer"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
