"""The command line: salvit study, train, search, replace, quantize, infer, estimate, evaluate, and others below.

Each command is a frozen dataclass, whose fields are its options, and a function of it.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from . import compat, datasets, workspace
from .fields import Checked, Count
from .models import maps
from .models.config import TransformerConfig, preset, usual
from .models.foreign import adopt
from .models.vit import build
from .options import parsed
from .replacement import __main__ as replacement
from .replacement.pruning import shaped
from .training.checkpoint import load_weights, result_of

COMMANDS = {
    "study": "run the notebooks headless: figures, tables, records",
    "train": "train one network",
    "search": "selective attention search: SAS-L, SAS-H, as released",
    "replace": "another mechanism in attention's place: train, prune, downstream, visualize",
    "quantize": "few bits for a trained network: Trio-ViT's post-training quantization",
    "infer": "run a network on secret shares, two parties on this machine",
    "estimate": "what a private inference will cost, from shapes alone",
    "evaluate": "encrypted accuracy beside the clear",
    "calibrate": "measure this machine, so that estimate can model seconds",
    "evidence": "the campaign of trainings behind the study's claims, for hours",
    "party": "play one party of a private inference across machines",
    "migrate": "move a folder of records to the present names",
}
ROW = "SAL-ViT B=3"  # of a preset, where none is named
# Where a command is that a room of its own offers; imported when it is asked for: not everybody has what it needs.
_HOMES = {
    "study": ("experiments.study", "Study"),
    "evidence": ("experiments.evidence", "Evidence"),
    "calibrate": ("experiments.calibration", "Command"),
    "train": ("training.__main__", "Command"),
    "search": ("search.__main__", "Command"),
    "quantize": ("quantization.__main__", "Command"),
}


@dataclass(frozen=True)
class Subject(Checked):
    """What `salvit infer` and `salvit evaluate` run on secret shares."""

    run: Path | None = None
    """Folder that `salvit train`, `search` or `replace` wrote: its network and weights."""
    preset: str = "cct_7_3x1"
    """Without --run: a preset's name, with random weights, for what it costs."""
    method: str | None = None
    """Without --run: row of the tables, such as "SA softmax". Default: "SAL-ViT B=3"; an EfficientViT has none."""
    data: str | None = None
    """Data set whose test images are sent. Default: that of --run; random images without it."""
    root: Path | None = None
    """Folder of the data sets. Default: data/ in the workspace."""
    n: Count = 1
    """Images."""
    batch: Count | None = None
    """Images in a query. Default: all in one."""
    protocol: str = "tuned"
    """"tuned", this project's, or "stock", CrypTen's own functions."""
    provider: str = "TFP"
    """Who makes the correlated randomness: "TFP", the server itself (for measuring only), or "TTP", a third process."""
    out: Path | None = None
    """File for logits and costs as JSON."""


@dataclass(frozen=True)
class Infer(Subject):
    """Run a network on secret shares: each party a process of its own on this machine."""

    reveal: str = "logits"
    """What the client may learn: "logits" or, with "tuned", the "label" alone."""
    timeout: float = 600.0
    """Seconds for everything."""


@dataclass(frozen=True)
class Estimate(Checked):
    """What a network will cost on secret shares, from its shapes: nothing is run."""

    preset: str = "cct_7_3x1"
    """A preset's name."""
    row: Annotated[str | None, tyro.conf.arg(aliases=["--method"])] = None
    """Row of the tables, such as "SA softmax". Default: "SAL-ViT B=3"; an EfficientViT has none."""
    torchvision: str | None = None
    """Instead of a preset: a network of torchvision, such as vit_b_16 or resnet18."""
    image: int = 224
    """Side of its images, pixels."""
    softmax: str = "softmax"
    """What stands in its softmax's place, such as 2quad."""
    gelu: str = "gelu"
    """What stands in its GELU's place, such as quad."""
    protocol: str = "tuned"
    """"tuned", this project's, or "stock", CrypTen's own functions."""
    provider: str = "TFP"
    """Who makes the correlated randomness, as in `salvit infer`; the rounds and bytes are the same with both."""
    link: str | None = None
    """Name of a link, such as "WAN (Cheetah)"; LAN and WAN are Cheetah's. Default: loopback."""
    batch: Count = 1
    """Images in the query."""
    reveal: str = "logits"
    """What the client may learn: "logits" or, with "tuned", the "label" alone."""
    out: Path | None = None
    """File for the table by layer and kind as JSON."""


