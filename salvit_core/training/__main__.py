"""Trains one network from the command line, for runs without a notebook.

salvit train --preset cct_2_3x1 --method "SA L2Q" --data digits --epochs 20 --batch 64 --lr 2e-3
torchrun --nproc-per-node 2 -m salvit_core.training --preset cct_7_3x1 --data cifar10 --epochs 600
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from .. import datasets, workspace
from ..fields import Checked, Size
from ..models.config import preset, usual
from ..models.vit import build
from ..options import parsed
from .loop import train
from .processes import process, under_torchrun
from .recipe import Recipe


@dataclass(frozen=True)
class Command(Checked):
    """Train one network and test it once.

    Writes OUT/checkpoint.pt after every epoch, OUT/weights.pt and OUT/result.json; run again after it was stopped, it
    goes on where it was. Under torchrun the processes share every batch.
    """

    preset: str = "cct_7_3x1"
    """Network, a preset's name; its image size, channels and classes become those of the data set."""
    method: str | None = None
    """Row of the tables: attention and normaliser, such as "SA L2Q", "EA softmax" or "Linformer". Default: "SA
    softmax"; an EfficientViT, whose attention is its own, has none."""
    data: str = "auto"
    """Data set: digits, fashion_mnist, cifar10, cifar100, tiny_imagenet, imagenet, imagenet100, imagenette,
    flowers, cars, or auto."""
    root: Path | None = None
    """Folder of the data sets. Default: data/ in the workspace."""
    protocol: str = "held-out"
    """How the epoch is chosen: on "held-out" training images, or as "released", on the test images."""
    image: Size | None = None
    """Side in pixels to resize images to. Default: as they are."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to train on."""
    out: Path | None = None
    """Folder of the results. Default: data/runs/trainings/ in the workspace, and a name made of the options."""
    recipe: tyro.conf.OmitArgPrefixes[Recipe] = dataclasses.field(default_factory=Recipe)
    """How it is trained."""


def run(command: Command) -> None:
    """Do it, and say the test accuracy.

    Raises:
        ValueError: a value that is unknown or does not fit.
        FloatingPointError: a loss that is no number.
        OSError: a data set that cannot be had, or no room.
    """
    under_torchrun(command.device, lambda device: _train(dataclasses.replace(command, device=device)))


def _train(command: Command) -> None:
    recipe, root = command.recipe, command.root or workspace.ROOT / "data"
    data = datasets.load(command.data, root, command.device, protocol=command.protocol, image=command.image)
    _, channels, _, side = data.train.images.shape
    method = usual(command.preset, command.method, "SA softmax")
    config = preset(command.preset, method, image=side, channels=channels, classes=data.classes)
    words = [command.preset, *([method] if method else []), data.name, str(recipe.seed)]
    name = " ".join(words).replace(" ", "-").replace("=", "")
    # What does not compare with the others is told apart: epochs chosen on the test images, images of another size.
    name += ("" if command.protocol == "held-out" else f"-{command.protocol}") + (f"-{side}px" if command.image else "")
    out = command.out or workspace.ROOT / "data" / "runs" / "trainings" / name
    first = process()[0] == 0
    for file in ("checkpoint.pt", "weights.pt", "result.json") if first else ():
        workspace.try_out(out / file)
    if data.chosen and first:
        print(data.chosen)
    torch.manual_seed(recipe.seed)
    model = build(config)
    try:
        result = train(model, data, recipe, checkpoint=out / "checkpoint.pt", label=name)
    except FloatingPointError as error:
        raise FloatingPointError(f"{name}: {error}") from error
    if first:
        weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        workspace.write(out / "weights.pt", lambda file: torch.save(weights, file))
        chosen = {"preset": command.preset, "method": method, "protocol": command.protocol}
        result = {**chosen, "torch": torch.__version__, **result}
        workspace.write_json(out / "result.json", result)
        print(f"test accuracy {result['test_accuracy']:.2f} % after {recipe.epochs} epochs: {out / 'result.json'}")


def main(arguments: list[str] | None = None) -> None:
    """Train as the command line says; an error is one line.

    Args:
        arguments: the command line; sys.argv where None.
    """
    try:
        run(parsed(Command, "python -m salvit_core.training", arguments))
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
