"""What stands before the first step: what is trained, what decays, and what is drawn instead of learnt.

Letters in the shape comments: B batch, M dimension of the model.
"""

import torch
from torch import nn

from ..models.blocks import redraw as redraw_all
from .recipe import OPTIMIZERS, Recipe

# What normalisation and selection learn are no weights that decay should shrink: it would pull L2Q towards c = d = 0,
# where it is 0 / 0, and alpha towards external attention, which is the L1 term's work (Eq. 5).
UNDECAYED = ("c", "d", "alpha", "position", "class_token")

# Weights that are drawn at random and not learnt: Performer's features (`blocks.redraw`), Hamburger's first bases.
DRAWN = ("features", "bases")


def prepare(model: nn.Module, recipe: Recipe, frozen: tuple[str, ...], device: torch.device) -> None:
    """Move a network to its device and say which of its parameters are trained.

    Raises:
        ValueError: a frozen name that no parameter has.
    """
    model.to(device)
    if recipe.channels_last:
        model.tokenizer.to(memory_format=torch.channels_last)  # not the whole model: L2Q's c and d have four axes too
    names = {word for name, _ in model.named_parameters() for word in name.split(".")}
    if unknown := set(frozen) - names:
        raise ValueError(f"no parameter is called {', '.join(sorted(unknown))}: it cannot be frozen")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not {*frozen, *DRAWN} & set(name.split(".")))


def optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer; weights decay, what is listed above, biases and norms do not."""
    decayed: list[torch.Tensor] = []
    rest: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.dim() < 2 or name.split(".")[-1] in UNDECAYED  # dim < 2: biases and norms
            (rest if plain and not recipe.decay_all else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return OPTIMIZERS[recipe.optimizer]([group for group in groups if group["params"]], lr=recipe.lr, fused=True)


def redraw(model: nn.Module, seed: int) -> None:
    """New random features (`blocks.redraw`), the same in every process and after every interruption."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        redraw_all(model)


class LogitsAndFeatures(nn.Module):
    """A network that also gives what its head reads, in one forward: DistributedDataParallel must see a single call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, height, width) -> logits (B, classes) and features (B, M).

        What the head of a network that others wrote reads has no name: its logits stand for it.
        """
        if not hasattr(self.model, "features"):
            logits = self.model(images)
            return logits, logits
        features = self.model.features(images)  # (B, M)
        return self.model.head(features), features
