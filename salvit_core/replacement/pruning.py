"""Structured pruning of recurrent replacements: hidden units are driven to zero, masked, and then removed.

A group is all that one hidden unit of one direction of one head reads and writes: the rows of its four gates in W_ih
and in W_hh, its column of W_hh and its column of the projection behind the LSTMs (FAR, arXiv 2505.21535). A unit whose
group is zero changes nothing, so that the network without it computes the same and is smaller.

Letters: B batch, N tokens, D dimension of a head, k hidden size of a cell, that is of one direction of one head.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from ..datasets import Data
from ..fields import Among, Checked, Seed, Share, Weight
from ..models import cost
from ..models.attention.recurrent import MultiLSTM
from ..models.blocks import attention_of
from ..models.cct import CCT
from ..models.config import TransformerConfig
from ..models.vit import ViT
from ..training.evaluation import evaluate
from ..training.preparation import others
from ..training.recipe import Recipe
from .distillation import BLOCKS_STAGE, train_stage

# Of the groups' norms |g| in one layer. Hoyer: l1 over l2, and its square (Yang et al., "DeepHoyer", 2020, Eq. 6 to 8).
REGULARISERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "hoyer_square": lambda norms: norms.sum().square() / norms.square().sum(),
    "hoyer": lambda norms: norms.sum() / norms.square().sum().sqrt(),
    "group": lambda norms: norms.sum(),
}

Kept = tuple[torch.Tensor | None, ...]  # per layer which units stay, (sum of k), cell by cell; None: not recurrent
Hidden = tuple[tuple[tuple[int, int], ...] | None, ...]  # per layer and head, hidden sizes forward and backward


@dataclass(frozen=True)
class Pruning(Checked):
    """How a network with recurrent replacements is pruned, as plain data; published numbers where there are any.

    Attributes:
        regulariser: what drives groups to zero: "hoyer_square", "hoyer" or "group", the sum of their norms.
        coefficient: its weight in the loss.
        threshold: a unit goes whose group has no larger root mean square.
        share: of all units, the weakest, go whatever their size; 0: the threshold alone decides.
        sparsify: how the blocks are trained with the regulariser; None: they are not.
        finetune: how the blocks are trained after it, the pruned units held at zero; None: they are not.
        seed: of both.

    Raises:
        ValueError: a value of another type, unknown or out of range.
    """

    regulariser: Annotated[str, Among(*REGULARISERS)] = "hoyer_square"
    coefficient: Weight = 1e-4
    threshold: Weight = 1e-4
    share: Share = 0.0
    sparsify: Recipe | None = BLOCKS_STAGE
    finetune: Recipe | None = BLOCKS_STAGE
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        for name in ("sparsify", "finetune"):
            if recipe := getattr(self, name):
                # What was driven to zero counts, not the epoch that was best before it was.
                keep = "last" if name == "sparsify" else recipe.keep
                object.__setattr__(self, name, replace(recipe, seed=self.seed, keep=keep))


def prune(run: Pruning, model: nn.Module, data: Data, folder: str | Path | None = None) -> dict:
    """Train towards zero, mask, train what is left, remove what is masked; test after each.

    Args:
        run: how.
        model: a network with "multi_lstm" or "lstm" in some of its layers; it is changed, and ends masked.
        data: the images.
        folder: where checkpoints go, from which a run that was stopped goes on.

    Returns:
        plain data: stages, name to `train`'s result; masked_accuracy (%), right after masking; test_accuracy (%) of the
        smaller network; hidden, its hidden sizes; parameters before and after; sparsity and channels as in their
        functions; and network, the smaller network, not plain data.

    Raises:
        ValueError: nothing in the network can be pruned, or as `training.loop.fit`.
        FloatingPointError: as `training.loop.fit`.
    """
    before = cost.parameters(model.to(data.train.images.device))
    refuse_other_networks(model)
    frozen, stages = others(model, ["blocks"]), {}
    if run.sparsify:
        penalty = GroupPenalty(model, run.regulariser, run.coefficient)
        stages["sparsify"] = train_stage(model, data, run.sparsify, "sparsify", None, frozen, folder, penalty)
    kept = strong(model, run.threshold, run.share)
    handles = mask(model, kept)
    try:
        accuracy = evaluate(model, data.test)["accuracy"]
        if run.finetune:
            stages["finetune"] = train_stage(model, data, run.finetune, "masked", None, frozen, folder)
    finally:
        for handle in handles:
            handle.remove()
    small = remove(model, kept).eval()
    return {
        "stages": stages,
        "masked_accuracy": accuracy,
        "test_accuracy": evaluate(small, data.test)["accuracy"],
        "hidden": hidden(small),
        "parameters_before": before,
        "parameters": cost.parameters(small),
        "sparsity": sparsity(model),
        "channels": channels(model, kept),
        "network": small,
    }


# Groups


def recurrent(model: nn.Module) -> list[MultiLSTM | None]:
    """The prunable attention of every layer, None where a layer has another."""
    return [block.attention if isinstance(block.attention, MultiLSTM) else None for block in model.blocks]


def refuse_other_networks(model: nn.Module) -> None:
    """Refuse a network without a layer that can be pruned, or without a hidden unit in any.

    Raises:
        ValueError: names what its layers have.
    """
    if not isinstance(model, CCT | ViT) or not any(recurrent(model)):
        found = ", ".join(
            dict.fromkeys(map(str, getattr(getattr(model, "config", None), "attention", ["nothing known"])))
        )
        raise ValueError(
            f"attention is {found}: hidden units are pruned of multi_lstm and lstm alone, replace it by one"
        )
    if not any(any(layer.lstm.recurrence.cells) for layer in recurrent(model) if layer is not None):
        raise ValueError("no hidden unit is left: there is nothing to prune")


def cells(attention: MultiLSTM) -> Iterator[tuple[torch.Tensor, ...]]:
    """What is a hidden unit's own, of every cell in order: all views of the weights, none of them copies.

    Yields:
        its rows of W_ih (4, k, D) and their biases (4, k), its rows of W_hh (4, k, k) and biases (4, k), its columns of
        the projection (D, k).
    """
    gates, recurrence = attention.lstm.gates, attention.lstm.recurrence
    u, b = recurrence.matrices(), recurrence.biases()
    heads = zip(gates.matrices(), gates.bias.split(gates.outputs), attention.merge.matrices(), strict=True)
    for head, (rows, biases, columns) in enumerate(heads):
        sizes = recurrence.hidden[head]
        four = [4 * k for k in sizes]
        parts = zip(sizes, rows.split(four), biases.split(four), columns.split(sizes, 1), strict=True)
        for way, (k, w, c, column) in enumerate(parts):
            own = u[2 * head + way].view(4, k, k), b[2 * head + way].view(4, k)
            yield w.view(4, k, w.shape[1]), c.view(4, k), *own, column


def norms(attention: MultiLSTM) -> torch.Tensor:
    """|g| of every hidden unit, cell by cell: (sum of k). W_hh's diagonal, row and column at once, counts twice."""
    return torch.cat([_squares(*cell) for cell in cells(attention)]).clamp_min(1e-30).sqrt()


