"""Cropping, flipping, and AutoAugment against torchvision's own."""

import collections
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_load import generator, numbered, pictures

from salvit_core import compat
from salvit_core import datasets as data
from salvit_core.datasets import augment

compat.repair()
load = sys.modules[data.load.__module__]  # the module; the package's `load` is its function
from torchvision.transforms import v2  # noqa: E402

# crop and flip


@pytest.mark.parametrize(("side", "pad"), [(8, 1), (28, 3), (32, 4), (64, 4)])
@pytest.mark.parametrize("flip", [False, True])
def test_every_crop_is_a_window_of_the_padded_image_or_its_mirror(side, pad, flip):
    image = pictures(1, side=side)
    count = 1200
    found = augment.crop(image.repeat(count, 1, 1, 1), flip, generator())
    assert found.shape == (count, 3, side, side) and found.dtype == torch.uint8
    padded = torch.nn.functional.pad(image[0], (pad,) * 4)
    windows = {}
    for y in range(2 * pad + 1):
        for x in range(2 * pad + 1):
            window = padded[:, y : y + side, x : x + side]
            windows[window.numpy().tobytes()] = (y, x, False)
            windows[window.flip(-1).numpy().tobytes()] = (y, x, True)
    drawn = collections.Counter(windows[one.numpy().tobytes()] for one in found)  # KeyError: not a window
    places = (2 * pad + 1) ** 2
    assert len({place[:2] for place in drawn}) == places  # every shift is reached
    mirrored = sum(n for place, n in drawn.items() if place[2])
    assert abs(mirrored - count / 2) < 4 * (count / 4) ** 0.5 if flip else mirrored == 0
    assert max(drawn.values()) < 12 * count / places  # no favourite


def test_digits_are_cropped_but_never_mirrored(monkeypatch):
    digits = data.load("digits")
    assert not any(part.flip for part in (digits.train, digits.validation, digits.test))
    seen, crop = [], augment.crop
    monkeypatch.setattr(load, "crop", lambda images, flip, *more: seen.append(flip) or crop(images, flip, *more))
    list(data.batches(digits.train, 256, "crop", generator()))
    list(data.batches(numbered(4), 256, "crop", generator()))
    assert set(seen[:-1]) == {False} and seen[-1] is True


# AutoAugment, against torchvision's own: its policy, its strengths, and its operations on single images

NAMES = {
    "ShearY": "shear_y",
    "TranslateX": "translate_x",
    "TranslateY": "translate_y",
    "Rotate": "rotate",
    "Brightness": "brightness",
    "Color": "color",
    "Contrast": "contrast",
    "Sharpness": "sharpness",
    "Posterize": "posterize",
    "Solarize": "solarize",
    "AutoContrast": "autocontrast",
    "Equalize": "equalize",
    "Invert": "invert",
}
REFERENCE = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=128)


def reference(image, name, strength, side=32):
    """What torchvision makes of one image, a tensor (C, H, W) or a PIL image."""
    if name == "identity":
        return image
    theirs = {ours: theirs for theirs, ours in NAMES.items()}[name]
    space, signed = REFERENCE._AUGMENTATION_SPACE[theirs]
    magnitudes = space(10, side, side)
    level = round(9 * abs(strength))
    magnitude = 0.0 if magnitudes is None else float(magnitudes[level])
    if theirs in ("Brightness", "Color", "Contrast", "Sharpness"):
        magnitude = round(magnitude, 6)  # their float32 0.6000000238 turns a product just below an integer
    if signed and strength < 0:
        magnitude = -magnitude
    return REFERENCE._apply_image_or_video_transform(image, theirs, magnitude, REFERENCE.interpolation, REFERENCE._fill)


def test_the_policy_is_the_published_one():
    published = [tuple((NAMES[name], chance, level) for name, chance, level in pair) for pair in REFERENCE._policies]
    assert list(augment.POLICY) == published
    signed = {NAMES[name] for name, (_, signed) in REFERENCE._AUGMENTATION_SPACE.items() if signed and name in NAMES}
    assert set(augment.SIGNED) == signed


@pytest.mark.parametrize("step", augment.STEPS, ids=lambda step: f"{step[0]}{step[1]:+.2f}")
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28)])
def test_each_operation_on_a_batch_equals_torchvision_on_single_images(step, channels, side):
    name, strength = step
    images = pictures(6, channels, side)
    found = augment.operations()[name](images, strength)
    assert found.shape == images.shape and found.dtype == torch.uint8
    expected = torch.stack([reference(image, name, strength, side) for image in images])
    # a convolution adds up in another order for several images: one level, here and there
    off = (found.int() - expected.int()).abs()
    assert off.max() <= (name == "sharpness") and (off > 0).float().mean() < 0.01
    if name != "identity" and strength and not (name == "color" and channels == 1):
        assert not torch.equal(found, images)


