"""Augmentation of whole batches where they live: crops, mirror images, AutoAugment's CIFAR-10 policy, RandAugment.

Every image has a draw of its own; images that drew the same operation go through it together, as one batch.

Letters in the shape comments: B batch, C channels, H height, W width.
"""

import functools
import math

import torch
from torch import nn

from ..compat import torchvision

Part = tuple[int, torch.Tensor]  # of how many images drawn for, which ones are here


def crop(images: torch.Tensor, flip: bool, generator: torch.Generator, part: Part | None = None) -> torch.Tensor:
    """A random crop of each image after zero padding and, if `flip`, its mirror image half of the time.

    Args:
        images: uint8 (B, C, H, W).
        flip: whether to mirror.
        generator: on the CPU.
        part: where several processes share a batch, how many images it has and which of them these are: all that is
            drawn is drawn for the whole batch, so that an image is treated alike whatever process has it.

    Returns:
        uint8 (B, C, H, W), zero where a crop reaches over the border. See `batches` for the padding.
    """
    count, channels, height, width = images.shape
    whole, here = part or (count, torch.arange(count))
    pad = max(1, min(4, min(height, width) // 8))
    corner = torch.randint(2 * pad + 1, (whole, 2, 1), generator=generator)[here]
    rows = corner[:, 0] + torch.arange(height)  # (B, H), in the padded image
    columns = corner[:, 1] + torch.arange(width)  # (B, W)
    if flip:
        mirrored = torch.rand(whole, 1, generator=generator)[here] < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    pixels = rows.unsqueeze(2) * (width + 2 * pad) + columns.unsqueeze(1)  # (B, H, W), counted row by row
    pixels = pixels.view(count, 1, -1).to(images.device).expand(-1, channels, -1)
    padded = nn.functional.pad(images, (pad,) * 4)
    return padded.flatten(2).gather(2, pixels).view_as(images)  # (B, C, H, W)


# AutoAugment's policy for CIFAR-10 (arXiv 1805.09501, appendix): 25 sub-policies of two steps, each an operation, its
# probability, and its level from 0 to 9 (None where the operation has no strength).
POLICY = (
    (("invert", 0.1, None), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, None), ("equalize", 0.9, None)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, None), ("equalize", 0.5, None)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, None), ("autocontrast", 0.4, None)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, None)),
    (("equalize", 0.2, None), ("autocontrast", 0.6, None)),
    (("equalize", 0.2, None), ("equalize", 0.6, None)),
    (("color", 0.9, 9), ("equalize", 0.6, None)),
    (("autocontrast", 0.8, None), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, None)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, None), ("solarize", 0.8, 3)),
    (("equalize", 0.8, None), ("invert", 0.1, None)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, None)),
)
# These push to either side, half of the time each.
SIGNED = ("shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast", "sharpness")
_GREY = 128  # fills what a shear, shift or turn leaves empty, as in the published implementations for CIFAR


@functools.cache
def operations() -> dict:
    """Name -> function of images, uint8 (B, C, H, W), and a strength in [-1, 1], the signed level over 9."""
    functional = torchvision("transforms.v2.functional")

    def move(images, right=0.0, down=0.0, shear=0.0, center=None):
        shift = [int(right), int(down)]
        return functional.affine(images, 0.0, shift, 1.0, [0.0, shear], fill=float(_GREY), center=center)

    def move_x(images, shear):
        return functional.affine(images, 0.0, [0, 0], 1.0, [shear, 0.0], fill=float(_GREY), center=[0.0, 0.0])

    reach = 150 / 331  # of a side: the furthest shift, 150 pixels of the 331 that the policy was once searched with
    return {
        "identity": lambda x, s: x,
        "shear_x": lambda x, s: move_x(x, math.degrees(math.atan(0.3 * s))),
        "shear_y": lambda x, s: move(x, shear=math.degrees(math.atan(0.3 * s)), center=[0.0, 0.0]),
        "translate_x": lambda x, s: move(x, right=reach * x.shape[-1] * s),
        "translate_y": lambda x, s: move(x, down=reach * x.shape[-2] * s),
        "rotate": lambda x, s: functional.rotate(x, 30 * s, fill=float(_GREY)),
        "brightness": lambda x, s: functional.adjust_brightness(x, 1 + 0.9 * s),
        "color": lambda x, s: functional.adjust_saturation(x, 1 + 0.9 * s),
        "contrast": lambda x, s: functional.adjust_contrast(x, 1 + 0.9 * s),
        "sharpness": lambda x, s: functional.adjust_sharpness(x, 1 + 0.9 * s),
        "posterize": lambda x, s: functional.posterize(x, 8 - round(4 * s)),
        "solarize": lambda x, s: functional.solarize(x, 255 * (1 - s)),
        "autocontrast": lambda x, s: functional.autocontrast(x),
        "equalize": lambda x, s: functional.equalize(x),
        "invert": lambda x, s: functional.invert(x),
    }


