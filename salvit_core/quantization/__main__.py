"""Quantizes a trained network from the command line: `salvit quantize`.

salvit quantize --run data/runs/trainings/efficientvit_micro_32-cifar10-0 --bits-weights 4
salvit quantize --model b1-r224 --weights b1-r224.pt --data-path /imagenet --bits-weights 8 --bits-activations 8
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import nn

from .. import datasets, workspace
from ..fields import Checked, CountOrNone, Size
from ..models.config import EFFICIENTVITS, preset
from ..models.efficientvit import load_published
from ..models.vit import build
from ..training.checkpoint import digest, load_weights, loaded, result_of
from ..training.evaluation import evaluate
from .engine import STAGES, Quantization, drawn, quantize, save

CROP = 0.95  # of ImageNet's images, as the published accuracies have it


@dataclass(frozen=True)
class Command(Checked):
    """Quantize a trained network after training, and tell its accuracy at each stage.

    The released command and options are understood too. Its `main_imagenet.py --data_path PATH_TO_IMAGENET --n_bits_w 8
    --channel_wise --weight 0.5 --model b1-r224 --disable_8bit_head_stem --n_bits_a 8 --act_quant --input_size 224
    --test_before_calibration` is `salvit quantize --data-path PATH_TO_IMAGENET --bits-weights 8 --per-channel
    --regulariser 0.5 --model efficientvit_b1 --same-ends --bits-activations 8 --activations --image 224 --test-before`,
    with the trained weights in --weights. Run again after it was stopped, it goes on after the last block.
    """

    model: str = "b1-r224"
    """EfficientViT: a preset's name, such as efficientvit_b1, or a released one, b1-r224 to b3-r288."""
    weights: Path | None = None
    """Its trained weights: ours, timm's or the released file. Default: data/weights/MODEL.pt in the workspace."""
    run: Path | None = None
    """Instead of --model and --weights: folder that `salvit train` wrote, of any network; its data set is used."""
    data: str | None = None
    """Data set, as in `salvit train`. Default: that of --run, else imagenet."""
    data_path: Path | None = None
    """Folder of ImageNet, with train/<class>/* and val/<class>/*; of other data sets the folder that they lie in.
    Default: data/ in the workspace (released: --data_path)."""
    image: Annotated[Size | None, tyro.conf.arg(aliases=["--input-size"])] = None
    """Side of the images in pixels. Default: the network's."""
    test_before: Annotated[bool, tyro.conf.arg(aliases=["--test-before-calibration"])] = False
    """Tell the accuracy of weights rounded to the nearest too."""
    test_images: CountOrNone = 0
    """Test images, drawn with seed 0; 0: all."""
    out: Path | None = None
    """Folder of quantized.pt, result.json and progress. Default: data/runs/quantizations/ in the workspace, and a name
    made of the network, its weights and the options."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to compute on."""
    options: tyro.conf.OmitArgPrefixes[Quantization] = dataclasses.field(default_factory=Quantization)
    """How it is quantized."""


def named(model: str, image: int | None) -> dict:
    """Preset and image size of a network's name, one of ours or a released one.

    Raises:
        ValueError: an unknown name, or two sizes.
    """
    if found := re.fullmatch(r"b([0-3])-r(\d+)", model):
        side = int(found[2])
        if image not in (None, side):
            raise ValueError(f"{model} is for images of {side} pixels, image is {image}: leave one out")
        return {"name": f"efficientvit_b{found[1]}", "image": side}
    if model not in EFFICIENTVITS:
        raise ValueError(f"model {model!r} is unknown: choose from {', '.join(EFFICIENTVITS)}, b1-r224 and its like")
    return {"name": model} | ({"image": image} if image else {})


