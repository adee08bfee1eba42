"""ImageNet and parts of it, such as Imagenette, from a folder train/<class>/* and val/<class>/*."""

from pathlib import Path

import torch

from ..compat import torchvision
from .source import Source, decoder, last_line, require


def imagenet(name: str, root: Path, seed: int, image: int | None) -> Source:
    """A folder train/<class>/* and val/<class>/*, root/<name>: ImageNet, or a part of it such as Imagenette.

    All images are decoded into memory: 0.15 MB each at 224 pixels, 200 GB for ImageNet's 1.3 million.
    """
    folder = root / name
    train, test = parts = listed(folder)
    paths = [[Path(path) for path, _ in part.samples] for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    side = image or 224
    require(3 * side * side * sum(map(len, paths)), f"{name} at {side} pixels")
    return Source(paths[0], labels[0], paths[1], labels[1], len(train.classes), decode=decoder(side))


def listed(folder: Path) -> tuple:
    """The images of both parts, unread: torchvision's ImageFolder of train and of val, of the same classes.

    Raises:
        FileNotFoundError: a part is missing, or lacks images.
        ValueError: a class that is in only one of them.
    """
    layout = f"{folder}/train/<class>/*.JPEG and {folder}/val/<class>/*.JPEG"
    parts = []
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder / part} is missing: get the images and lay them out as {layout}")
        try:
            parts.append(torchvision("datasets").ImageFolder(folder / part))
        except FileNotFoundError as error:  # no class, or a class without images
            raise FileNotFoundError(
                f"{folder / part} lacks images ({last_line(error)}): lay it out as {layout}"
            ) from error
    train, test = parts
    if odd := set(train.classes) ^ set(test.classes):
        raise ValueError(f"class {min(odd)} is in only one of train and val in {folder}: lay it out as {layout}")
    return train, test
