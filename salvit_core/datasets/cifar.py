"""CIFAR-10 and CIFAR-100, through torchvision."""

import functools
import hashlib
from pathlib import Path

import torch

from ..compat import torchvision
from .source import FAILURES, Source, last_line, patience


def _cifar(kind: str, root: Path, seed: int, image: int | None) -> Source:
    dataset = getattr(torchvision("datasets"), kind)
    try:
        with patience():
            train, test = (dataset(root, train=part, download=True) for part in (True, False))
    except FAILURES as error:
        raise _refuse_cifar(dataset, root, error) from error

    def images(part):
        return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()  # (n, 3, 32, 32)

    labels = [torch.tensor(part.targets) for part in (train, test)]
    return Source(images(train), labels[0], images(test), labels[1], int(kind.removeprefix("CIFAR")), image=image)


def _refuse_cifar(dataset, root: Path, error: Exception) -> Exception:
    """The error that says which file is at fault and what to do."""
    folder = root / dataset.base_folder
    remedy = f"connect to a network, or unpack {dataset.filename} from {dataset.url} into {root}"
    for name, md5 in (*dataset.train_list, *dataset.test_list):
        path = folder / name
        if not path.is_file():
            return FileNotFoundError(f"{path} is missing and could not be downloaded ({last_line(error)}): {remedy}")
        if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != md5:
            return ValueError(
                f"{path} is truncated or corrupt and could not be downloaded anew ({last_line(error)}): "
                f"delete it and {remedy}"
            )
    # What remains is the file of class names, whose loss alone makes torchvision download nothing.
    path = folder / dataset.meta["filename"]
    return ValueError(f"{path} is missing, truncated or corrupt: delete {folder} and run again")


cifar10 = functools.partial(_cifar, "CIFAR10")
cifar100 = functools.partial(_cifar, "CIFAR100")
