"""Searches from the command line, for runs without a notebook; SAS-L and SAS-H as in the paper's readme, in one line.

salvit search --data cifar10 --budget 3 --search-epochs 600
salvit search --data cifar10 --granularity head --budget 12 --search-epochs 600
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from .. import datasets, workspace
from ..fields import Among, Checked, Count, CountOrNone, Size, Weight
from ..models.config import CCTConfig, preset
from ..options import parsed
from ..training.recipe import Recipe
from . import released as released_search
from . import sas
from .released import ReleasedSearch
from .sas import Search


@dataclass(frozen=True)
class Command(Checked):
    """Search for the layers, or heads, that deserve self-attention, extract the network and fine-tune it.

    Writes OUT/result.json and OUT/weights.pt; run again after it was stopped, it goes on where it was.
    """

    preset: str = "cct_7_3x1"
    """Network, a preset's name; its image size, channels and classes become those of the data set."""
    method: str = "SA L2Q"
    """Row of the tables that names the normaliser, such as "SA L2Q" or "SA 2Quad"."""
    data: str = "auto"
    """Data set: digits, fashion_mnist, cifar10, cifar100, tiny_imagenet, imagenet, ..., or auto."""
    root: Path | None = None
    """Folder of the data sets. Default: data/ in the workspace."""
    image: Size | None = None
    """Side in pixels to resize images to. Default: as they are."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to train on."""
    out: Path | None = None
    """Folder of the results. Default: data/runs/searches/ in the workspace, and a name made of the options."""
    granularity: Annotated[str, Among(*sas.GRANULARITIES)] = "layer"
    """Who has an alpha: "layer" (SAS-L) or "head" (SAS-H)."""
    budget: CountOrNone = 3
    """B: how many layers, or heads, get self-attention."""
    rule: Annotated[str, Among(*sas.RULES)] = "top"
    """Which ones: "top" alpha, "bottom" (the paper's worst case), or "random"."""
    weight: Weight = 0.1
    """lambda of Eq. 5, the weight of sum |alpha| in the loss."""
    folded: bool = False
    """Self-attention keeps the scale that it had in the mixture when it is extracted; not the paper's."""
    gate: Annotated[str, Among(*sas.GATES)] = "free"
    """What bounds alpha: nothing ("free", the paper's), or a logistic function of what is learnt ("sigmoid")."""
    cheap: Annotated[str, Among(*sas.CHEAP)] = "external"
    """What the others get: "external" attention, the paper's, or "scaling" attention (MPCViT, with --method "SA 2ReLU"
    and --granularity head)."""
    score: Annotated[str, Among(*sas.SCORES)] = "alpha"
    """What --rule is of: "alpha" (the paper's), "saliency" (how fast the loss falls as alpha grows) or "perturbation"
    (what is lost without a layer's, or a head's, self-attention)."""
    released: bool = False
    """Search as the published code does where it parts from the paper."""
    search_epochs: Count = 600
    """Epochs of the search phase, E_NAS; --epochs are those of fine-tuning."""
    recipe: tyro.conf.OmitArgPrefixes[Recipe] = dataclasses.field(default_factory=Recipe)
    """How both phases train."""


def run(command: Command) -> Path:
    """Do it; the path of the result.

    Raises:
        ValueError: a value that is unknown or does not fit.
        FloatingPointError: a loss that is no number.
        OSError: a data set that cannot be had, or no room.
    """
    root = command.root or workspace.ROOT / "data"
    data = datasets.load(command.data, root, command.device, image=command.image)
    _, channels, _, side = data.train.images.shape
    config = preset(command.preset, command.method, image=side, channels=channels, classes=data.classes)
    if not isinstance(config, CCTConfig):
        raise ValueError(
            f"preset {command.preset!r} is no CCT: the search is over a CCT's attention, such as cct_7_3x1"
        )
    recipe = command.recipe
    first = dataclasses.replace(recipe, epochs=command.search_epochs)
    kind = ReleasedSearch if command.released else Search
    asked = command.budget, command.granularity, command.rule, command.weight, command.folded, command.gate
    search = kind(config, first, recipe, recipe.seed, *asked, command.cheap, command.score)
    name = f"{command.preset}-{command.method}-{data.name}-{'released-' * command.released}{command.granularity}"
    name += f"-{command.budget}-{command.rule}{'-folded' * command.folded}"
    name += f"{'-sigmoid' * (command.gate == 'sigmoid')}{'-scaling' * (command.cheap == 'scaling')}"
    name += f"{f'-{command.score}' * (command.score != 'alpha')}-{recipe.seed}"
    out = command.out or workspace.ROOT / "data" / "runs" / "searches" / name.replace(" ", "-")
    said = {"search": dataclasses.asdict(search), "data": data.name}
    workspace.refuse_another(out / "result.json", said)
    for file in ("nas.pt", "weights.pt", "result.json"):
        workspace.try_out(out / file)
    if data.chosen:
        print(data.chosen)
    try:
        if isinstance(search, ReleasedSearch):
            found = released_search.search(search, data, folder=out)
        else:
            found = sas.search(search, data, folder=out)
    except FloatingPointError as error:
        raise FloatingPointError(f"{out.name}: {error}") from error
    network = found.pop("network")
    workspace.write(out / "weights.pt", lambda file: torch.save(network.cpu().state_dict(), file))
    config = dataclasses.replace(config, attention=found["architecture"])
    result = {"config": dataclasses.asdict(config), **said, **found}
    workspace.write_json(out / "result.json", result)
    print(f"{' '.join(map(str, found['architecture']))}: test accuracy {found['test_accuracy']:.2f} %")
    return out / "result.json"


def main(arguments: list[str] | None = None) -> None:
    """Search as the command line says."""
    try:
        print(run(parsed(Command, "python -m salvit_core.search", arguments)))
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
