"""The training loop, visible: an epoch of steps, a validation, a checkpoint; and training to the end with one test.

Letters in the shape comments: B batch, M dimension of the model.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from .. import datasets, workspace
from .checkpoint import described, not_finite, resume, save, seed_all
from .checkpoint import identity as identity_of
from .distillation import Watched, check_teacher, losses, places
from .evaluation import best_epoch, evaluate
from .preparation import optimizer as optimizer_of
from .preparation import prepare, redraw
from .processes import process, summed
from .recipe import Recipe, autocast, learning_rate, multiplies_bf16


class Penalty(Protocol):
    """A term of the loss that is no part of the network, such as a search's on its alphas."""

    def __call__(self) -> torch.Tensor:
        """The term, a scalar."""

    def facts(self) -> dict:
        """What joins each epoch's facts."""


def fit(
    model: nn.Module,
    data: "datasets.Data",
    recipe: Recipe,
    teacher: nn.Module | None = None,
    penalty: Penalty | None = None,
    checkpoint: str | Path | None = None,
    frozen: tuple[str, ...] = (),
) -> Iterator[dict]:
    """Train epoch by epoch; exhausted, the model holds the weights that `recipe.keep` names.

    A checkpoint is written after every epoch. Where one exists already, its epochs are yielded first and training goes
    on after them as if it had never stopped: bit for bit on a CPU. Seeds the global random generators. Under torchrun
    every process computes its slice of each batch.

    Args:
        model: the network; it is moved to the data's device, and every parameter not frozen is trained. What mechanisms
            draw at random (`DRAWN`) is not; what has a `redraw` is drawn anew before every epoch.
        data: the images; `data.train` is fitted and `data.validation` measured, `data.test` is not touched.
        recipe: how.
        teacher: a trained network to distil from; needed exactly where the recipe distils. It is moved to the data's
            device and set to evaluation.
        penalty: a term added to the loss; its repr tells runs apart.
        checkpoint: file to write, and to resume from.
        frozen: parameters that stay as they are: those whose dotted name is one of these or holds it as a part, such as
            "alpha" or "blocks.0.mlp".

    Yields:
        one dict of plain data per epoch: epoch (from 0), lr; loss and its parts (cross_entropy, distill_logits,
        distill_features, distill_blocks, distill_attention, penalty), each a mean over the epoch's images;
        validation_loss, validation_accuracy (%); seconds of the whole epoch, images_per_second of its training steps;
        and the penalty's facts.

    Raises:
        ValueError: a checkpoint of another run, a teacher that does not fit, or a frozen name that is not there.
        OSError: the checkpoint could not be written, or cannot be read.
        FloatingPointError: the loss is no longer a number; names epoch and step (an accelerator is asked only every
            50 steps, and may be that late). Or the validation loss or a weight is not, at the end of an epoch; the
            checkpoint is that of the epoch before.
    """
    if checkpoint is not None and not Path(checkpoint).name:
        raise ValueError(f"checkpoint is {str(checkpoint)!r}: name a file, such as run.pt, or give None")
    rank, world = process()
    device = data.train.images.device
    identity = identity_of(model, data, recipe, teacher, penalty, frozen)
    prepare(model, recipe, frozen, device)
    check_teacher(model, recipe, teacher)
    optimizer = optimizer_of(model, recipe)
    generator = torch.Generator().manual_seed(recipe.seed)  # the same batches in every process
    seed_all(recipe.seed + rank)  # but each process drops out on its own
    history: list[dict] = []
    best: dict | None = None
    if checkpoint is not None and not rank:
        workspace.try_out(Path(checkpoint))
    if checkpoint is not None and Path(checkpoint).exists():
        history, best = resume(Path(checkpoint), identity, model, optimizer, generator)
        yield from [dict(facts) for facts in history]
    watched = places(model, recipe, teacher)
    taught = None if teacher is None else Watched(teacher, watched)
    network = Watched(model, watched)
    network = DistributedDataParallel(network) if world > 1 else network
    network = torch.compile(network) if recipe.compile else network

    for epoch in range(len(history), recipe.epochs):
        start, seen = time.perf_counter(), 0
        totals: dict[str, torch.Tensor] = {}
        lr = learning_rate(recipe, epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        redraw(model, recipe.seed + epoch)
        model.train()
        share = (rank, world)
        batches = datasets.batches(data.train, recipe.batch, recipe.augment, generator, part=share, erase=recipe.erase)
        for step, (images, labels) in enumerate(batches):  # this process's (B, C, height, width), (B,)
            whole = min(recipe.batch, len(data.train.labels) - seen)  # images of all processes
            with autocast(recipe.bf16, device):
                outputs = network(images)  # (B, classes), (B, M), and what is compared with the teacher's
            sums = losses(recipe, outputs, labels, images, taught)
            loss = world * sum(sums.values()) / whole  # processes are averaged: the mean over the whole batch
            if penalty is not None:
                term = penalty()
                loss, sums["penalty"] = loss + term, term * len(labels)
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            seen += whole
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value.detach().double()
            if device.type == "cpu" or step % 50 == 0:  # reading a number makes an accelerator wait
                _stop_if_not_finite(totals, epoch, step)
        _stop_if_not_finite(totals, epoch, step)
        means = dict(zip(totals, (summed(torch.stack([*totals.values()])) / seen).tolist(), strict=True))
        trained = time.perf_counter()
        validation = evaluate(model, data.validation, recipe.batch, recipe.bf16)
        facts = {"epoch": epoch, "lr": lr, "loss": sum(means.values()), **means}
        facts |= {f"validation_{name}": value for name, value in validation.items()}
        facts |= {"seconds": time.perf_counter() - start, "images_per_second": seen / (trained - start)}
        facts |= penalty.facts() if penalty is not None else {}
        _stop_if_lost(facts, model, epoch)
        history.append(facts)
        if recipe.keep == "best" and best_epoch(history) == epoch:
            best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        if checkpoint is not None:
            save(Path(checkpoint), identity, model, optimizer, generator, history, best)
        yield dict(facts)

    if best is not None:
        model.load_state_dict(best)


def train(
    model: nn.Module,
    data: "datasets.Data",
    recipe: Recipe,
    teacher: nn.Module | None = None,
    penalty: Penalty | None = None,
    checkpoint: str | Path | None = None,
    frozen: tuple[str, ...] = (),
    label: str = "training",
) -> dict:
    """`fit` to its end with a progress bar, then one look at the test images.

    Args:
        model: the network, which ends with the weights that `recipe.keep` names.
        data: the images.
        recipe: how.
        teacher: as in `fit`.
        penalty: as in `fit`.
        checkpoint: as in `fit`.
        frozen: as in `fit`.
        label: what the progress bar is called.

    Returns:
        plain data: history (`fit`'s dicts), best_epoch (whose weights were kept, from 0), validation_accuracy and
        validation_loss of that epoch, test_accuracy and test_top5 (%), test_loss, seconds (of all epochs, over all
        interruptions), bf16 (whether it was used), parameters, config, recipe, data (its name).

    Raises:
        ValueError: as `fit`.
        FloatingPointError: as `fit`.
    """
    history = list(progress(fit(model, data, recipe, teacher, penalty, checkpoint, frozen), recipe, label))
    kept = best_epoch(history) if recipe.keep == "best" else len(history) - 1
    test = evaluate(model, data.test, recipe.batch, recipe.bf16)
    if not math.isfinite(test["loss"]):
        raise FloatingPointError(f"test_loss is {test['loss']} with the weights of epoch {kept} (from 0): {_REMEDY}")
    return {
        "history": history,
        "best_epoch": kept,
        "validation_accuracy": history[kept]["validation_accuracy"],
        "validation_loss": history[kept]["validation_loss"],
        "test_accuracy": test["accuracy"],
        "test_top5": test["top5"],
        "test_loss": test["loss"],
        "seconds": sum(facts["seconds"] for facts in history),
        "bf16": recipe.bf16 and multiplies_bf16(data.test.images.device),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "config": described(model),
        "recipe": dataclasses.asdict(recipe),
        "data": data.name,
    }


def progress(epochs: Iterable[dict], recipe: Recipe, label: str) -> Iterator[dict]:
    """Pass `fit`'s epochs through with a progress bar, in a terminal or a notebook; silently elsewhere."""
    notebook = "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None
    quiet = process()[0] > 0 or not (sys.stderr.isatty() or notebook)
    with tqdm(total=recipe.epochs, desc=label, unit="epoch", disable=quiet) as bar:
        for facts in epochs:
            bar.set_postfix_str(f"loss {facts['loss']:.3f}, validation {facts['validation_accuracy']:.2f} %", False)
            bar.update()
            yield facts


def _stop_if_lost(facts: dict, model: nn.Module, epoch: int) -> None:
    """Steps may all have a finite loss, and the last one leave weights that are none."""
    for name in ("loss", "validation_loss"):
        if not math.isfinite(facts[name]):
            raise FloatingPointError(f"{name} is {facts[name]} after epoch {epoch} (from 0): {_REMEDY}")
    if name := not_finite(model):
        raise FloatingPointError(f"weight {name} is not finite after epoch {epoch} (from 0): {_REMEDY}")


_REMEDY = "lower lr, set clip, or turn bf16 off"


def _stop_if_not_finite(totals: dict[str, torch.Tensor], epoch: int, step: int) -> None:
    for name, total in totals.items():
        if not math.isfinite(value := float(total)):
            raise FloatingPointError(f"{name} is {value} at epoch {epoch}, step {step} (from 0): {_REMEDY}")
