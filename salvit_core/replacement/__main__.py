"""Replaces attention from the command line: train, prune, downstream; `salvit replace` has visualize besides.

salvit replace train --run data/runs/trainings/cct_4_3x2-SA-softmax-cifar10-0 --data cifar10
salvit replace prune --run data/runs/replacements/... --share 0.5
torchrun --nproc-per-node 4 -m salvit_core.replacement train --base-model DeiT-Base --weights deit_base.pth \
    --data imagenet --batch-size 256 --block-ft-lr 2e-5 --block-ft-batch-size 256 --skip-train-attn
"""

import dataclasses
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from .. import datasets, workspace
from ..datasets.load import AUGMENT
from ..fields import Among, Checked, Count, CountOrNone, Positive, Seed, Share, Weight
from ..models.attention import ATTENTION
from ..models.cct import CCT
from ..models.config import TransformerConfig, preset
from ..models.normalizers import NORMALIZERS
from ..models.vit import ViT, build, load_deit
from ..options import parsed
from ..training.checkpoint import load_weights, loaded, result_of
from ..training.preparation import others
from ..training.processes import process, under_torchrun
from .distillation import ATTENTION_STAGE, HEAD_STAGE, LOSSES, Distillation, distil, train_stage
from .downstream import carried
from .pruning import REGULARISERS, Pruning, hidden, prune, shaped

SCALES = {"Tiny": "deit_tiny", "Small": "deit_small", "Base": "deit_base"}


@dataclass(frozen=True)
class Common(Checked):
    """What all modes have."""

    data: str | None = None
    """Data set, as of salvit train. Default: that of --run."""
    root: Path | None = None
    """Folder of the data sets. Default: data/ in the workspace."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to train on."""
    out: Path | None = None
    """Folder of the results. Default: data/runs/replacements/ in the workspace, and a name made of the options."""
    seed: Seed = 0
    """Of new weights, batches, augmentation and dropout."""


@dataclass(frozen=True)
class Train(Common):
    """Put another mechanism in the place of a trained network's attention, in three stages.

    Writes OUT/weights.pt, OUT/result.json and a checkpoint a stage; run again after it was stopped, it goes on where it
    was. Under torchrun (-m salvit_core.replacement train) the processes share every batch. The teacher is --run, or
    --base-model with --weights.
    """

    run: Annotated[Path | None, tyro.conf.arg(aliases=["--teacher"])] = None
    """The teacher: folder that salvit train wrote. Under torchrun, which has a --run-path, say --teacher."""
    base_model: Annotated[str | None, tyro.conf.arg(aliases=["--scale"])] = None
    """The teacher by name: DeiT-Tiny, DeiT-Small or DeiT-Base (or Tiny, Small, Base), with --weights."""
    weights: Path | None = None
    """File with the weights of --base-model under timm's names, such as deit_tiny_patch16_224-a1311bcf.pth."""
    rep_by: str = "multi-lstm"
    """What stands in attention's place: multi-lstm, lstm, mixer, grid-lstm, parallel-scan, or any mechanism."""
    normalizer: Annotated[str, Among(*NORMALIZERS)] | None = None
    """What stands in softmax's place in it, where it has a normaliser, such as l2q with --rep-by standard. Default: the
    teacher's."""
    layers: CountOrNone = 0
    """How many of the last layers are replaced; 0: all."""
    loss: Annotated[str, Among(*LOSSES)] = "combine"
    """Of the first stage: "combine", cross-entropy and cosine losses on the blocks' outputs, or "similarity", cosine
    losses on the attention outputs alone."""
    epochs: Count = 200
    """Of the first stage, which trains the replacements."""
    batch_size: Count = 256
    """Images per step of the first and the third stage, over all processes: four with 64 each are 256."""
    lr: Positive = 5e-4
    """Of the first stage, at 512 images per step: it is scaled by --batch-size."""
    weight_decay: Weight = 0.05
    """Of weights, in all stages."""
    warmup_epochs: CountOrNone = 5
    """Of every stage."""
    skip_train_attn: bool = False
    """Leave the first stage out: the replacements are first trained with their blocks."""
    block_ft_epochs: CountOrNone = 100
    """Of the second stage, which trains the blocks with cross-entropy; 0: none."""
    block_ft_lr: Positive = 5e-5
    """Of the second stage."""
    block_ft_batch_size: Count = 256
    """Images per step of the second stage, over all processes."""
    head_epochs: CountOrNone = 30
    """Of the third stage, which trains the head; 0: none."""
    head_lr: Positive = 5e-4
    """Of the third stage."""
    augment: Annotated[str, Among(*AUGMENT)] = "randaugment"
    """"none", "crop", "autoaugment" or "randaugment"."""
    reprob: Share = 0.25
    """Share of the images in which a rectangle is erased."""
    drop_path: Share = 0.1
    """Largest share of residual branches that stochastic depth drops."""