def _tables() -> tuple:
    """The policy as tensors.

    Returns:
        The distinct steps, (operation, strength), the first one idle; the step of (sub-policy, position, sign); the
        probability of (sub-policy, position).
    """
    steps, index = [("identity", 0.0)], []
    for pair in POLICY:
        for name, _, level in pair:
            for sign in (1, -1) if name in SIGNED else (1, 1):
                step = (name, sign * (level or 0) / 9)
                if step not in steps:
                    steps.append(step)
                index.append(steps.index(step))
    chance = torch.tensor([[step[1] for step in pair] for pair in POLICY])
    return steps, torch.tensor(index).view(len(POLICY), 2, 2), chance


STEPS, _STEP, _CHANCE = _tables()


def draw_steps(count: int, generator: torch.Generator) -> torch.Tensor:
    """For each of `count` images, the two steps drawn from the policy: int64 (count, 2), indices into `STEPS`."""
    policy = torch.randint(len(POLICY), (count,), generator=generator)
    acts = torch.rand(count, 2, generator=generator) < _CHANCE[policy]
    sign = torch.randint(2, (count, 2, 1), generator=generator)
    return _STEP[policy].gather(2, sign).squeeze(2) * acts


def autoaugment(images: torch.Tensor, generator: torch.Generator, part: Part | None = None) -> torch.Tensor:
    """AutoAugment's CIFAR-10 policy, drawn for each image; images that drew the same step go through it together.

    Args:
        images: uint8 (B, C, H, W), C 1 or 3.
        generator: on the CPU.
        part: as in `crop`.

    Returns:
        uint8 (B, C, H, W).
    """
    whole, here = part or (len(images), torch.arange(len(images)))
    return _together(images, STEPS, draw_steps(whole, generator)[here])


# RandAugment's operations (arXiv 1909.13719, Section 3), to either side where they have one, at strength 9 of 10: m9 in
# the words of DeiT's recipe, whose spread of the strength and whose halved probability are left out.
RANDOM = tuple(
    (name, sign * 0.9)
    for name in (
        *("identity", "autocontrast", "equalize", "rotate", "solarize", "color", "posterize", "contrast"),
        *("brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
    )
    for sign in ((1, -1) if name in (*SIGNED, "shear_x") else (1, 1))
)


def randaugment(images: torch.Tensor, generator: torch.Generator, part: Part | None = None) -> torch.Tensor:
    """RandAugment, two operations drawn for each image; images that drew the same one go through it together.

    Args:
        images: uint8 (B, C, H, W), C 1 or 3.
        generator: on the CPU.
        part: as in `crop`.

    Returns:
        uint8 (B, C, H, W).
    """
    whole, here = part or (len(images), torch.arange(len(images)))
    return _together(images, RANDOM, torch.randint(len(RANDOM), (whole, 2), generator=generator)[here])


def erased(
    images: torch.Tensor, share: float, generator: torch.Generator, part: Part | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random erasing (Zhong et al., 2020): a rectangle of 2 to 33 % of some images, to be filled with normal noise.

    Args:
        images: (B, C, H, W), of which only the shape counts.
        share: of the images that lose a rectangle.
        generator: on the CPU.
        part: as in `crop`.

    Returns:
        where it is, (B, 1, H, W), and the noise, (B, C, H, W), on the images' device.
    """
    count, channels, height, width = images.shape
    whole, here = part or (count, torch.arange(count))
    acts, area, aspect, top, left = torch.rand(5, whole, 1, generator=generator)[:, here]
    pixels = (0.02 + (1 / 3 - 0.02) * area) * height * width
    ratio = torch.exp((2 * aspect - 1) * math.log(0.3))  # height to width, 0.3 to 1 / 0.3
    sides = ((pixels * ratio).sqrt().round().clamp(1, height), (pixels / ratio).sqrt().round().clamp(1, width))
    starts = ((top * (height - sides[0] + 1)).floor(), (left * (width - sides[1] + 1)).floor())
    spans = [
        (torch.arange(length) >= start) & (torch.arange(length) < start + side)
        for length, start, side in zip((height, width), starts, sides, strict=True)
    ]
    where = spans[0].unsqueeze(2) & spans[1].unsqueeze(1) & (acts < share).unsqueeze(2)  # (B, H, W)
    noise = torch.randn(whole, channels, height, width, generator=generator)[here]
    return where.unsqueeze(1).to(images.device), noise.to(images.device)


def _together(images: torch.Tensor, steps: tuple | list, draws: torch.Tensor) -> torch.Tensor:
    """Each image through the steps that it drew, (B, 2); those that drew the same one as one batch."""
    known = operations()
    for step in draws.unbind(1):
        order = step.argsort(stable=True).to(images.device)
        drawn, counts = step.unique(return_counts=True)
        groups = images[order].split(counts.tolist())
        done = [known[steps[i][0]](group, steps[i][1]) for i, group in zip(drawn.tolist(), groups, strict=True)]
        images = torch.empty_like(images).index_copy_(0, order, torch.cat(done))
    return images
