"""Data sets as uint8 tensors on the training device, and batches of them: cropped, flipped, augmented, normalised.

`load` reads a data set by name and holds out the validation split that chooses epochs and architectures; `batches`
walks a split. Nothing here is done image by image: augmentation is tensor operations over many images at once, on the
device where they live, with a draw of its own for each image.

Letters in the shape comments: B batch, C channels, H height, W width, n images of a split.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .augment import autoaugment, crop, erased, randaugment
from .cifar import cifar10, cifar100
from .digits import digits
from .fashion_mnist import fashion_mnist, obtain
from .fine_grained import cars, flowers
from .imagenet import imagenet, listed
from .source import Source, decoder, require
from .tiny_imagenet import tiny_imagenet

DATA: dict[str, Callable[[Path, int, int | None], Source]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "flowers": flowers,
    "cars": cars,
    "tiny_imagenet": tiny_imagenet,
    **{name: functools.partial(imagenet, name) for name in ("imagenet", "imagenet100", "imagenette")},
}

PROTOCOLS = ("held-out", "released")
AUGMENT = ("none", "crop", "autoaugment", "randaugment")


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels of one part of a data set, on one device."""

    images: torch.Tensor  # uint8 (n, C, H, W)
    labels: torch.Tensor  # int64 (n,)
    mean: tuple[float, ...]  # per channel, of all images meant for training; pixels from 0 to 1
    std: tuple[float, ...]
    flip: bool = True  # an image and its mirror image are of one class: true of things, not of digits

    def __post_init__(self):
        channels = self.images.shape[1]
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} values, the images {channels} channels: "
                "give one value each"
            )

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels as the network reads them: uint8 (B, C, H, W) of this data set -> float32 of the same shape."""
        scale = 255 * torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        shift = 255 * torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        return (images.float() - shift) / scale


@dataclass(frozen=True, eq=False)
class Data:
    """A data set, split. Under protocol "released" `validation` is the test set itself."""

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split
    chosen: str  # what "auto" chose and why, one line; empty where the data set was named

    def to(self, device: str | torch.device) -> "Data":
        """The same images on a device."""
        parts = {name: getattr(self, name) for name in ("train", "validation", "test")}
        moved = {
            name: replace(part, images=part.images.to(device), labels=part.labels.to(device))
            for name, part in parts.items()
        }
        return replace(self, **moved)


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
        name: a key of `DATA`, used or refused; or "auto": Fashion-MNIST if it is there or can be had, else the
            digits.
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
        ValueError: an unknown name or value, a device that is not here, a truncated or corrupt file, or more images
            than memory holds.
    """
    if name != "auto" and name not in DATA:
        raise ValueError(f"data set {name!r} is unknown: choose from auto, {', '.join(DATA)}")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown: choose from {', '.join(PROTOCOLS)}")
    if not 0 < validation < 1:
        raise ValueError(f"validation is {validation}, expected the share of the training set to hold out, such as 0.1")
    if image is not None and image < 1:
        raise ValueError(f"image is {image}, expected a side of at least 1 pixel, or None to leave images as they are")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {str(device)!r} cannot be used here ({reason}): choose another, such as cpu"
        ) from error
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
    images = {part: _images(source, found, index, device) for part, (found, _, index) in parts.items()}
    mean, std = _statistics([images[part] for part in ("train", "validation") if part in images])
    splits = {
        part: Split(images[part], labels[index].to(device), mean, std, source.flip)
        for part, (_, labels, index) in parts.items()
    }
    splits.setdefault("validation", splits["test"])
    return Data(name, source.classes, **splits, chosen=chosen)


# ImageNet's, of each channel, that published weights were trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pieces(
    folder: Path,
    part: str,
    side: int,
    count: int = 0,
    seed: int = 0,
    crop: float = 1.0,
    size: int = 2048,
    device: str | torch.device = "cpu",
) -> Iterator[Split]:
    """ImageNet piece by piece: of 50,000 images no more are in memory than one piece holds.

    Args:
        folder: with train/<class>/* and val/<class>/*.
        part: "train" or "val".
        side: in pixels; the centre is cut out of images whose shorter side is side / crop.
        count: of the images, drawn with the seed; 0: all, in the folder's order.
        seed: of the draw.
        crop: share of the shorter side that is kept.
        size: images in a piece.
        device: where the pieces live.

    Yields:
        splits, normalised with ImageNet's usual mean and standard deviation.

    Raises:
        FileNotFoundError: a folder that is missing, or lacks images.
        ValueError: classes that differ, an image that is corrupt, or fewer images than asked for.
    """
    parts = dict(zip(("train", "val"), listed(Path(folder)), strict=True))
    samples = parts[part].samples
    if count > len(samples):
        raise ValueError(f"{count} images: {folder / part} has {len(samples)}, give at most as many")
    order = torch.arange(len(samples))
    if count:
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:count]
    full = round(side / crop)
    decode, margin = decoder(full), (full - side) // 2
    for some in order.split(size):
        images = decode([Path(samples[i][0]) for i in some.tolist()])
        images = images[:, :, margin : margin + side, margin : margin + side].contiguous().to(device)
        labels = torch.tensor([samples[i][1] for i in some.tolist()], device=device)
        yield Split(images, labels, IMAGENET_MEAN, IMAGENET_STD)