@dataclass(frozen=True)
class Prune(Common):
    """Drive hidden units of a replaced network to zero, mask them, train the rest, and remove them.

    Writes OUT/weights.pt and OUT/result.json of the smaller network.
    """

    run: Annotated[Path | None, tyro.conf.arg(aliases=["--model-path"])] = None
    """The network: folder that salvit replace train wrote, with multi-lstm or lstm. Its scale is in there."""
    regulariser: Annotated[str, Among(*REGULARISERS)] = "hoyer_square"
    """Of the norms of the groups: hoyer_square, hoyer or group."""
    coefficient: Weight = 1e-4
    """Of the regulariser in the loss."""
    threshold: Weight = 1e-4
    """A unit goes whose group has no larger root mean square."""
    share: Share = 0.0
    """Of all units, the weakest, go whatever their size."""
    epochs: CountOrNone = 100
    """With the regulariser; 0: none."""
    finetune_epochs: CountOrNone = 100
    """After masking, the pruned units held at zero; 0: none."""
    batch_size: Count = 256
    """Images per step, over all processes."""
    lr: Positive = 5e-5
    """Of both."""
    augment: Annotated[str, Among(*AUGMENT)] = "randaugment"
    """"none", "crop", "autoaugment" or "randaugment"."""
    reprob: Share = 0.25
    """Share of the images in which a rectangle is erased."""


@dataclass(frozen=True)
class Downstream(Common):
    """Fine-tune a network on another data set with a new head: --run of train, or, pruned, of prune.

    Writes OUT/weights.pt and OUT/result.json.
    """

    run: Annotated[Path | None, tyro.conf.arg(aliases=["--model-path", "--ds-pruned"])] = None
    """The network: folder that salvit train, replace train or replace prune wrote."""
    data: Annotated[str | None, tyro.conf.arg(aliases=["--dataset"])] = None
    """The other data set: cifar10, cifar100, flowers, cars, digits, ..."""
    epochs: Count = 1000
    """Passes over its training images."""
    batch_size: Count = 256
    """Images per step, over all processes."""
    lr: Positive = 5e-5
    """Learning rate after warming up."""
    head_only: bool = False
    """Train the new head alone."""
    augment: Annotated[str, Among(*AUGMENT)] = "randaugment"
    """"none", "crop", "autoaugment" or "randaugment"."""
    reprob: Share = 0.0
    """Share of the images in which a rectangle is erased."""
    drop_path: Share = 0.0
    """Largest share of residual branches that stochastic depth drops."""


Mode = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Prune, tyro.conf.subcommand("prune")]
    | Annotated[Downstream, tyro.conf.subcommand("downstream")]
)