@pytest.mark.parametrize("step", augment.STEPS, ids=lambda step: f"{step[0]}{step[1]:+.2f}")
def test_each_operation_agrees_with_pillow(step):
    name, strength = step
    images = pictures(6)
    found = augment.operations()[name](images, strength).int()
    singles = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    expected = torch.stack(
        [torch.from_numpy(np.array(reference(one, name, strength))).permute(2, 0, 1) for one in singles]
    ).int()
    close = (found - expected).abs() <= 1
    # Where a turn or shear falls between two pixels, the two round differently now and then.
    # A threshold that is a grey level itself, 170, is above it for one and not for the other.
    least = 0.97 if name in ("rotate", "shear_y", "solarize") else 1.0
    assert close.float().mean() >= least


@pytest.mark.parametrize("channels", [1, 3])
def test_autoaugment_puts_each_image_through_its_own_two_steps(channels):
    images = pictures(300, channels)
    before = images.clone()
    found = augment.autoaugment(images, generator(5))
    assert torch.equal(images, before)  # the data set is not written to
    steps = augment.draw_steps(300, generator(5))
    assert steps.shape == (300, 2) and len(steps.unique()) > 30
    for image, pair, result in zip(images, steps.tolist(), found, strict=True):
        for step in pair:
            image = reference(image, *augment.STEPS[step])
        off = (image.int() - result.int()).abs()
        sharpened = "sharpness" in {augment.STEPS[step][0] for step in pair}
        assert off.max() <= 3 * sharpened and (off > 0).float().mean() < 0.02


def test_identical_images_part_ways():
    found = augment.autoaugment(pictures(1).repeat(500, 1, 1, 1), generator())
    assert len({image.numpy().tobytes() for image in found}) > 40


def test_steps_are_drawn_as_often_as_the_policy_says():
    count = 200_000
    steps = augment.draw_steps(count, generator())
    for position in range(2):
        expected = collections.Counter()
        for pair in REFERENCE._policies:
            name, chance, level = pair[position]
            signs = (1, -1) if REFERENCE._AUGMENTATION_SPACE[name][1] else (1,)
            for sign in signs:
                expected[NAMES[name], round(sign * (level or 0) / 9, 6) + 0.0] += chance / 25 / len(signs)
            expected["identity", 0.0] += (1 - chance) / 25
        drawn = steps[:, position].bincount(minlength=len(augment.STEPS)) / count
        found = collections.Counter()
        for (name, strength), share in zip(augment.STEPS, drawn.tolist(), strict=True):
            found[name, round(strength, 6) + 0.0] += share
        for step in {*expected, *found}:
            p = expected[step]
            assert abs(found[step] - p) <= 5 * (p * (1 - p) / count) ** 0.5, step
    # the two steps of an image come from one sub-policy: invert is followed by contrast or nothing
    first, second = ([augment.STEPS[step][0] for step in steps[:, k].tolist()] for k in range(2))
    assert {b for a, b in zip(first, second, strict=True) if a == "invert"} == {"contrast", "identity"}
    assert {b for a, b in zip(first, second, strict=True) if a == "rotate"} == {"translate_x", "identity"}


# RandAugment and random erasing


def test_randaugment_draws_two_operations_of_fourteen_for_each_image():
    assert len({name for name, _ in augment.RANDOM}) == 14
    assert {abs(strength) for _, strength in augment.RANDOM} == {0.9}
    images = torch.randint(256, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    first, again = (augment.randaugment(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, images)
    known = augment.operations()
    draws = torch.randint(len(augment.RANDOM), (64, 2), generator=torch.Generator().manual_seed(1))
    for image, steps, wanted in zip(images, draws.tolist(), first):
        for step in steps:
            name, strength = augment.RANDOM[step]
            image = known[name](image[None], strength)[0]
        assert torch.equal(image, wanted)


def test_erasing_takes_a_rectangle_of_a_share_of_the_images():
    images = torch.zeros(2000, 1, 20, 30)
    where, noise = augment.erased(images, 0.25, torch.Generator().manual_seed(0))
    gone = where.flatten(1).double().mean(1)
    assert where.shape == (2000, 1, 20, 30) and noise.shape == images.shape
    assert (gone > 0).double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert gone[gone > 0].min() > 0.01 and gone.max() <= 0.36 and gone[gone > 0].mean() > 0.1
    for each in where[gone > 0][:50, 0]:  # whole rectangles
        rows, columns = each.any(1), each.any(0)
        assert each.sum() == rows.sum() * columns.sum()
    assert noise.std().item() == pytest.approx(1, abs=0.01)


def test_processes_erase_and_augment_an_image_alike(few_digits):
    def drawn(part):
        generator = torch.Generator().manual_seed(3)
        return list(data.batches(few_digits.train, 50, "randaugment", generator, part=part, erase=0.5))

    whole, parts = drawn((0, 1)), [drawn((rank, 2)) for rank in range(2)]
    for batch, *halves in zip(whole, *parts):
        for rank, half in enumerate(halves):
            assert torch.equal(batch[0][rank::2], half[0]) and torch.equal(batch[1][rank::2], half[1])
    plain = list(data.batches(few_digits.train, 50, "randaugment", torch.Generator().manual_seed(3)))
    assert any(not torch.equal(a, b) for (a, _), (b, _) in zip(whole, plain))