def trained(command: Command) -> tuple[nn.Module, str, str]:
    """The network of a command with its weights, its name, and its data set's.

    Raises:
        ValueError: an unknown name, weights of another network, a folder that holds no training.
        OSError: a file that cannot be read.
    """
    if command.run is not None:
        config, said = result_of(command.run, "salvit train")
        if command.image not in (None, config.image):
            raise ValueError(f"image is {command.image}, {command.run} is for images of {config.image}: leave it out")
        model = build(config)
        load_weights(model, command.run / "weights.pt")
        return model.eval(), command.run.name, command.data or said["data"]
    data = command.data or "imagenet"
    fields = named(command.model, command.image)
    if data == "imagenet" and "image" not in fields:
        fields["image"] = preset(fields["name"]).image
    weights = command.weights or workspace.ROOT / "data" / "weights" / f"{command.model}.pt"
    if not weights.is_file():
        raise ValueError(
            f"trained weights {weights} are missing: put them there, or name others with --weights or --run"
        )
    state = loaded(weights, "a file of weights")
    held = state.get("state_dict", state) if isinstance(state, dict) else None
    tensors = list(held.values()) if isinstance(held, dict) else []
    if not tensors or not all(isinstance(each, torch.Tensor) for each in tensors) or not tensors[-1].numel():
        raise ValueError(f"{weights} is not a file of weights: name another")
    model = build(preset(**fields, classes=tensors[-1].numel()))  # the last is the classifier's bias
    try:
        load_published(model, state)
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error
    return model.eval(), command.model, data


def run(command: Command) -> None:
    """Do it, and say the accuracy of each stage.

    Raises:
        ValueError: a value that is unknown or does not fit, images that do not fit the network, a folder that holds
            another result.
        OSError: images that are not there, or no room.
    """
    model, name, data = trained(command)
    options, side, device = command.options, model.config.image, command.device
    out = command.out or workspace.ROOT / "data" / "runs" / "quantizations" / _called(model, name, data, options)
    for file in ("quantized.pt", "result.json"):
        workspace.try_out(out / file)
    if data == "imagenet":
        folder = command.data_path or workspace.ROOT / "data" / "imagenet"
        (split,) = datasets.pieces(folder, "train", side, options.images, options.seed, CROP, options.images, device)
        images = split.normalised(split.images)

        def tested():
            return datasets.pieces(folder, "val", side, command.test_images, 0, CROP, device=device)
    else:
        root = command.data_path or workspace.ROOT / "data"
        found = datasets.load(data, root, device, image=side)
        images = drawn(found.train, options.images, options.seed)
        test = found.test
        if command.test_images:
            order = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))[: command.test_images]
            test = dataclasses.replace(test, images=test.images[order], labels=test.labels[order])

        def tested():
            return [test]

    said = {"model": name, "data": data, "options": dataclasses.asdict(options), "torch": torch.__version__}
    said |= {"weights": digest(*model.state_dict().values()), "images": digest(images)}
    workspace.refuse_another(out / "result.json", {name: said[name] for name in ("weights", "images", "options")})

    def accuracy(network: nn.Module) -> float:
        right = count = 0.0
        for piece in tested():
            right += evaluate(network, piece)["accuracy"] * len(piece.labels)
            count += len(piece.labels)
        return right / count

    stages = [stage for stage in STAGES if stage != "nearest" or command.test_before]
    made = quantize(model.to(device), images, options, accuracy, out, say=_say, stages=stages)
    accuracies = {stage: made[stage] for stage in stages if stage in made}
    workspace.write_json(out / "result.json", said | {"accuracy": accuracies, "history": made["history"]})
    save(made["network"].cpu(), options, out / "quantized.pt")
    for progress in ("weights.pt", "activations.pt"):
        (out / progress).unlink(missing_ok=True)
    print(f"quantized network: {out / 'quantized.pt'}")


NAMED = ("bits_weights", "bits_activations", "activations")  # which a folder's name says first
WORDS = {
    "float": "in float",
    "nearest": "weights rounded to the nearest, before reconstruction",
    "weights": "weights quantized",
    "activations": "weights and activations quantized",
}


def _say(stage: str, accuracy: float) -> None:
    print(f"accuracy {accuracy:6.2f} %  {WORDS[stage]}", flush=True)


def _called(model: nn.Module, name: str, data: str, options: Quantization) -> str:
    bits = f"w{options.bits_weights}" + (f"a{options.bits_activations}" if options.activations else "")
    changed = [
        f"{field.name}-{getattr(options, field.name)}"
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != field.default and field.name not in NAMED
    ]
    weights = digest(*model.state_dict().values())
    return "-".join([name, weights, data, f"{model.config.image}px", bits, *changed]).replace("_", "-")