def restored(run: Path | None) -> tuple[nn.Module, dict]:
    """The network in a folder that salvit train, search or replace wrote, pruned or not, and what was said of it.

    Raises:
        ValueError: no folder, or one without such a result, with weights of another network or with an EfficientViT.
        OSError: a file that cannot be read.
    """
    if run is None:
        raise ValueError("run is None: give a folder that salvit train or replace wrote, with --run")
    config, said = result_of(run, "salvit train or replace")
    try:
        sizes = said.get("hidden") if isinstance(config, TransformerConfig) else None
        model = shaped(config, sizes) if sizes else build(config)  # type: ignore[arg-type]  # no other has sizes
    except (ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{run} is no result of salvit train or replace ({reason}): train again") from error
    if not isinstance(model, CCT | ViT):
        raise ValueError(f"the network in {run} is a {type(model).__name__}: give a CCT or a ViT")
    load_weights(model, run / "weights.pt")
    return model.eval(), said


def named(name: str, weights: Path | None) -> nn.Module:
    """DeiT-Tiny, -Small or -Base with weights under timm's names; classes and image are those of the weights.

    Raises:
        ValueError: an unknown name, no file, or weights of another network.
        OSError: a file that cannot be read.
    """
    scale = name.removeprefix("DeiT-")
    if scale not in SCALES:
        raise ValueError(f"base model {name!r} is unknown: choose from {', '.join(f'DeiT-{each}' for each in SCALES)}")
    if weights is None:
        raise ValueError(f"weights is None: give the file with those of {name}, no weights are fetched")
    found = loaded(weights, "a file of weights")
    try:
        state = found.get("model", found)
        classes, tokens = state["head.weight"].shape[0], state["pos_embed"].shape[1]
    except (KeyError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{weights} holds no weights under timm's names ({type(error).__name__}: {error})") from error
    model = build(preset(SCALES[scale], classes=classes, image=16 * round((tokens - 1) ** 0.5)))
    load_deit(model, found)  # type: ignore[arg-type]  # a DeiT is a ViT
    return model.eval()


def train(command: Train) -> Path:
    """`salvit replace train`; the path of the result."""
    if (command.run is None) == (command.base_model is None):
        raise ValueError(f"run is {command.run}, base model {command.base_model!r}: give one of both as the teacher")
    by = command.rep_by.replace("-", "_")
    if by not in ATTENTION:
        known = ", ".join(name.replace("_", "-") for name in ATTENTION)
        raise ValueError(f"rep-by {command.rep_by!r} is unknown: choose from {known}")
    common: dict[str, Any] = {"weight_decay": command.weight_decay, "warmup": command.warmup_epochs}
    common["augment"] = command.augment
    base = dataclasses.replace(ATTENTION_STAGE, batch=command.batch_size, erase=command.reprob, **common)
    attention = dataclasses.replace(base, epochs=command.epochs, lr=command.lr * command.batch_size / 512)
    second: dict[str, Any] = {"lr": command.block_ft_lr, "batch": command.block_ft_batch_size}
    blocks = dataclasses.replace(base, epochs=command.block_ft_epochs, **second) if command.block_ft_epochs else None
    head = dataclasses.replace(base, epochs=command.head_epochs, lr=command.head_lr) if command.head_epochs else None
    stages = (None if command.skip_train_attn else attention, blocks, head)
    run = Distillation(by, command.loss, *stages, command.layers, command.drop_path, command.seed, command.normalizer)
    if command.run is not None:
        teacher, said = restored(command.run)
        name = command.run.resolve().name
    else:
        teacher, said, name = named(command.base_model or "", command.weights), {}, command.base_model or ""
    data = _data(command, said, teacher)
    if data.classes != teacher.config.classes:
        raise ValueError(
            f"the teacher has {teacher.config.classes} classes, {data.name} {data.classes}: name its own data"
        )
    source = command.run.resolve() if command.run is not None else (name, command.weights and command.weights.resolve())
    out, called = _folder(command, f"{name}-by-{command.rep_by}-{command.loss}-{data.name}-{command.seed}", source, run)
    result = distil(run, teacher, data, out)
    return _written(out, result, data, {"made": called, "distillation": dataclasses.asdict(run), "teacher": name})


def pruned(command: Prune) -> Path:
    """`salvit replace prune`; the path of the result."""
    recipe = dataclasses.replace(
        HEAD_STAGE, batch=command.batch_size, lr=command.lr, augment=command.augment, erase=command.reprob
    )
    sparsify, finetune = [
        dataclasses.replace(recipe, epochs=count) if count else None
        for count in (command.epochs, command.finetune_epochs)
    ]
    weights = (command.coefficient, command.threshold, command.share)
    run = Pruning(command.regulariser, *weights, sparsify, finetune, command.seed)
    model, said = restored(command.run)
    data = _data(command, said, model)
    source = command.run.resolve()  # type: ignore[union-attr]  # restored has refused None
    label = f"{source.name}-pruned-{command.regulariser}-{command.share:g}-{data.name}-{command.seed}"
    out, called = _folder(command, label, source, run)
    result = prune(run, model, data, out)
    before, after = result["parameters_before"], result["parameters"]
    if not process()[0]:
        gone = sum(row["pruned"] for row in result["channels"])
        print(
            f"{gone} of {sum(row['hidden'] for row in result['channels'])} hidden units removed: "
            f"{before} to {after} parameters"
        )
    return _written(out, result, data, {"made": called, "pruning": dataclasses.asdict(run)})


def downstream(command: Downstream) -> Path:
    """`salvit replace downstream`; the path of the result."""
    model, _ = restored(command.run)
    if command.data is None:
        raise ValueError("dataset is None: name the other data set, such as cifar100, flowers, cars or digits")
    recipe = dataclasses.replace(
        HEAD_STAGE,
        epochs=command.epochs,
        batch=command.batch_size,
        lr=command.lr,
        augment=command.augment,
        erase=command.reprob,
        seed=command.seed,
    )
    data = _data(command, {}, model)
    made = carried(model, data, command.drop_path, command.seed)
    source = command.run.resolve()  # type: ignore[union-attr]  # restored has refused None
    made_of = (source, recipe, command.drop_path, command.head_only)
    out, called = _folder(command, f"{source.name}-to-{data.name}-{command.seed}", *made_of)
    frozen = others(made, ["head"]) if command.head_only else ()
    result = train_stage(made, data, recipe, "downstream", None, frozen, out)
    said = {"stages": {"downstream": result}, "test_accuracy": result["test_accuracy"], "network": made}
    return _written(out, said, data, {"made": called, "from": str(command.run)})


def _data(command: Common, said: dict, model: nn.Module) -> datasets.Data:
    name = command.data or said.get("data")
    if name is None:
        raise ValueError("data is None: name the data set that the network was trained on")
    data = datasets.load(name, command.root or workspace.ROOT / "data", command.device, image=model.config.image)
    _, channels, _, side = data.train.images.shape
    if (channels, side) != (model.config.channels, model.config.image):
        expected = f"{model.config.channels} channels and {model.config.image} pixels"
        raise ValueError(f"{name} has images of {channels} channels and {side} pixels, the network reads {expected}")
    return data


def _folder(command: Common, name: str, *made_of: Any) -> tuple[Path, str]:
    """Where results go, and what they are called: what a name leaves out of source and options, eight digits tell."""
    called = f"{name.replace(' ', '-')}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:8]}"
    out = command.out or workspace.ROOT / "data" / "runs" / "replacements" / called
    if command.out:  # the other folders' names tell already
        workspace.refuse_another(out / "result.json", {"made": called})
    for file in ("weights.pt", "result.json") if not process()[0] else ():
        workspace.try_out(out / file)
    return out, called


def _written(out: Path, result: dict, data: datasets.Data, said: dict) -> Path:
    """Weights and result of a network, by the first process."""
    network = result.pop("network")
    result.pop("hidden", None)
    if not process()[0]:
        weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
        workspace.write(out / "weights.pt", lambda file: torch.save(weights, file))
        facts = {
            "config": dataclasses.asdict(network.config),
            "hidden": hidden(network),
            "data": data.name,
            **said,
            **result,
        }
        workspace.write_json(out / "result.json", {"torch": torch.__version__, **facts})
        print(f"test accuracy {result['test_accuracy']:.2f} %: {out / 'result.json'}")
    return out / "result.json"


MODES = {Train: train, Prune: pruned, Downstream: downstream}


def run(command: Train | Prune | Downstream) -> None:
    """Do what a mode asks.

    Raises:
        ValueError: a value that is unknown or does not fit.
        FloatingPointError: a loss that is no number.
        OSError: a file or data set that cannot be had, or no room.
    """
    mode = MODES[type(command)]
    under_torchrun(command.device, lambda device: mode(dataclasses.replace(command, device=device)))  # type: ignore[operator]


def main(arguments: list[str] | None = None) -> None:
    """Replace as the command line says; an error is one line.

    Args:
        arguments: the command line; sys.argv where None.
    """
    try:
        run(parsed(Mode, "python -m salvit_core.replacement", arguments))  # type: ignore[arg-type]  # subcommands
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