def scores(attention: MultiLSTM) -> torch.Tensor:
    """The root mean square of every hidden unit's group, (sum of k): never negative, zero only where all of it is."""
    sizes = [(4 * w.shape[2] + 8 * len(column.T) + len(column)) for w, _, _, _, column in cells(attention)]
    counts = [len(column.T) for *_, column in cells(attention)]
    entries = torch.tensor(sizes).repeat_interleave(torch.tensor(counts))
    squares = torch.cat([_squares(*cell) for cell in cells(attention)]).detach()
    return (squares / entries.to(squares)).sqrt()


def _squares(w: torch.Tensor, c: torch.Tensor, u: torch.Tensor, b: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    return w.square().sum((0, 2)) + u.square().sum((0, 2)) + u.square().sum((0, 1)) + column.square().sum(0)


class GroupPenalty:
    """coefficient * sum over layers of a regulariser of the groups' norms, to hand to `fit`.

    Args:
        model: the network that is trained.
        regulariser: a key of `REGULARISERS`.
        coefficient: its weight.
    """

    def __init__(self, model: nn.Module, regulariser: str = "hoyer_square", coefficient: float = 1e-4):
        self.layers = [layer for layer in recurrent(model) if layer is not None and any(layer.lstm.recurrence.cells)]
        self.regulariser, self.coefficient = regulariser, coefficient

    def __call__(self) -> torch.Tensor:
        """The term, a scalar."""
        return self.coefficient * sum(REGULARISERS[self.regulariser](norms(layer)) for layer in self.layers)

    def facts(self) -> dict:
        """The least, the middle and the largest root mean square of a group."""
        found = torch.cat([scores(layer) for layer in self.layers])
        return {"groups": [found.min().item(), found.median().item(), found.max().item()]}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.regulariser}, {self.coefficient})"


# Mask and removal


def strong(model: nn.Module, threshold: float = 1e-4, share: float = 0.0) -> Kept:
    """Which units stay: those above the threshold, without the weakest share of all layers' units."""
    found = [None if layer is None else scores(layer) for layer in recurrent(model)]
    every = torch.cat([each for each in found if each is not None])
    if count := int(share * len(every)):
        threshold = max(threshold, every.sort().values[count - 1].item())
    return tuple(None if each is None else each > threshold for each in found)


def mask(model: nn.Module, kept: Kept) -> list[Any]:
    """Set what is pruned to zero, and hold it there: its gradients are masked until the handles are removed.

    Every parameter has the mask of its own places; that of W_hh has a pruned unit's rows and its columns.

    Returns:
        handles of the hooks.
    """
    handles = []
    for attention, stays in zip(recurrent(model), kept, strict=True):
        if attention is None:
            continue
        _drop(attention, stays)
        for parameter, ones in zip(attention.parameters(), masks(attention, stays), strict=True):
            parameter.requires_grad_(True)  # a stage before may have frozen it
            handles.append(parameter.register_hook(lambda grad, ones=ones: grad * ones))
    return handles


