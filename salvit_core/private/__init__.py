"""Two-party private inference of a torch model, with CrypTen: the only part of the study that needs it."""

from .. import compat

compat.repair()  # before anything imports crypten

from .launch import PrivateInferenceError, Result, infer  # noqa: E402

__all__ = ["PrivateInferenceError", "Result", "infer"]
