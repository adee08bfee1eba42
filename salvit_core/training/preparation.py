"""What stands before the first step: what is trained, what decays, and what is drawn instead of learnt."""

from collections.abc import Sequence

import torch
from torch import nn

from ..models.blocks import redraw as redraw_all
from .recipe import OPTIMIZERS, Recipe

# What normalisation and selection learn are no weights that decay should shrink: it would pull L2Q towards c = d = 0,
# where it is 0 / 0, and alpha towards external attention, which is the L1 term's work (Eq. 5).
UNDECAYED = {"c", "d", "alpha", "position", "class_token"}

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
    held = {name: [word for word in (*frozen, *DRAWN) if f".{word}." in f".{name}."] for name in names_of(model)}
    if unknown := set(frozen) - {word for words in held.values() for word in words}:
        raise ValueError(f"no parameter is called {', '.join(sorted(unknown))}: it cannot be frozen")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not held[name])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("every parameter is frozen: nothing is left to train")


def names_of(model: nn.Module) -> list[str]:
    """The dotted names of a network's parameters."""
    return [name for name, _ in model.named_parameters()]


def others(model: nn.Module, trained: Sequence[str]) -> tuple[str, ...]:
    """What to freeze so that only those parameters are trained that have one of these names, or lie within it."""
    within = [any(f".{part}." in f".{name}." for part in trained) for name in names_of(model)]
    return tuple(name for name, kept in zip(names_of(model), within, strict=True) if not kept)


def optimizer(model: nn.Module, recipe: Recipe) -> "torch.optim.Optimizer | Optimizers":
    """The recipe's optimizer; weights decay, what is listed above, biases and norms do not.

    Raises:
        ValueError: a name for gradient descent that no trained parameter has.
    """
    decayed: list[torch.Tensor] = []
    rest: list[torch.Tensor] = []
    descending: list[torch.Tensor] = []
    met = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            words = [word for word in recipe.sgd if f".{word}." in f".{name}."]
            met |= set(words)
            plain = parameter.dim() < 2 or not UNDECAYED.isdisjoint(name.split("."))  # dim < 2: biases and norms
            group = descending if words else rest if plain and not recipe.decay_all else decayed
            group.append(parameter)
    if unknown := set(recipe.sgd) - met:
        raise ValueError(f"no trained parameter is called {', '.join(sorted(unknown))}: take it out of sgd")
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    made = [OPTIMIZERS[recipe.optimizer](groups, lr=recipe.lr, fused=True)] if groups else []
    made += [torch.optim.SGD(descending, lr=recipe.lr)] if descending else []
    return made[0] if len(made) == 1 else Optimizers(made)


class Optimizers:
    """Several optimizers as one, each with parameters of its own."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict]:
        """Those of all."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """Of all."""
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        """Theirs, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave."""
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)


def redraw(model: nn.Module, seed: int) -> None:
    """New random features (`blocks.redraw`), the same in every process and after every interruption."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        redraw_all(model)