@dataclass(frozen=True)
class Evaluate(Subject):
    """Encrypted accuracy of a trained network, beside its accuracy in the clear."""

    n: Count = 256
    """Test images, drawn with seed 0."""
    batch: Count | None = 8
    """Images in a query."""


@dataclass(frozen=True)
class Visualize(Checked):
    """Token importance maps of a trained or pruned network: by how much each token moves each other, block by block.

    Writes OUT/tokens.png (heat maps), OUT/patches.png (what the class token, or the mean token, moves with) and
    OUT/importance.json.
    """

    run: Path | None = None
    """The network: folder that salvit train or replace wrote."""
    data: str | None = None
    """Data set of the images. Default: that of --run."""
    root: Path | None = None
    """Folder of the data sets. Default: data/ in the workspace."""
    n: Count = 16
    """Test images over which importance is averaged."""
    block: Count | None = None
    """Which block, from 1. Default: all."""
    out: Path | None = None
    """Folder of the pictures. Default: importance/ in --run."""


Replace = replacement.Mode | Annotated[Visualize, tyro.conf.subcommand("visualize")]


@dataclass(frozen=True)
class Migrate:
    """Move a folder of records to the present names and keys; their numbers stay as they are."""

    folder: tyro.conf.Positional[Path]
    """Such as data/reference or data/runs."""


def subject(command: Subject) -> tuple[torch.nn.Module, datasets.Data | None]:
    """The network of a command, and its data set if it has one.

    Raises:
        ValueError: a folder that holds no run, an unknown name.
        OSError: a file that cannot be read.
    """
    name = command.data
    if command.run is not None:
        config, said = result_of(command.run, "salvit train or search")
        name, sizes = name or said["data"], said.get("hidden")
    else:
        method = usual(command.preset, command.method, ROW)
        config = preset(command.preset, method)
    if name is None:
        torch.manual_seed(0)
        return build(config).eval(), None
    side = None if command.run is None else config.image  # which a training may have resized its images to
    data = datasets.load(name, command.root or workspace.ROOT / "data", image=side)
    _, channels, _, side = data.test.images.shape
    shape = {"image": side, "channels": channels, "classes": data.classes}
    torch.manual_seed(0)
    if command.run is None:
        return build(preset(command.preset, method, **shape)).eval(), data
    pruned = sizes and isinstance(config, TransformerConfig)
    model = (shaped(config, sizes) if pruned else build(config)).eval()  # type: ignore[arg-type]
    load_weights(model, command.run / "weights.pt")
    return model, data


def infer(command: Infer) -> None:
    """`salvit infer`: prints the costs by kind of operation, and each image's class on shares and in the clear."""
    private = importlib.import_module(".private", __package__)
    model, data = subject(command)
    if data is None:
        config = model.config
        images = torch.randn(command.n, config.channels, config.image, config.image)
    else:
        there = len(data.test.labels)
        if command.n > there:
            raise ValueError(f"n is {command.n}: the test split of {data.name} has {there} images, give 1 to {there}")
        images = data.test.normalised(data.test.images[: command.n].cpu())
    if command.out is not None:
        workspace.try_out(command.out)
    result = private.infer(
        model,
        images,
        command.protocol,
        command.provider,
        timeout=command.timeout,
        batch=command.batch,
        reveal=command.reveal,
    )
    table = result.operations.groupby("kind", observed=True, sort=False)[["seconds", "rounds", "bytes"]].sum()
    table.loc["total"] = table.sum()
    print(table.astype({"rounds": int, "bytes": int}).round(3).to_string())
    with torch.no_grad():
        clear = model(images).argmax(1).tolist()
    print(f"class on shares {result.labels.tolist()}, in the clear {clear}")
    print(f"largest error of a logit {result.error:.2g}, least margin of two logits {result.margin:.2g}")
    print(f"provider {result.provider}, protocol {result.protocol}, the dealer's bytes {result.dealer_bytes}")
    logits = None if result.logits is None else result.logits.tolist()
    rows = result.operations.to_dict("records")
    _write(command.out, {"labels": result.labels.tolist(), "logits": logits, "operations": rows})


