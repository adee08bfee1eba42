"""Data sets of much alike: Oxford Flowers (102 classes) and Stanford Cars (196), in torchvision's folders."""

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .source import Source, decoder, last_line, require

FLOWERS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"


def _flowers(folder: Path) -> list[tuple[list[Path], list[int]]]:
    """Training and validation images are trained on, 20 of each class; the test images are 6,149."""
    labels = _matrix(folder / "imagelabels.mat", "labels")
    sets = folder / "setid.mat"
    numbers = [[*_matrix(sets, "trnid"), *_matrix(sets, "valid")], [*_matrix(sets, "tstid")]]
    return [
        ([folder / "jpg" / f"image_{n:05d}.jpg" for n in part], [int(labels[n - 1]) - 1 for n in part])
        for part in numbers
    ]


def _cars(folder: Path) -> list[tuple[list[Path], list[int]]]:
    """8,144 training and 8,041 test images, whole ones: their boxes are not cut out."""
    parts = []
    for part, said in (("cars_train", "devkit/cars_train_annos.mat"), ("cars_test", "cars_test_annos_withlabels.mat")):
        rows = _matrix(folder / said, "annotations")
        parts.append(([folder / part / str(row["fname"]) for row in rows], [int(row["class"]) - 1 for row in rows]))
    return parts


def _matrix(path: Path, name: str) -> Any:
    """One variable of a MATLAB file, a row."""
    from scipy.io import loadmat, matlab  # comes with scikit-learn; half a second that no other data set needs

    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: unpack the data set again, images and lists")
    try:
        return loadmat(path, squeeze_me=True)[name].reshape(-1)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        NotImplementedError,
        UnboundLocalError,  # scipy's own, at one damaged byte
        zlib.error,
        matlab.MatReadError,
    ) as error:
        raise ValueError(f"{path} is truncated or corrupt ({last_line(error)}): fetch it again") from error


def _loaded(
    lists: Callable[[Path], list[tuple[list[Path], list[int]]]],
    place: str,
    classes: int,
    remedy: str,
    root: Path,
    seed: int,
    image: int | None,
) -> Source:
    folder = root / place
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: {remedy}")
    (train, labels), (test, test_labels) = lists(folder)
    for label in (*labels, *test_labels):
        if not 0 <= label < classes:
            raise ValueError(f"{folder} has class {label + 1}, the data set 1 to {classes}: fetch its lists again")
    if missing := next((path for path in (*train, *test) if not path.exists()), None):
        raise FileNotFoundError(f"{missing} is missing: unpack the data set again")
    side = image or 224
    require(3 * side * side * (len(train) + len(test)), f"{place} at {side} pixels")
    return Source(train, torch.tensor(labels), test, torch.tensor(test_labels), classes, decode=decoder(side))


flowers = functools.partial(
    _loaded,
    _flowers,
    "flowers-102",
    102,
    f"get 102flowers.tgz, imagelabels.mat and setid.mat from {FLOWERS} and lay them out as jpg/ and both lists",
)
cars = functools.partial(
    _loaded,
    _cars,
    "stanford_cars",
    196,
    "its site is gone; lay a copy out as cars_train/, cars_test/, devkit/cars_train_annos.mat and "
    "cars_test_annos_withlabels.mat",
)
