"""Tiny-ImageNet: 200 classes of 500 images of 64x64."""

import os
import tempfile
from pathlib import Path

import torch

from ..compat import torchvision
from .source import FAILURES, Source, decoder, last_line, lines_of, patience

TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def tiny_imagenet(root: Path, seed: int, image: int | None) -> Source:
    """Tiny-ImageNet from root/tiny-imagenet-200, fetched if need be; its validation images are the test set.

    Raises:
        FileNotFoundError: it is not there and cannot be had, or a part of it is missing.
        ValueError: it is truncated or corrupt.
    """
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir():
        _fetch_tiny_imagenet(root)
    again = f"delete {folder} and run again"
    names = lines_of(folder / "wnids.txt", again)
    number = {name: label for label, name in enumerate(names)}
    train, train_labels = [], []
    for name in names:
        found = sorted((folder / "train" / name / "images").glob("*.JPEG"))
        train += found
        train_labels += [number[name]] * len(found)
    # The published set has as many images of each class; a class with fewer was not unpacked to its end.
    counts = torch.tensor(train_labels, dtype=torch.long).bincount(minlength=len(names))
    fewest, most = int(counts.min()), int(counts.max())
    if fewest < most or most == 0:
        short = folder / "train" / names[int(counts.argmin())]
        raise ValueError(f"{short} is incomplete, {fewest} images where others have {most}: {again}")
    annotations = folder / "val" / "val_annotations.txt"
    test, test_labels = [], []
    for entry in lines_of(annotations, again):
        file, name, *_ = [*entry.split("\t"), ""]
        if name not in number:
            raise ValueError(f"{annotations} is truncated or corrupt at {entry!r}, expected file and class: {again}")
        test.append(folder / "val" / "images" / file)
        test_labels.append(number[name])
    missing = set(test) ^ set((folder / "val" / "images").glob("*.JPEG"))
    if missing:
        raise ValueError(f"{min(missing)} is in only one of {annotations} and its folder: {again}")
    return Source(
        train, torch.tensor(train_labels), test, torch.tensor(test_labels), len(names), decode=decoder(64), image=image
    )


def _fetch_tiny_imagenet(root: Path) -> None:
    fetch = torchvision("datasets.utils").download_and_extract_archive
    root.mkdir(parents=True, exist_ok=True)
    try:
        # Unpacked aside and moved when complete: a folder that is there was not interrupted.
        with patience(), tempfile.TemporaryDirectory(dir=root, prefix="tiny-imagenet-") as temporary:
            fetch(TINY_IMAGENET, root, temporary, md5=_TINY_IMAGENET_MD5)
            os.replace(Path(temporary) / "tiny-imagenet-200", root / "tiny-imagenet-200")
    except FAILURES as error:
        raise FileNotFoundError(
            f"Tiny-ImageNet is not in {root / 'tiny-imagenet-200'} and could not be downloaded ({last_line(error)}): "
            f"connect to a network, or put tiny-imagenet-200.zip from {TINY_IMAGENET} into {root} and run again"
        ) from error
