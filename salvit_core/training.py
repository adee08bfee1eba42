"""Training: the recipe, the loop, distillation, checkpoint and resume, and a command line for runs without a notebook.

    python -m salvit_core.training --preset cct_2_3x1 --method "SA L2Q" --data digits --epochs 20 --batch 64 --lr 2e-3
    torchrun --nproc-per-node 2 -m salvit_core.training --preset cct_7_3x1 --data cifar10 --epochs 600

Letters in the shape comments: B batch, M dimension of the model.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import pickle
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from . import data as datasets
from . import records
from .cct import CCT, PRESETS, ROWS, preset, redraw
from .vit import build

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}

# What normalisation and selection learn are no weights that decay should shrink: it would pull L2Q towards c = d = 0,
# where it is 0 / 0, and alpha towards external attention, which is the L1 term's work (Eq. 5).
UNDECAYED = ("c", "d", "alpha", "position", "class_token")

# Weights that mechanisms draw at random and none learns: Performer's features (`cct.redraw`), Hamburger's first bases.
DRAWN = ("features", "bases")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, as plain data; the defaults are the paper's for CIFAR (Section 4; facts: training).

    But for the optimizer: AdamW, as in the released code, where the paper names Adam.

    Raises:
        ValueError: a value that is unknown or out of range.
    """

    epochs: int = 600
    batch: int = 256  # images per step, over all processes
    lr: float = 6e-4
    optimizer: str = "adamw"  # "adam" couples weight decay to the gradient
    weight_decay: float = 0.06
    decay_all: bool = False  # decay biases, norms, positions, c, d and alpha too, as the released code does
    warmup: int = 10  # epochs; never more than a fifth of them all
    label_smoothing: float = 0.1
    augment: str = "autoaugment"  # "none", "crop" or "autoaugment"
    clip: float = 0.0  # largest norm of the gradient; 0: any
    distill_logits: float = 0.0  # weight of the teacher's logits in the loss
    distill_features: float = 0.0  # weight of the teacher's last features
    temperature: float = 4.0  # of both softmaxes where logits are distilled
    keep: str = "best"  # whose weights the model ends with: "best", the epoch best in validation, or "last"
    bf16: bool = False  # autocast to bfloat16 where the device multiplies in it (`multiplies_bf16`)
    channels_last: bool = False  # memory order of the tokenizer's convolutions
    compile: bool = False  # torch.compile
    seed: int = 0  # of batches, augmentation, dropout and stochastic depth

    def __post_init__(self):
        for name, known in (("optimizer", OPTIMIZERS), ("keep", ("best", "last"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown: choose from {', '.join(known)}")
        for name, least in (("epochs", 1), ("batch", 1), ("warmup", 0), ("clip", 0.0), ("weight_decay", 0.0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}: give {least} or more")
        for name in ("lr", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bfloat16.

    An accelerator is taken to have them. Of processors, those with AVX-512 BF16 or AMX do; one that has to imitate them
    (AVX2, AMD EPYC) trains seven times slower than in float32.
    """
    if device.type != "cpu":
        return True
    found = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.11
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _autocast(wanted: bool, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and multiplies_bf16(device))


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """The learning rate of an epoch (from 0): lr / (warmup - epoch) while warming up, then half a cosine towards 0."""
    warmup = min(recipe.warmup, recipe.epochs // 5)
    if epoch < warmup:
        return recipe.lr / (warmup - epoch)
    return recipe.lr * (1 + math.cos(math.pi * (epoch - warmup) / (recipe.epochs - warmup))) / 2


def fit(
    model: CCT,
    data: "datasets.Data",
    recipe: Recipe,
    teacher: CCT | None = None,
    penalty: Callable[[], torch.Tensor] | None = None,
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
        penalty: a term added to the loss; its `facts()`, a dict, join each epoch's, its repr tells runs apart.
        checkpoint: file to write, and to resume from.
        frozen: parameters that stay as they are: those with one of these words in their dotted name, such as "alpha".

    Yields:
        one dict of plain data per epoch: epoch (from 0), lr; loss and its parts (cross_entropy, distill_logits,
        distill_features, penalty), each a mean over the epoch's images; validation_loss, validation_accuracy (%);
        seconds of the whole epoch, images_per_second of its training steps; and the penalty's facts.

    Raises:
        ValueError: a checkpoint of another run, a teacher that does not fit, or a frozen name that is not there.
        FloatingPointError: the loss is no longer a number; names epoch and step (an accelerator is asked only every
            50 steps, and may be that late).
    """
    rank, world = _process()
    device = data.train.images.device
    identity = _identity(model, data, recipe, teacher, penalty, frozen)
    _prepare(model, recipe, frozen, device)
    _check_teacher(model, recipe, teacher)
    optimizer = _optimizer(model, recipe)
    generator = torch.Generator().manual_seed(recipe.seed)  # the same batches in every process
    _seed(recipe.seed + rank)  # but each process drops out on its own
    history, best = [], None
    if checkpoint is not None and Path(checkpoint).exists():
        history, best = _resume(Path(checkpoint), identity, model, optimizer, generator)
        yield from [dict(facts) for facts in history]
    network = _LogitsAndFeatures(model)
    network = DistributedDataParallel(network) if world > 1 else network
    network = torch.compile(network) if recipe.compile else network

    for epoch in range(len(history), recipe.epochs):
        start, seen, totals = time.perf_counter(), 0, {}
        lr = learning_rate(recipe, epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        _redraw(model, recipe.seed + epoch)
        model.train()
        batches = datasets.batches(data.train, recipe.batch, data.mean, data.std, recipe.augment, generator)
        for step, (images, labels) in enumerate(batches):
            whole = len(labels)
            images, labels = images[rank::world], labels[rank::world]  # (B, C, height, width), (B,)
            with _autocast(recipe.bf16, device):
                outputs = network(images)  # (B, classes), (B, M)
            sums = _losses(recipe, outputs, labels, images, teacher)
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
        means = dict(zip(totals, (_summed(torch.stack([*totals.values()])) / seen).tolist(), strict=True))
        trained = time.perf_counter()
        validation = evaluate(model, data.validation, data.mean, data.std, recipe.batch, recipe.bf16)
        facts = {"epoch": epoch, "lr": lr, "loss": sum(means.values()), **means}
        facts |= {f"validation_{name}": value for name, value in validation.items()}
        facts |= {"seconds": time.perf_counter() - start, "images_per_second": seen / (trained - start)}
        facts |= penalty.facts() if penalty is not None else {}
        history.append(facts)
        if recipe.keep == "best" and best_epoch(history) == epoch:
            best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        if checkpoint is not None:
            _save(Path(checkpoint), identity, model, optimizer, generator, history, best)
        yield dict(facts)

    if best is not None:
        model.load_state_dict(best)


def train(
    model: CCT,
    data: "datasets.Data",
    recipe: Recipe,
    teacher: CCT | None = None,
    penalty: Callable[[], torch.Tensor] | None = None,
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
    test = evaluate(model, data.test, data.mean, data.std, recipe.batch, recipe.bf16)
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
        "config": dataclasses.asdict(model.config),
        "recipe": dataclasses.asdict(recipe),
        "data": data.name,
    }


def evaluate(
    model: nn.Module,
    split: "datasets.Split",
    mean: object,
    std: object,
    batch: int = 256,
    bf16: bool = False,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy (%) and mean cross-entropy of a split, without augmentation; processes share the work.

    Args:
        model: maps images (B, C, height, width) to logits (B, classes); its training flag is put back.
        split: the images, on the model's device.
        mean: as `data.mean`, for normalisation.
        std: as `data.std`, for normalisation.
        batch: images at a time.
        bf16: autocast to bfloat16 where the device multiplies in it.

    Raises:
        ValueError: the split is empty.
    """
    if not len(split.labels):
        raise ValueError("the split to evaluate holds no images: load the data with a larger share for it")
    rank, world = _process()
    training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=split.images.device)  # right, among the best five, loss
    with torch.inference_mode(), _autocast(bf16, split.images.device):
        for images, labels in datasets.batches(split, batch, mean, std):
            images, labels = images[rank::world], labels[rank::world]
            logits = model(images).float()  # (B, classes)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
            totals += torch.stack([(logits.argmax(1) == labels).sum(), best.sum(), loss])
    model.train(training)
    right, among, loss = (_summed(totals) / len(split.labels)).tolist()
    return {"loss": loss, "accuracy": 100 * right, "top5": 100 * among}


def best_epoch(history: list[dict]) -> int:
    """The epoch (from 0) of highest validation accuracy, among equals of lowest validation loss, then the first."""
    return max(range(len(history)), key=lambda i: (history[i]["validation_accuracy"], -history[i]["validation_loss"]))


def progress(epochs: Iterable[dict], recipe: Recipe, label: str) -> Iterator[dict]:
    """Pass `fit`'s epochs through with a progress bar, in a terminal or a notebook; silently elsewhere."""
    notebook = "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None
    quiet = _process()[0] > 0 or not (sys.stderr.isatty() or notebook)
    with tqdm(total=recipe.epochs, desc=label, unit="epoch", disable=quiet) as bar:
        for facts in epochs:
            bar.set_postfix_str(f"loss {facts['loss']:.3f}, validation {facts['validation_accuracy']:.2f} %", False)
            bar.update()
            yield facts


# The parts of an epoch


def _redraw(model: nn.Module, seed: int) -> None:
    """New random features (`cct.redraw`), the same in every process and after every interruption."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        redraw(model)


class _LogitsAndFeatures(nn.Module):
    """A network that also gives what its head reads, in one forward: DistributedDataParallel must see a single call."""

    def __init__(self, model: CCT):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.model.features(images)  # (B, M)
        return self.model.head(features), features


def _losses(
    recipe: Recipe,
    outputs: tuple[torch.Tensor, torch.Tensor],
    labels: torch.Tensor,
    images: torch.Tensor,
    teacher: CCT | None,
) -> dict[str, torch.Tensor]:
    """The loss in named parts, each weighted and summed over the images of this process."""
    logits, features = outputs[0].float(), outputs[1].float()
    smoothing = recipe.label_smoothing
    sums = {"cross_entropy": F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)}
    if teacher is None:
        return sums
    with torch.no_grad(), _autocast(recipe.bf16, images.device):
        target_features = teacher.features(images)
        target = teacher.head(target_features).float()
    if recipe.distill_logits:
        t = recipe.temperature
        divergence = F.kl_div(
            F.log_softmax(logits / t, 1), F.log_softmax(target / t, 1), reduction="sum", log_target=True
        )
        sums["distill_logits"] = recipe.distill_logits * t**2 * divergence  # t^2: gradients as large as the others'
    if recipe.distill_features:
        difference = F.mse_loss(features, target_features.float(), reduction="sum") / features.shape[1]
        sums["distill_features"] = recipe.distill_features * difference
    return sums


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    decayed, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.dim() < 2 or name.split(".")[-1] in UNDECAYED  # dim < 2: biases and norms
            (rest if plain and not recipe.decay_all else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return OPTIMIZERS[recipe.optimizer]([group for group in groups if group["params"]], lr=recipe.lr, fused=True)


def _prepare(model: CCT, recipe: Recipe, frozen: tuple[str, ...], device: torch.device) -> None:
    model.to(device)
    if recipe.channels_last:
        model.tokenizer.to(memory_format=torch.channels_last)  # not the whole model: L2Q's c and d have four axes too
    names = {word for name, _ in model.named_parameters() for word in name.split(".")}
    if unknown := set(frozen) - names:
        raise ValueError(f"no parameter is called {', '.join(sorted(unknown))}: it cannot be frozen")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not {*frozen, *DRAWN} & set(name.split(".")))


def _check_teacher(model: CCT, recipe: Recipe, teacher: CCT | None) -> None:
    distills = recipe.distill_logits or recipe.distill_features
    if bool(distills) != (teacher is not None):
        what = "no teacher is given" if distills else "a teacher is given"
        raise ValueError(
            f"{what} and distill_logits is {recipe.distill_logits}, distill_features {recipe.distill_features}: "
            "distilling needs a teacher and a weight above 0"
        )
    if teacher is None:
        return
    teacher.to(next(model.parameters()).device).eval()
    for name, weight, size in (
        ("classes", recipe.distill_logits, "out_features"),
        ("width", recipe.distill_features, "in_features"),
    ):
        theirs, ours = getattr(teacher.head, size), getattr(model.head, size)
        if weight and theirs != ours:
            raise ValueError(f"the teacher's {name} is {theirs}, the model's {ours}: distil from a teacher of the same")


def _stop_if_not_finite(totals: dict[str, torch.Tensor], epoch: int, step: int) -> None:
    for name, total in totals.items():
        if not math.isfinite(value := float(total)):
            raise FloatingPointError(
                f"{name} is {value} at epoch {epoch}, step {step} (from 0): lower lr, set clip, or turn bf16 off"
            )


# Several processes


def _process() -> tuple[int, int]:
    """This process's rank and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


# Checkpoints


def _digest(*tensors: torch.Tensor) -> str:
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()[:12]


def _identity(model, data, recipe, teacher, penalty, frozen) -> dict:
    """What must agree for a checkpoint to be continued, as flat plain data."""
    return {
        "data": data.name,
        "training labels": _digest(data.train.labels),  # another split, or another order, is another run
        "network": type(model).__name__,
        **dataclasses.asdict(model.config),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **dataclasses.asdict(recipe),
        "teacher": None if teacher is None else _digest(*teacher.state_dict().values()),
        "penalty": None if penalty is None else repr(penalty),
        "frozen": tuple(frozen),
    }


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _random_states(generator: torch.Generator) -> dict:
    name, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "batches": generator.get_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_states(states: dict, generator: torch.Generator) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    generator.set_state(states["batches"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _save(path: Path, identity, model, optimizer, generator, history, best) -> None:
    rank, world = _process()
    states = [_random_states(generator)]
    if world > 1:
        states = [None] * world
        dist.all_gather_object(states, _random_states(generator))
    if rank:
        return
    content = {
        "identity": identity,
        "epoch": history[-1]["epoch"],
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": states,
        "history": history,
        "best": best,
    }
    records.write(path, lambda file: torch.save(content, file))


def _resume(path: Path, identity, model, optimizer, generator) -> tuple[list[dict], dict | None]:
    """Put model, optimizer and random generators where the checkpoint left them; its history and best weights."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["identity"]
    except (OSError, EOFError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a checkpoint of this program ({type(error).__name__}): delete it") from error
    for name in {**found, **identity}:
        if found.get(name) != identity.get(name):
            raise ValueError(
                f"checkpoint {path} is of another run: its {name} is {found.get(name)!r}, here {identity.get(name)!r}; "
                "name another file or delete this one"
            )
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    rank = _process()[0]
    if rank < len(content["random"]):
        _set_random_states(content["random"][rank], generator)
    else:  # more processes than before: a new one needs the batches' state all the same
        generator.set_state(content["random"][0]["batches"])
    return content["history"], content["best"]


# The command line


def main(arguments: list[str] | None = None) -> None:
    """Train one network and write OUT/checkpoint.pt and OUT/result.json; run again, it goes on where it was.

    Args:
        arguments: the command line; sys.argv where None.
    """
    parser = argparse.ArgumentParser("python -m salvit_core.training", description=main.__doc__.splitlines()[0])
    parser.add_argument("--preset", default="cct_7_3x1", choices=PRESETS)
    parser.add_argument("--method", default="SA softmax", help=f"one of: {', '.join(ROWS)}")
    parser.add_argument("--data", default="auto", help="a data set's name")
    parser.add_argument("--root", default="data", help="folder of the data sets")
    parser.add_argument("--protocol", default="held-out", help="how the validation split is drawn")
    parser.add_argument("--image", type=int, help="side in pixels to resize to (default: as they are)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder of the results (default: data/runs/training/ and a name)")
    for field in dataclasses.fields(Recipe):
        flag = f"--{field.name.replace('_', '-')}"
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(field.default, bool) else {"type": field.type}
        parser.add_argument(flag, default=field.default, help=f"default {field.default}", **kind)
    options = parser.parse_args(arguments)
    try:
        if "LOCAL_RANK" in os.environ:  # started by torchrun
            if options.device == "cuda":
                options.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(options.device)
            dist.init_process_group("nccl" if options.device.startswith("cuda") else "gloo")
        _main(options)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _main(options: argparse.Namespace) -> None:
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe)})
    data = datasets.load(options.data, options.root, options.device, protocol=options.protocol, image=options.image)
    _, channels, _, side = data.train.images.shape
    config = preset(options.preset, options.method, image=side, channels=channels, classes=data.classes)
    name = f"{options.preset} {options.method} {data.name} {recipe.seed}".replace(" ", "-").replace("=", "")
    # What does not compare with the others is told apart: epochs chosen on the test images, images of another size.
    name += ("" if options.protocol == "held-out" else f"-{options.protocol}") + (f"-{side}px" if options.image else "")
    out = options.out or Path("data/runs/training") / name
    if data.chosen and _process()[0] == 0:
        print(data.chosen)
    torch.manual_seed(recipe.seed)
    result = train(build(config), data, recipe, checkpoint=out / "checkpoint.pt", label=name)
    if _process()[0] == 0:
        chosen = {name: getattr(options, name) for name in ("preset", "method", "protocol")}
        result = {**chosen, "torch": torch.__version__, **result}
        records.write(out / "result.json", json.dumps(result, indent=1))
        print(f"test accuracy {result['test_accuracy']:.2f} % after {recipe.epochs} epochs: {out / 'result.json'}")


if __name__ == "__main__":
    main()