def batches(
    split: Split,
    size: int,
    augment: str = "none",
    generator: torch.Generator | None = None,
    drop_last: bool = False,
    part: tuple[int, int] = (0, 1),
    erase: float = 0.0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One pass over a split, in batches on its device.

    Augmentation is drawn anew for each image and each pass. "crop": zero padding of an eighth of the shorter side,
    at least 1 and at most 4 pixels (4 at 32 pixels and above, 3 at 28, 1 at 8), a random crop back to the size, and
    a mirror image half of the time, if `split.flip`. "autoaugment": the same, then one of the 25 sub-policies that
    AutoAugment found on CIFAR-10. "randaugment": the same crop, then two operations of RandAugment.

    Args:
        split: images and labels.
        size: B, images in a batch; the last one may be smaller.
        augment: "none", "crop", "autoaugment" or "randaugment".
        generator: on the CPU, whatever the device. The order is shuffled exactly when it is given. A call takes one
            number from it and draws everything else from that: the same state gives the same batches bit for bit, and
            leaving a pass early changes nothing that comes after.
        drop_last: leave out a last batch smaller than `size`.
        part: (rank, of how many): every n-th image of each batch, from the rank-th on. Only these are augmented, to
            what they are in the whole batch.
        erase: share of the images in which a rectangle is erased (`augment.erased`).

    Yields:
        Images, float32 (B, C, H, W), normalised, and labels, int64 (B,).

    Raises:
        ValueError: an unknown augmentation, augmentation without a generator, or sizes that do not fit.
    """
    if augment not in AUGMENT:
        raise ValueError(f"augment {augment!r} is unknown: choose from {', '.join(AUGMENT)}")
    if (augment != "none" or erase) and generator is None:
        what = f"erase {erase}" if augment == "none" else f"augment {augment!r}"
        raise ValueError(f"{what} draws at random: give a generator, such as torch.Generator()")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"the generator is on {generator.device}, expected a CPU one: use torch.Generator()")
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1 image in a batch")
    own = None
    if generator is not None:
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    return _walk(split, size, augment, own, drop_last, part, erase)


def _choose(root: Path) -> tuple[str, str]:
    """What data set "auto" stands for on this machine, and the line that says why; its files are in `root` then."""
    try:
        folder = obtain(root)
    except FileNotFoundError as error:
        return "digits", f"auto chose digits, which are always there: {error}"
    return "fashion_mnist", f"auto chose fashion_mnist: it is in {folder}"


# Images are augmented many at a time: the price of a hundred small operations is then paid once for several batches.
_CHUNK = 2**23  # pixels x channels; 2730 images of 3x32x32


def _walk(split, size, augment, generator, drop_last, part, erase):
    images, labels = split.images, split.labels
    count, device = len(labels), images.device
    order = None if generator is None else torch.randperm(count, generator=generator).to(device)
    if drop_last:
        count -= count % size
    chunk = size * max(1, _CHUNK // (size * images[0].numel())) if count else size
    for start in range(0, count, chunk):
        span = slice(start, min(start + chunk, count))
        some = None if order is None else order[span]
        place = torch.arange(span.stop - span.start) % size  # in its batch
        here = (place % part[1] == part[0]).nonzero()[:, 0]
        mine = here.to(device) + start if some is None else some[here.to(device)]
        drawn = images[mine]
        if augment != "none":
            drawn = crop(drawn, split.flip, generator, (len(place), here))
        if augment == "autoaugment":
            drawn = autoaugment(drawn, generator, (len(place), here))
        elif augment == "randaugment":
            drawn = randaugment(drawn, generator, (len(place), here))
        lost = erased(drawn, erase, generator, (len(place), here)) if erase else None
        whole = range(0, len(place), size)
        sizes = [len(range(part[0], min(size, len(place) - first), part[1])) for first in whole]
        passed = 0
        for batch, target in zip(drawn.split(sizes), labels[mine].split(sizes), strict=True):
            shown = split.normalised(batch)  # (B, C, H, W)
            if lost is not None:
                shown = torch.where(*(each[passed : passed + len(batch)] for each in lost), shown)
            passed += len(batch)
            yield shown, target  # (B, C, H, W), (B,)


def _images(source: Source, images, index: torch.Tensor, device) -> torch.Tensor:
    if source.decode is not None:
        images = source.decode([images[i] for i in index.tolist()])
    elif len(index) < len(images):
        images = images[index]
    images = images.to(device)
    if source.image is not None and images.shape[-2:] != (source.image, source.image):
        images = _resize(images, source.image)
    return images


def _resize(images: torch.Tensor, side: int) -> torch.Tensor:
    count, channels = images.shape[:2]
    if images.device.type == "cpu":
        require(count * channels * side * side, f"{count} images at {side} pixels")
    resized = images.new_empty(count, channels, side, side)
    step = max(1, _CHUNK // (channels * side * side))
    for start in range(0, count, step):
        some = images[start : start + step].float()
        some = nn.functional.interpolate(some, (side, side), mode="bilinear", antialias=True)
        resized[start : start + step] = some.round().clamp(0, 255).byte()
    return resized


def _statistics(parts: list[torch.Tensor]) -> tuple[tuple, tuple]:
    """Mean and standard deviation of each channel, to four digits, with pixels from 0 to 1; exact integer sums."""
    total: torch.Tensor | int = 0
    square: torch.Tensor | int = 0
    pixels = 0
    for images in parts:
        for some in images.split(max(1, _CHUNK // images[0].numel())):  # (n, C, H, W)
            total = total + some.sum((0, 2, 3)).cpu()
            square = square + some.int().square().sum((0, 2, 3)).cpu()
            pixels += some.numel() // some.shape[1]
    assert isinstance(total, torch.Tensor) and isinstance(square, torch.Tensor)  # a training set has images
    mean = total.double() / pixels
    std = (square.double() / pixels - mean.square()).sqrt()
    digits = [tuple(round(value / 255, 4) for value in values.tolist()) for values in (mean, std)]
    return digits[0], digits[1]
