"""How a network is trained, as plain data, and what follows from it alone: learning rate and precision."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch

from ..datasets.load import AUGMENT
from ..fields import Among, Checked, Count, CountOrNone, Positive, Range, Seed, Share, Weight

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


@dataclass(frozen=True)
class Recipe(Checked):
    """How a network is trained, as plain data; the defaults are the paper's for CIFAR (Section 4; facts: training).

    But for the optimizer: AdamW, as in the released code, where the paper names Adam.

    Raises:
        ValueError: a value of another type, unknown or out of range.
    """

    epochs: Count = 600
    """Passes over the training images."""
    batch: Count = 256
    """Images per step, over all processes."""
    lr: Positive = 6e-4
    """Learning rate after warming up."""
    optimizer: Annotated[str, Among(*OPTIMIZERS)] = "adamw"
    """"adamw", or "adam", which couples weight decay to the gradient."""
    sgd: tuple[str, ...] = ()
    """Parameters that plain gradient descent trains instead, at the same rate and undecayed: those whose dotted name
    has one of these words as a part, such as "alpha"."""
    weight_decay: Weight = 0.06
    """Of weights; what else it acts on: --decay-all."""
    decay_all: bool = False
    """Decay biases, norms, positions, c, d and alpha too, as the released code does."""
    warmup: CountOrNone = 10
    """Epochs of warming up; never more than a fifth of them all."""
    label_smoothing: Share = 0.1
    """Share of the target that is spread over all classes."""
    augment: Annotated[str, Among(*AUGMENT)] = "autoaugment"
    """"none", "crop", "autoaugment" or "randaugment"."""
    erase: Share = 0.0
    """Share of the images in which a rectangle is erased."""
    clip: Weight = 0.0
    """Largest norm of the gradient; 0: any."""
    cross_entropy: Weight = 1.0
    """Weight of the labels in the loss."""
    distill_logits: Weight = 0.0
    """Weight of the teacher's logits in the loss."""
    distill_features: Weight = 0.0
    """Weight of the teacher's last features in the loss."""
    distill_blocks: Weight = 0.0
    """Weight of the cosine losses between the outputs of the blocks and those of the teacher's, summed over blocks."""
    distill_attention: Weight = 0.0
    """Weight of the cosine losses between the attention outputs before their projections, summed over blocks."""
    temperature: Annotated[float, Range(0, 1e6, open=True)] = 4.0
    """Of both softmaxes where logits are distilled."""
    keep: Annotated[str, Among("best", "last")] = "best"
    """Whose weights the model ends with: "best", the epoch best in validation, or "last"."""
    bf16: bool = False
    """Autocast to bfloat16 where the device multiplies in it."""
    channels_last: bool = False
    """Memory order of the tokenizer's convolutions."""
    compile: bool = False
    """Compile the network with torch.compile."""
    seed: Seed = 0
    """Of initial weights, batches, augmentation, dropout and stochastic depth."""

    def ignored(self) -> set[str]:
        """The fields that this training does not depend on."""
        return set() if self.distill_logits else {"temperature"}

    @property
    def distills(self) -> bool:
        """Whether a teacher has a part in the loss."""
        return bool(self.distill_logits or self.distill_features or self.distill_blocks or self.distill_attention)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bfloat16.

    An accelerator is taken to have them. Of processors, those with AVX-512 BF16 or AMX do; one that has to imitate them
    (AVX2, AMD EPYC) trains seven times slower than in float32.
    """
    if device.type != "cpu":
        return True
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.11
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def autocast(wanted: bool, device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 if it is wanted and the device multiplies in it; else a context that does nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and multiplies_bf16(device))


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """The learning rate of an epoch (from 0): lr / (warmup - epoch) while warming up, then half a cosine towards 0."""
    warmup = min(recipe.warmup, recipe.epochs // 5)
    if epoch < warmup:
        return recipe.lr / (warmup - epoch)
    return recipe.lr * (1 + math.cos(math.pi * (epoch - warmup) / (recipe.epochs - warmup))) / 2
