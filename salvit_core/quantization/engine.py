"""Post-training quantization after Trio-ViT (arXiv 2405.03882, Section III): from a trained network, in three steps.

    found = quantize(model, images, Quantization(bits_weights=4), measure=lambda network: accuracy)
    found["network"], found["float"], found["nearest"], found["weights"], found["activations"]

1. `prepared`: batch norms folded, ranges evened out by migration and shift, weights rounded to the nearest.
2. `learn_weights`: block by block, each weight is rounded up or down so that the block's output stays that of the
   network in float (AdaRound, Nagel et al., 2020), given what the blocks before make of it, quantized as they are
   (BRECQ, Li et al., 2021).
3. `learn_activations`: block by block again, the steps of what the layers read, by the same measure. Outside an
   EfficientViT a block is one layer: the steps of products of activations are searched there, not learnt.

After every block all is on disk, if asked for, and a run that was killed goes on after the last one.

Letters in the shape comments: B batch, C channels, n calibration images.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn
from tqdm.auto import tqdm

from .. import workspace
from ..datasets import Split
from ..fields import Checked, Count, Positive, Range, Seed, Weight
from ..models.config import Network, config_of
from ..models.efficientvit import EfficientViT
from ..models.foreign import adopt
from ..models.graph import trace
from ..models.vit import build
from ..training.checkpoint import continued, digest, loaded
from .layers import (
    QuantizedLayer,
    computing,
    evened,
    folded,
    layers_of,
    migration,
    put,
    put_products,
    quantizers_of,
    shift,
    switch,
)

TRICKS = ("migration", "shift", "log2", "reconstruction")  # each can be left out
Bits = Annotated[int, Range(1, 16)]
ENDS = 8  # bits of the first and the last layer
WARM = 0.2  # share of the steps before the regulariser sets in
BETAS = 20.0, 2.0  # its exponent, from the first to the last
STAGES = ("float", "nearest", "weights", "activations")
AT_A_TIME = 128  # images of a forward pass without gradients


@dataclass(frozen=True)
class Quantization(Checked):
    """How a network is quantized, as plain data; the defaults are the published ones, but for `regulariser`.

    0.5 is what the released readme runs with; its code has 0.01 (which was worse at 4 bits: other systems' logs).

    Raises:
        ValueError: a value of another type or out of range.
    """

    bits_weights: Annotated[Bits, tyro.conf.arg(aliases=["--n-bits-w"])] = 8
    """Bits of weights (released: --n_bits_w)."""
    bits_activations: Annotated[Bits, tyro.conf.arg(aliases=["--n-bits-a"])] = 8
    """Bits of what layers read (released: --n_bits_a)."""
    activations: Annotated[bool, tyro.conf.arg(aliases=["--act-quant"])] = True
    """Quantize these, not weights alone (released: --act_quant)."""
    per_channel: Annotated[bool, tyro.conf.arg(aliases=["--channel-wise"])] = True
    """A grid of weights for each output channel, not one for the layer (released: --channel_wise)."""
    same_ends: Annotated[bool, tyro.conf.arg(aliases=["--disable-8bit-head-stem"])] = False
    """First and last layer at the others' bits, not at 8 (released: --disable_8bit_head_stem)."""
    regulariser: Annotated[Weight, tyro.conf.arg(aliases=["--weight"])] = 0.5
    """Weight of the rounding regulariser, lambda (released: --weight)."""
    migration: bool = True
    """Even out what depth-wise convolutions read, channel by channel, by factors."""
    shift: bool = True
    """Centre what MBConv's last convolution reads, channel by channel."""
    log2: bool = True
    """Divide attention's numerators by powers of two, once activations are quantized."""
    reconstruction: bool = True
    """Learn rounding and steps block by block; otherwise the nearest and the searched."""
    images: Annotated[Count, tyro.conf.arg(aliases=["--num-samples"])] = 1024
    """Calibration images."""
    batch: Count = 32
    """Of them in a step."""
    iterations: Annotated[Count, tyro.conf.arg(aliases=["--iters-w"])] = 20000
    """Steps of learnt rounding, each block."""
    lr: Positive = 1e-3
    """Of learnt rounding (Adam)."""
    iterations_activations: Annotated[Count, tyro.conf.arg(aliases=["--iters-a"])] = 5000
    """Steps of learning activations' step sizes, each block."""
    lr_activations: Positive = 4e-4
    """Of these, relative to the step (Adam, to zero by half a cosine)."""
    seed: Seed = 1005
    """Of the choice of calibration images and of batches."""

    def ignored(self) -> set[str]:
        """The fields that the result does not depend on."""
        of_activations = {"bits_activations", "log2", "iterations_activations", "lr_activations"}
        of_learning = {"regulariser", "batch", "iterations", "lr", "iterations_activations", "lr_activations"}
        return (set() if self.activations else of_activations) | (set() if self.reconstruction else of_learning)

    def weights_alone(self) -> "Quantization":
        """What quantizations have in common that differ in what concerns activations: their weights are the same."""
        kept = {name: getattr(Quantization, name) for name in ("bits_activations", "log2", "iterations_activations")}
        return dataclasses.replace(self, activations=False, lr_activations=Quantization.lr_activations, **kept)


def drawn(split: Split, count: int, seed: int) -> torch.Tensor:
    """Calibration images of a split, normalised, (n, C, height, width).

    Raises:
        ValueError: fewer images than asked for.
    """
    there = len(split.labels)
    if count > there:
        raise ValueError(f"images is {count}: there are {there} to calibrate with, give at most as many")
    order = torch.randperm(there, generator=torch.Generator().manual_seed(seed))[:count]
    return split.normalised(split.images[order.to(split.images.device)])


def prepared(model: nn.Module, images: torch.Tensor, options: Quantization) -> tuple[nn.Module, nn.Module]:
    """The network in float, batch norms folded, and the same with weights rounded to the nearest.

    An EfficientViT is taken as the modules that it is; any other network as a graph of operations, in which
    convolutions, linear maps and products of activations are quantized.

    Args:
        model: a trained network; it is not changed.
        images: (n, C, height, width), normalised, on the model's device.
        options: how.

    Raises:
        ValueError: a network that cannot be read, or that has nothing to quantize.
    """
    config = getattr(model, "config", None)
    ours = isinstance(config, Network)  # others' networks have configurations too
    if isinstance(model, EfficientViT):
        plain = folded(model)
    else:
        plain = trace(model) if ours else adopt(model, images[:2])
    plain = plain.eval().requires_grad_(False)
    layers = computing(plain, images[:1])
    migrated, shifted = evened(layers)
    migrated, shifted = migrated if options.migration else [], shifted if options.shift else []
    evening = {name: {"factor": migration(_read(plain, name, images))} for name in migrated}
    evening |= {name: {"offset": shift(_read(plain, name, images))} for name in shifted}
    network = _quantized(plain, layers, evening, options)
    if ours:
        network.config = config  # a graph has none of its own, and a file needs it (`save`)
    return plain, network


def _quantized(plain: nn.Module, layers: dict, evening: dict[str, dict], options: Quantization) -> nn.Module:
    network = deepcopy(plain)
    ends = {next(iter(layers)), next(reversed(layers))}
    for name in layers:
        bits = options.bits_weights, options.bits_activations
        if name in ends and not options.same_ends:
            bits = ENDS, ENDS
        made = QuantizedLayer(network.get_submodule(name), *bits, options.per_channel, **evening.get(name, {}))
        put(network, name, made)
    put_products(network, options.bits_activations, options.log2)
    switch(network, weights=True, activations=False)
    return network


def blocks_of(network: nn.Module) -> list[str]:
    """Names of what is reconstructed as one, in order.

    An EfficientViT's stem convolutions, blocks, pooling and head; of another network every layer for itself.
    """
    if isinstance(network, EfficientViT):
        parts = [network.tokenizer.conv, *network.tokenizer.separable, *network.blocks, network.pool, network.head]
    else:
        parts = list(layers_of(network))
    names = {id(module): name for name, module in network.named_modules()}
    return [names[id(part)] for part in parts]


class _Enough(Exception):
    """Ends a forward pass when what was wanted is there."""


def _captured(network: nn.Module, name: str, images: torch.Tensor, result: bool) -> torch.Tensor:
    """What a part of a network reads, or makes, of all images."""
    found: list[torch.Tensor] = []

    def made(module, inputs, made):
        found.append(made.detach())
        raise _Enough

    def read(module, inputs):
        found.append(inputs[0].detach())
        raise _Enough

    part = network.get_submodule(name)
    hook = part.register_forward_hook(made) if result else part.register_forward_pre_hook(read)
    try:
        with torch.no_grad():
            for some in images.split(AT_A_TIME):
                try:
                    network(some)
                except _Enough:
                    continue
    finally:
        hook.remove()
    return torch.cat(found)


def _read(network: nn.Module, name: str, images: torch.Tensor) -> torch.Tensor:
    return _captured(network, name, images, result=False)


def _distance(block: nn.Module, made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared error, summed over channels, its mean over images and places."""
    error = (made - wanted).square()
    linear = isinstance(block, QuantizedLayer) and block.convolution is None  # its channels are last, as in a token
    return error.sum(1 if error.dim() == 4 and not linear else -1).mean()


def _batches(count: int, size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(count, (size,), generator=generator) for _ in range(steps))


def reconstruct_weights(
    block: nn.Module, inputs: torch.Tensor, wanted: torch.Tensor, options: Quantization, seed: int
) -> dict:
    """Learn the rounding of a block's weights: |block(x) - wanted|^2 + lambda sum (1 - |2 h - 1|^beta).

    beta falls from 20 to 2; the regulariser sets in after a fifth of the steps. In the end every weight is on its grid.

    Args:
        block: a block with quantized layers; all of these end in hard rounding.
        inputs: (n, ...), what it reads.
        wanted: (n, ...), what it is to make of them.
        options: how.
        seed: of the batches.

    Returns:
        the block's error before and after, and `undecided`, the share of weights that hard rounding moved by more than
        0.01 of a step in the end.
    """
    layers = list(layers_of(block))
    with torch.no_grad():
        before = _error(block, inputs, wanted)
    roundings = [layer.begin() for layer in layers]
    optimizer = torch.optim.Adam([rounding.v for rounding in roundings], options.lr)
    warm = WARM * options.iterations
    for step, drawn in enumerate(_batches(len(inputs), options.batch, options.iterations, seed)):
        loss = _distance(block, block(inputs[drawn]), wanted[drawn])
        if step >= warm and options.regulariser:
            part = (step - warm) / (options.iterations - warm)
            beta = BETAS[0] + (BETAS[1] - BETAS[0]) * part
            loss = loss + options.regulariser * sum(rounding.regulariser(beta) for rounding in roundings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss of learnt rounding is {loss.item()} at step {step}: lower lr")
    with torch.no_grad():
        soft = torch.cat([rounding.soft().flatten() for rounding in roundings])
        undecided = float((torch.minimum(soft, 1 - soft) > 0.01).float().mean())
        for layer in layers:
            layer.harden()
        return {"before": before, "after": _error(block, inputs, wanted), "undecided": undecided}


def reconstruct_activations(
    block: nn.Module, inputs: torch.Tensor, wanted: torch.Tensor, options: Quantization, seed: int
) -> dict:
    """Search the steps of what a block's layers read, then learn all of them: |block(x) - wanted|^2.

    Those that were searched stay where those that were learnt do no better, which happens: the search is near the best.

    Args:
        block: a block with quantizers, which are on, and hard rounding.
        inputs: (n, ...), what it reads.
        wanted: (n, ...), what it is to make of them.
        options: how.
        seed: of the batches.

    Returns:
        the block's error before and after.
    """
    with torch.no_grad():
        block(inputs[: 2 * AT_A_TIME])  # quantizers take the range of the first that they see
        before = _error(block, inputs, wanted)
    steps = [quantizer.step for quantizer in quantizers_of(block)]
    if options.reconstruction:
        # Relative to each step: of 8 bits one is thousandths, and absolute rates would move it by a part of itself.
        searched = [step.detach().clone() for step in steps]
        groups = [
            {"params": [step], "lr": options.lr_activations * float(at)}
            for step, at in zip(steps, searched, strict=True)
        ]
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.iterations_activations)
        for drawn in _batches(len(inputs), options.batch, options.iterations_activations, seed):
            loss = _distance(block, block(inputs[drawn]), wanted[drawn])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            if (after := _error(block, inputs, wanted)) < before:
                return {"before": before, "after": after}
            for step, at in zip(steps, searched, strict=True):
                step.copy_(at)
    return {"before": before, "after": before}


def _error(block: nn.Module, inputs: torch.Tensor, wanted: torch.Tensor) -> float:
    parts = zip(inputs.split(AT_A_TIME), wanted.split(AT_A_TIME), strict=True)
    return sum(float(_distance(block, block(x), y)) * len(x) for x, y in parts) / len(inputs)


# From block to block, and on disk


def _walk(
    reconstruct: Callable, plain: nn.Module, network: nn.Module, images, options, path: Path | None, said: dict
) -> list[dict]:
    """Reconstruct block after block; what a file has of them is taken from it."""
    names, history = blocks_of(network), []
    if path is not None:
        workspace.try_out(path)
        if path.exists():
            content = continued(path, said, ("model", "history"))
            network.load_state_dict(content["model"])
            history = content["history"]
    bar = tqdm(names, desc=reconstruct.__name__.replace("_", " "), initial=len(history), disable=None, delay=10)
    for number, name in list(enumerate(names))[len(history) :]:
        wanted = _captured(plain, name, images, result=True)
        inputs = _read(network, name, images)
        block = network.get_submodule(name)
        history.append({"block": name, **reconstruct(block, inputs, wanted, options, options.seed + number)})
        if path is not None:
            _save({"identity": said, "model": network.state_dict(), "history": history}, path)
        bar.update()
    bar.close()
    return history


def learn_weights(
    plain: nn.Module, network: nn.Module, images: torch.Tensor, options: Quantization, path: Path | None = None
) -> list[dict]:
    """Step 2: the rounding of all weights, block by block; activations stay as they are.

    Args:
        plain: the network in float, from `prepared`.
        network: the other one; its weights are on their grids in the end.
        images: (n, C, height, width), normalised.
        options: how.
        path: file to write after every block, and to go on from.

    Returns:
        one dict per block: its name, and what `reconstruct_weights` says.

    Raises:
        ValueError: a file of another quantization.
        OSError: a file that cannot be written or read.
    """
    switch(network, weights=True, activations=False)
    said = _identity(plain, images, options.weights_alone())
    return _walk(reconstruct_weights, plain, network, images, options, path, said)


def learn_activations(
    plain: nn.Module, network: nn.Module, images: torch.Tensor, options: Quantization, path: Path | None = None
) -> list[dict]:
    """Step 3: the steps of all that blocks read inside, block by block, and quantization of activations on.

    In an EfficientViT these are all activations. In other networks products of activations lie between the blocks,
    which are layers: their steps stay as the search finds them.

    Args, returns, raises: as `learn_weights`, after which it is called.
    """
    switch(network, weights=True, activations=True)
    said = _identity(plain, images, options) | {"rounding": digest(*(layer.codes for layer in layers_of(network)))}
    return _walk(reconstruct_activations, plain, network, images, options, path, said)


def _identity(plain: nn.Module, images: torch.Tensor, options: Quantization) -> dict:
    kept = {name: value for name, value in dataclasses.asdict(options).items() if name not in options.ignored()}
    return {"network": digest(*plain.state_dict().values()), "images": digest(images), **kept}


def quantize(
    model: nn.Module,
    images: torch.Tensor,
    options: Quantization,
    measure: Callable[[nn.Module], Any] | None = None,
    folder: Path | None = None,
    shared: Path | None = None,
    say: Callable[[str, Any], None] | None = None,
    stages: Collection[str] = STAGES,
) -> dict:
    """Quantize a network.

    Args:
        model: trained; it is not changed.
        images: (n, C, height, width), normalised as the network reads them, on its device.
        options: how; as many images as there are count, whatever `options.images` says.
        measure: of a network, such as its accuracy; asked of each stage.
        folder: where progress is kept, block by block; run again with the same, it goes on.
        shared: where that of the weights is kept, which quantizations with the same `weights_alone` share. Default:
            folder.
        say: told each stage and its measure as soon as it is known.
        stages: that are measured, of `STAGES`.

    Returns:
        "network", quantized, in evaluation mode; the measure of "float", of "nearest" (weights rounded so, activations
        in float), of "weights" after reconstruction and of "activations", where they are quantized; "history", what
        each stage says of each block.

    Raises:
        ValueError: as `prepared`, or progress of another quantization in the folder.
        OSError: the folder cannot be written.
    """
    if images.dim() == 4:
        images = images.contiguous(memory_format=torch.channels_last)  # a third less time on a processor
    plain, network = prepared(model, images, options)
    found: dict[str, Any] = {"history": []}

    def stage(name: str, of: nn.Module) -> None:
        if measure is not None and name in stages:
            found[name] = measure(of)
            if say is not None:
                say(name, found[name])

    stage("float", plain)
    stage("nearest", network)
    if options.reconstruction:
        where = shared or folder
        path = None if where is None else where / "weights.pt"
        found["history"] += learn_weights(plain, network, images, options, path)
    stage("weights", network)
    if options.activations:
        path = None if folder is None else folder / "activations.pt"
        found["history"] += learn_activations(plain, network, images, options, path)
        stage("activations", network)
    return found | {"network": network.eval()}


# A quantized network in a file


def save(network: nn.Module, options: Quantization, path: Path) -> None:
    """Write a quantized network of a configuration of this project: its weights as whole numbers of a byte.

    Raises:
        ValueError: a network that others wrote, which a file cannot make again.
        OSError: as `workspace.write`.
    """
    config = getattr(network, "config", None)
    if not isinstance(config, Network):
        raise ValueError("only networks that have a configuration can be saved: keep the Python object")
    plain = {"config": dataclasses.asdict(config), "options": dataclasses.asdict(options)}
    content = {**plain, "model": network.state_dict()}
    _save(content, path)


def _save(content: dict, path: Path) -> None:
    workspace.write(path, lambda file: torch.save(content, file))


def load(path: Path) -> tuple[nn.Module, Quantization]:
    """A quantized network from a file, as it was saved, in evaluation mode on the CPU; and how it was quantized.

    Raises:
        OSError: the file cannot be read; names it.
        ValueError: it holds no quantized network; names it.
    """
    content = loaded(path, "a quantized network")
    try:
        config, options = config_of(content["config"]), Quantization(**content["options"])
        # What is measured of these images is overwritten by what the file has.
        images = torch.zeros(2, config.channels, config.image, config.image)
        _, network = prepared(build(config), images, options)
        network.load_state_dict(content["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is not a quantized network ({type(error).__name__}: {reason}): delete it") from error
    for layer in layers_of(network):
        layer.weight.copy_(layer.quantized())  # the float ones are not in the file
    switch(network, weights=True, activations=options.activations)
    return network.eval(), options
