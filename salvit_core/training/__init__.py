"""Training in the clear: recipe, loop, distillation, checkpoints. Needs torch, and neither CrypTen nor pandas."""

from .evaluation import best_epoch, evaluate
from .loop import fit, progress, train
from .recipe import Recipe, learning_rate, multiplies_bf16

__all__ = ["Recipe", "best_epoch", "evaluate", "fit", "learning_rate", "multiplies_bf16", "progress", "train"]