def masks(attention: MultiLSTM, stays: torch.Tensor) -> list[torch.Tensor]:
    """For every parameter of a layer ones, and zeros where a pruned unit's are."""
    ones = copy.deepcopy(attention)
    with torch.no_grad():
        for parameter in ones.parameters():
            parameter.fill_(1.0)
    _drop(ones, stays)
    return [parameter.detach() for parameter in ones.parameters()]


def _drop(attention: MultiLSTM, stays: torch.Tensor) -> None:
    with torch.no_grad():
        for (w, c, u, b, column), gone in zip(cells(attention), _by_cell(attention, ~stays), strict=True):
            w[:, gone], c[:, gone], b[:, gone] = 0.0, 0.0, 0.0
            u[:, gone], u[:, :, gone] = 0.0, 0.0
            column[:, gone] = 0.0


def _by_cell(attention: MultiLSTM, units: torch.Tensor) -> Sequence[torch.Tensor]:
    return units.split(attention.lstm.recurrence.cells)


def hidden(model: nn.Module) -> Hidden:
    """The hidden sizes of every layer and head, forward and backward: with the configuration all that a network is."""
    return tuple(None if layer is None else layer.lstm.recurrence.hidden for layer in recurrent(model))


def shaped(config: TransformerConfig, sizes: Sequence) -> nn.Module:
    """The network of a configuration with these hidden sizes (`hidden`), as tuples or as JSON has them.

    Raises:
        ValueError: sizes that do not fit the configuration.
    """
    if len(sizes) != config.layers:
        raise ValueError(f"hidden sizes of {len(sizes)} layers: the network has {config.layers}")

    def attention(config: TransformerConfig, layer: int) -> nn.Module:
        made = attention_of(config, layer)
        if sizes[layer] is None or not isinstance(made, MultiLSTM):
            return made
        return type(made)(config, [tuple(pair) for pair in sizes[layer]])

    return (ViT if hasattr(config, "patch") else CCT)(config, attention)  # type: ignore[arg-type]


def remove(model: nn.Module, kept: Kept) -> nn.Module:
    """A network without the pruned units: it computes what the masked one does.

    Args:
        model: the network; it is not changed.
        kept: which units stay.
    """
    layers = recurrent(model)
    sizes: list[tuple | None] = []
    for attention, stays in zip(layers, kept, strict=True):
        if attention is None:
            sizes.append(None)
            continue
        counts = [int(part.sum()) for part in _by_cell(attention, stays)]
        sizes.append(tuple(zip(counts[::2], counts[1::2], strict=True)))
    small = shaped(model.config, sizes).to(next(model.parameters()).device)
    ours, theirs = small.state_dict(), model.state_dict()
    small.load_state_dict({name: theirs[name] for name in ours if ours[name].shape == theirs[name].shape}, strict=False)
    with torch.no_grad():
        for attention, stays, less in zip(layers, kept, recurrent(small), strict=True):
            if attention is None or less is None:
                continue
            less.merge.bias.copy_(attention.merge.bias)
            pairs = zip(cells(attention), cells(less), _by_cell(attention, stays), strict=True)
            for (w, c, u, b, column), new, stay in pairs:
                parts = w[:, stay], c[:, stay], u[:, stay][:, :, stay], b[:, stay], column[:, stay]
                for place, part in zip(new, parts, strict=True):
                    place.copy_(part)
    return small.train(model.training)


# What is said of it


def sparsity(model: nn.Module) -> list[dict]:
    """How much of each layer's matrices is zero, in per cent.

    Returns:
        rows of layer (from 1), matrix ("input", W_ih; "recurrent", W_hh; "projection"), element (zero entries), input
        (inputs that nothing reads) and output (outputs that read nothing).
    """
    rows = []
    for layer, attention in enumerate(recurrent(model), 1):
        if attention is None:
            continue
        blocks = {
            "input": attention.lstm.gates.matrices(),
            "recurrent": attention.lstm.recurrence.matrices(),
            "projection": attention.merge.matrices(),
        }
        for name, matrices in blocks.items():
            empty = {
                "element": [(matrix == 0).flatten() for matrix in matrices],
                "input": [(matrix == 0).all(0) for matrix in matrices],
                "output": [(matrix == 0).all(1) for matrix in matrices],
            }
            joined = {part: torch.cat(found).double() for part, found in empty.items()}
            shares = {part: 100 * found.mean().item() if len(found) else 0.0 for part, found in joined.items()}
            rows.append({"layer": layer, "matrix": name, **shares})
    return rows


def channels(model: nn.Module, kept: Kept) -> list[dict]:
    """How many hidden units each head loses: rows of layer, head (from 1), direction, hidden (before), pruned."""
    return [
        {
            **{"layer": layer, "head": cell // 2 + 1, "direction": ("forward", "backward")[cell % 2]},
            **{"hidden": len(stays), "pruned": int((~stays).sum())},
        }
        for layer, (attention, units) in enumerate(zip(recurrent(model), kept, strict=True), 1)
        if attention is not None
        for cell, stays in enumerate(_by_cell(attention, units))
    ]
