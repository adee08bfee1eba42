"""A trained CCT-7/3x1 on shares: the paper's network, trained as far as a processor without a GPU takes it.

    python benchmarks/full_size.py train       # hours on 2 cores; goes on where it was stopped
    python benchmarks/full_size.py evaluate    # 256 test images of CIFAR-10 on shares; goes on where it was stopped

Trained in stages, on images of 8 x 8 first, then at twice the side, and last at full size. What belongs to a place in
the image (positions, and L2Q's c and d) is handed to the four places that come from it.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from salvit_core import CCT, datasets, preset, private, workspace
from salvit_core.experiments import store
from salvit_core.training import Recipe, fit

METHOD = "SAL-ViT B=3"
# Side in pixels, training images, recipe. A step at 32 costs some forty times one at 8.
RECIPE = Recipe(batch=128, lr=8e-4, warmup=1, augment="crop", keep="last")
STAGES = (
    (8, 45_000, dataclasses.replace(RECIPE, epochs=6)),
    (16, 15_000, dataclasses.replace(RECIPE, epochs=1, lr=3e-4)),
    (32, 3_000, dataclasses.replace(RECIPE, epochs=1, lr=1e-4)),
)


def grown(small: CCT, whole: CCT) -> CCT:
    """The network for images of twice the side that begins with the other's weights."""
    side = int(whole.config.tokens**0.5)
    place = torch.arange(side) // 2
    index = (place[:, None] * (side // 2) + place).flatten()  # of each place, the place that it comes from
    weights = whole.state_dict()
    for name, tensor in small.state_dict().items():
        for axis, (ours, theirs) in enumerate(zip(weights[name].shape, tensor.shape, strict=True)):
            if ours != theirs:
                tensor = tensor.index_select(axis, index)
        weights[name] = tensor
    whole.load_state_dict(weights)
    return whole


def trained(folder: Path) -> tuple[CCT, list[dict], "datasets.Data"]:
    """The network after all stages, what each epoch gave, and the data at full size."""
    model, history = None, []
    for side, seen, recipe in STAGES:
        data = datasets.load("cifar10", root=workspace.ROOT / "data", image=side)
        part = dataclasses.replace(data.train, images=data.train.images[:seen], labels=data.train.labels[:seen])
        torch.manual_seed(0)
        network = CCT(preset("cct_7_3x1", METHOD, image=side))
        model = network if model is None else grown(model, network)
        epochs = fit(model, dataclasses.replace(data, train=part), recipe, checkpoint=folder / f"{side}.pt")
        history += [{"image": side, **facts} for facts in said(epochs)]
    return model, history, data


def said(epochs):
    """Pass epochs on, a line printed of each."""
    for facts in epochs:
        print({name: round(value, 4) for name, value in facts.items()}, flush=True)
        yield facts


def main() -> None:
    """Train, or measure what was trained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "evaluate"))
    parser.add_argument("--images", type=int, default=256, help="test images on shares")
    parser.add_argument("--out", type=Path, default=workspace.ROOT / "data/runs/benchmarks/full_size.json")
    args = parser.parse_args()
    folder = workspace.ROOT / "data" / "runs" / "full_size"
    model, history, data = trained(folder)
    if args.what == "train":
        return
    found = private.evaluate(model, data, "tuned", n=args.images, batch=4, folder=folder)
    record = {
        "network": f"cct_7_3x1 {METHOD}",
        "stages": [{"image": side, "images": seen, **dataclasses.asdict(recipe)} for side, seen, recipe in STAGES],
        "training": history,
        **found,
        **store.circumstances(),
    }
    said_of = ("images", "clear_accuracy", "private_accuracy", "agreement", "largest_error")
    store.save_report(record, "\n".join(f"- {name}: {found[name]:.4g}" for name in said_of), args.out)


if __name__ == "__main__":
    main()