def priced(command: Estimate) -> tuple[torch.nn.Module, torch.nn.Module | None, tuple[int, int, int]]:
    """The network of a command, the same without what stands in where there is any, and its images' shape.

    Raises:
        ValueError: an unknown name, or stand-ins for a network that has them by its row.
    """
    swaps = {"softmax": command.softmax, "gelu": command.gelu}
    swapped = swaps != {"softmax": "softmax", "gelu": "gelu"}
    if command.torchvision is None:
        if swapped:
            raise ValueError("softmax and gelu stand in for those of --torchvision: a preset's are said by its --row")
        config = preset(command.preset, usual(command.preset, command.row, ROW))
        with torch.device("meta"):
            return build(config), None, (config.channels, config.image, config.image)
    models = compat.torchvision("models")
    if command.torchvision not in models.list_models(module=models):
        raise ValueError(f"torchvision has no network {command.torchvision!r}: see torchvision.models.list_models()")
    sized = {"image_size": command.image} if command.torchvision.startswith("vit_") else {}
    try:
        model = models.get_model(command.torchvision, weights=None, **sized).eval()
    except AssertionError as error:  # torchvision's way to refuse a size
        raise ValueError(f"image is {command.image}, which {command.torchvision} does not take: {error}") from error
    shape = (3, command.image, command.image)
    if not swapped:
        return model, None, shape
    return adopt(model, torch.zeros(2, *shape), **swaps), model, shape


def estimate(command: Estimate) -> None:
    """`salvit estimate`: prints the table by kind of operation, and which of its numbers are exact."""
    private = importlib.import_module(".private", __package__)
    name = {"LAN": "LAN (Cheetah)", "WAN": "WAN (Cheetah)"}.get(command.link or "", command.link)
    if name is not None and name not in private.LINKS:
        raise ValueError(f"link {name!r} is unknown: choose from {', '.join(private.LINKS)}")
    link = None if name is None else private.LINKS[name]
    speed = None
    if command.protocol == "tuned":
        with contextlib.suppress(ImportError):  # without the packages of the notebooks there are no records
            speed = importlib.import_module(".experiments.calibration", __package__).speed()
    model, plain, image = priced(command)
    asked = {"protocol": command.protocol, "provider": command.provider, "link": link, "reveal": command.reveal}
    found = private.estimate(model, (command.batch, *image), **asked, speed=speed)
    names = [name for name in ("rounds", "bytes", "offline_bytes", "seconds") if name in found.operations]
    table = found.operations.groupby("kind", observed=True, sort=False)[names].sum()
    table.loc["total"] = table.sum()
    table = table.astype({name: int for name in names if name != "seconds"}).round(3)
    print(table.rename(columns={"offline_bytes": "dealer's bytes"}).to_string())
    print(f"rounds and bytes, one way: exact; {command.batch} images in a query, protocol {command.protocol}")
    if plain is not None:
        before = private.estimate(plain, (command.batch, *image), **asked)
        rounds = 100 * (1 - found.rounds / before.rounds)
        sent = 100 * (1 - found.bytes / before.bytes)
        print(f"{command.softmax} and {command.gelu} save {rounds:.0f} % of the rounds and {sent:.0f} % of the bytes")
    if speed is not None:
        print(f"seconds on {name or 'loopback'}: modelled, from this machine's calibration")
    else:
        why = "this machine is not calibrated: salvit calibrate" if command.protocol == "tuned" else "of tuned only"
        print(f"seconds: not modelled, {why}")
    if link is not None:
        added = link.seconds(found.rounds, found.operations["serial_bytes"].sum())
        print(f"{name} adds {added:.3g} s to the time on loopback: modelled, from rounds and bytes")
    _write(command.out, {"operations": found.operations.to_dict("records")})


def evaluate(command: Evaluate) -> None:
    """`salvit evaluate`: prints accuracy and agreement."""
    private = importlib.import_module(".private", __package__)
    model, data = subject(command)
    if data is None:
        raise ValueError("evaluate needs a trained network and images: give --run, or --data")
    if command.out is not None:
        workspace.try_out(command.out)
    found = private.evaluate(
        model, data, command.protocol, command.n, batch=command.batch or command.n, provider=command.provider
    )
    said = {
        name: found[name] for name in ("images", "clear_accuracy", "private_accuracy", "agreement", "largest_error")
    }
    print("\n".join(f"{name.replace('_', ' ')}: {value:.4g}" for name, value in said.items()))
    _write(command.out, found)


