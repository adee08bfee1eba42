"""Two-party private inference of a torch model, with CrypTen: the only part of the study that needs it."""

from .. import compat

compat.repair()  # before anything imports crypten

from .evaluate import EvaluationRun, evaluate  # noqa: E402
from .launch import PrivateInferenceError, Result, infer  # noqa: E402
from .network import LINKS, Link  # noqa: E402

__all__ = ["LINKS", "EvaluationRun", "Link", "PrivateInferenceError", "Result", "evaluate", "infer"]
