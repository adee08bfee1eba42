"""Data sets as uint8 tensors on the training device, and batches of them: cropped, flipped, augmented, normalised.

`load` reads a data set by name and holds out the validation split that chooses epochs and architectures; `batches`
walks a split. Nothing here is done image by image: augmentation is tensor operations over many images at once, on the
device where they live, with a draw of its own for each image.

Letters in the shape comments: B batch, C channels, H height, W width, n images of a split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .augment import autoaugment, crop
from .sources import DATA, Source, choose, require

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
        name: a key of `sources.DATA`, used or refused; or "auto": Fashion-MNIST if it is there or can be had, else the
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
        name, chosen = choose(root)
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
    total = square = pixels = 0
    for images in parts:
        for some in images.split(max(1, _CHUNK // images[0].numel())):  # (n, C, H, W)
            total = total + some.sum((0, 2, 3)).cpu()
            square = square + some.int().square().sum((0, 2, 3)).cpu()
            pixels += some.numel() // some.shape[1]
    mean = total.double() / pixels
    std = (square.double() / pixels - mean.square()).sqrt()
    return tuple(tuple(round(value / 255, 4) for value in values.tolist()) for values in (mean, std))