def visualize(command: Visualize) -> None:
    """`salvit replace visualize`: token importance as heat maps, the answer's row as patch maps, and the numbers."""
    figures = importlib.import_module(".figures", __package__)
    model, said = replacement.restored(command.run)
    layers = len(model.blocks)
    if command.block is not None and command.block > layers:
        raise ValueError(f"block is {command.block}: the network has {layers}")
    name = command.data or said["data"]
    data = datasets.load(name, command.root or workspace.ROOT / "data", image=model.config.image)
    if command.n > len(data.test.labels):
        raise ValueError(f"n is {command.n}: the test split of {data.name} has {len(data.test.labels)} images")
    images = data.test.images[: command.n]
    moved = maps.importance(model, data.test.normalised(images))
    chosen = range(1, layers + 1) if command.block is None else (command.block,)
    shown = {f"block {i}": moved[i - 1].mean(0).fill_diagonal_(float("nan")).numpy() for i in chosen}
    out, note = command.out or command.run / "importance", f"Mean over {command.n} test images of {data.name}."  # type: ignore[operator]
    out.mkdir(parents=True, exist_ok=True)
    figures.heat_maps(shown, note=note, labels=("token that moves", "token that is moved")).savefig(out / "tokens.png")
    few = images[:8].permute(0, 2, 3, 1).squeeze(-1).numpy() / 255
    rows = {f"block {i}": [maps.grid(maps.read(model, one)).numpy() for one in moved[i - 1][:8]] for i in chosen}
    figures.map_grid(list(few), rows, note).savefig(out / "patches.png")
    numbers = {f"block {i}": moved[i - 1].mean(0).tolist() for i in chosen}
    workspace.write_json(out / "importance.json", {"data": data.name, "images": command.n, "importance": numbers})
    print(f"{out / 'tokens.png'}, {out / 'patches.png'}, {out / 'importance.json'}")


def replace(command: Any) -> None:
    """`salvit replace`: the mode that was asked for."""
    if isinstance(command, Visualize):
        return visualize(command)
    return replacement.run(command)


def migrate(command: Migrate) -> None:
    """`salvit migrate`: says how many records moved."""
    room = importlib.import_module(".experiments.migrate", __package__)
    if not command.folder.is_dir():
        raise ValueError(f"folder {command.folder} is not there: give one of records, such as data/reference")
    print(f"{len(room.migrate(command.folder))} records moved in {command.folder}")


def _write(path: Path | None, content: dict) -> None:
    if path is not None:
        workspace.write_json(path, content, default=str)


_HERE: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "replace": (Replace, replace),
    "infer": (Infer, infer),
    "estimate": (Estimate, estimate),
    "evaluate": (Evaluate, evaluate),
    "migrate": (Migrate, migrate),
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command; an error is one line on standard error and status 1, a wrong option status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--workspace"]:
        workspace.ROOT, words = Path(words[1]).resolve() if len(words) > 1 else workspace.ROOT, words[2:]
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {name:10}{what}" for name, what in COMMANDS.items()]
        print("\n".join(["usage: salvit [--workspace FOLDER] COMMAND [OPTIONS]", "", *lines, ""]))
        print("salvit COMMAND --help tells its options. The workspace holds data/ and figures/.")
        return
    name, options = words[0], words[1:]
    if name not in COMMANDS:
        sys.exit(f"error: command {name!r} is unknown: choose from {', '.join(COMMANDS)}")
    if name == "party":
        return importlib.import_module(".private.parties.party", __package__).main(options)
    try:
        status = _run(name, options)
    except ImportError as error:
        sys.exit(
            f"error: {name} needs {error.name}, which is not installed: pip install 'salvit-core[private,notebooks]'"
        )
    except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    if isinstance(status, int) and status:
        sys.exit(min(status, 100))


def _run(name: str, options: list[str]) -> Any:
    if name in _HERE:
        kind, function = _HERE[name]
    else:
        home, what = _HOMES[name]
        module = importlib.import_module(f".{home}", __package__)
        kind, function = getattr(module, what), module.run
    return function(parsed(kind, f"salvit {name}", options))


if __name__ == "__main__":
    main()
