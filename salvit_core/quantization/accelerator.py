"""The Trio-ViT accelerator as arithmetic: cycles, utilisation and images per second of a network, layer by layer.

Two arrays of multipliers (arXiv 2405.03882). In a lane of the first, products meet in an adder tree; a lane of the
second can be had so too, or with an accumulator behind each multiplier. Each multiplier does one multiply-add a cycle::

    point-wise, linear  input channels inside a lane, output channels across the lanes of both arrays; pixels, and the
                        taps of a kernel that is larger, one after the other
    depth-wise          on the second array: channels across lanes, pixels of a row inside a lane, taps in turn
    fused               a depth-wise convolution and the point-wise one that follows share their time: the first array
                        computes the latter on what the second has made; the second joins when it has made all
    attention, groups   heads, or groups of channels, are split over the arrays; what is summed over is inside a lane

Where a size is no multiple of what holds it, multipliers idle; where a depth-wise convolution takes longer than the
point-wise one that is fused with it, the first array does.

Left out: memory (every operand is where it is needed, in time: no bandwidth, no buffer, no filling of pipelines between
layers), energy, and what is no multiply-add: activations, sums of keys, divisions and requantization have units of
their own beside the arrays. The roofline alone asks how many bytes a layer moves, and takes a bandwidth that the paper
does not name.

Published are B1's 4.005, 5.186 and 6.729 million cycles at 224, 256 and 288 pixels, and B2's 12.19, 15.82 and 20.38:
all but B1's at 288 fewer than all multiply-adds over 128 multipliers would take. Without the classifier, the layers
"pool" and "head" here, which `backbone` leaves out, they are met within 0.3 %. So are the 2.606 million of an earlier
version for B1 at 224 pixels: 16 lanes, and a second array that does not join. What is published does not say all: that
the stem's taps take turns, that pixels in a lane are of one row and that the second array joins is what meets the
counts.
"""

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated

import pandas as pd
import torch
from torch import fx, nn

from ..fields import Checked, Positive, Range, Size
from ..models.graph import trace
from ..models.operations import MatMul

KINDS = ("convolution", "point-wise", "depth-wise", "fused", "attention")

# The layers of an EfficientViT that the published counts leave out.
CLASSIFIER = ("pool", "head")


@dataclass(frozen=True)
class Work:
    """One product of the network, as the arrays see it: a convolution, a linear map, a product of activations.

    Attributes:
        name: of the module.
        layer: where in the network, "block 3" say.
        kind: one of `KINDS`.
        inside: what is summed over at one tap, such as the input channels of a group.
        outside: what is made of it, such as the output channels of a group.
        groups: of channels, or heads.
        height: of the picture that is made, or its tokens.
        width: of that picture, or one.
        taps: of the kernel.
        read: numbers, of activations.
        weights: numbers.
        written: numbers, of activations.
    """

    name: str
    layer: str
    kind: str
    inside: int
    outside: int
    groups: int
    height: int
    width: int
    taps: int
    read: int
    weights: int
    written: int

    @property
    def multiply_adds(self) -> int:
        """Of one image."""
        return self.groups * self.inside * self.outside * self.taps * self.height * self.width


@dataclass(frozen=True)
class Accelerator(Checked):
    """Sizes and speed of the two arrays.

    Attributes:
        lanes: of each array.
        multipliers: of each lane.
        joins: whether the second array, once its depth-wise convolution is done, helps with the point-wise one.
        clock: Hz.
        bits: of weights and activations, for the bytes that a layer moves.
        bandwidth: bytes per second, of the roofline alone: 64 bits of DDR4-2400, an assumption.

    Raises:
        ValueError: a value of another type or out of range.
    """

    lanes: Size = 8
    multipliers: Size = 8
    joins: bool = True
    clock: Positive = 200e6
    bits: Annotated[int, Range(1, 64)] = 8
    bandwidth: Positive = 19.2e9

    @property
    def multiply_adds(self) -> int:
        """In one cycle at best, of both arrays."""
        return 2 * self.lanes * self.multipliers

    @property
    def peak(self) -> float:
        """Multiply-adds per second at best."""
        return self.multiply_adds * self.clock

    def dense(self, work: Work, arrays: int = 2) -> int:
        """Cycles of a convolution or linear map on so many arrays."""
        sums = work.taps * math.ceil(work.inside / self.multipliers) * work.height * work.width
        if work.groups > 1:
            return math.ceil(work.groups / arrays) * math.ceil(work.outside / self.lanes) * sums
        return math.ceil(work.outside / (arrays * self.lanes)) * sums

    def depthwise(self, work: Work) -> int:
        """Cycles of a depth-wise convolution, on the second array."""
        rows = math.ceil(work.width / self.multipliers) * work.height
        return work.taps * math.ceil(work.groups * work.outside / self.lanes) * rows

    def fused(self, depthwise: Work, pointwise: Work) -> int:
        """Cycles of a depth-wise convolution and of the point-wise one that reads it."""
        first, alone = self.depthwise(depthwise), self.dense(pointwise, arrays=1)
        if not self.joins:
            return max(first, alone)
        left = max(0, alone - first)  # of the first array's cycles, had it to go on alone
        return first - (-left * self.dense(pointwise) // alone)

    def attention(self, work: Work) -> int:
        """Cycles of a product of activations: tokens and their channels across the lanes, heads over both arrays."""
        outputs = math.ceil(work.outside * work.height * work.width / self.lanes)
        return math.ceil(work.groups / 2) * math.ceil(work.inside / self.multipliers) * outputs


class _Reader(fx.Interpreter):
    """Lists the products of every node that it runs."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.found: list[Work] = []

    def run_node(self, node: fx.Node):
        result = super().run_node(node)
        if node.op == "call_module":
            inputs, _ = self.fetch_args_kwargs_from_env(node)
            module = self.fetch_attr(node.target)
            if work := _work(str(node.target), node.meta["layer"], module, result, *inputs):
                self.found.append(work)
            elif any(each.dim() > 1 for each in module.parameters(recurse=False)):
                raise ValueError(f"{node.target} is a {type(module).__name__}, which the arrays do not compute")
        return result


def _work(name: str, layer: str, module: nn.Module, result: torch.Tensor, *inputs: torch.Tensor) -> Work | None:
    """What a call of a module is for the arrays, if it is a product."""
    weights = sum(each.numel() for each in module.parameters())
    moved = (sum(each.numel() for each in inputs), weights, result.numel())
    if isinstance(module, nn.Conv2d):
        groups, taps = module.groups, math.prod(module.kernel_size)
        inside, outside = module.in_channels // groups, module.out_channels // groups
        height, width = result.shape[-2:]
        kind = "point-wise" if taps == 1 else "convolution"
        if groups > 1 and inside == 1:
            kind = "depth-wise"
        return Work(name, layer, kind, inside, outside, groups, height, width, taps, *moved)
    if isinstance(module, nn.Linear):
        tokens = result[..., 0].numel()
        return Work(name, layer, "point-wise", module.in_features, module.out_features, 1, tokens, 1, 1, *moved)
    if isinstance(module, MatMul):
        heads, (tokens, outside) = math.prod(result.shape[:-2]), result.shape[-2:]
        return Work(name, layer, "attention", inputs[0].shape[-1], outside, heads, tokens, 1, 1, *moved)
    return None


def read(model: nn.Module, image: torch.Tensor | None = None) -> list[Work]:
    """The products of a network for one image, in order, from its graph: nothing is computed.

    Args:
        model: an EfficientViT, or any module that torch.fx can trace.
        image: (1, C, height, width), only its shape counts; taken from `model.config` if left out.

    Raises:
        ValueError: the model cannot be traced, has neither configuration nor image, or computes with weights what the
            arrays do not.
    """
    if image is None:
        if (config := getattr(model, "config", None)) is None:
            raise ValueError(f"{type(model).__name__} has no config to tell its image's shape: pass an image")
        image = torch.zeros(1, config.channels, config.image, config.image)
    reader = _Reader(trace(deepcopy(model).to("meta")))
    reader.run(image[:1].to("meta"))
    return reader.found


def cycles(model: nn.Module, accelerator: Accelerator | None = None, image: torch.Tensor | None = None) -> pd.DataFrame:
    """What every layer of a network takes on the accelerator, one image at a time.

    Args:
        model: as in `read`.
        accelerator: sizes and clock; the published ones if left out.
        image: as in `read`.

    Returns:
        One row per product, or per two that are fused: layer, name, kind (Categorical), multiply_adds, cycles,
        utilisation (of both arrays, 0 to 1), bytes (activations read and written and weights, once each; what passes
        inside a fused pair is not written), intensity (multiply-adds per byte) and speed (multiply-adds per second).

    Raises:
        ValueError: as `read`.
    """
    machine = accelerator or Accelerator()
    works, rows = read(model, image), []
    while works:
        work, *works = works
        parts, kind = [work], work.kind
        if kind == "depth-wise" and works and works[0].kind == "point-wise" and works[0].read == work.written:
            second, *works = works
            parts, kind = [work, second], "fused"
            taken = machine.fused(work, second)
        elif kind == "depth-wise":
            taken = machine.depthwise(work)
        else:
            taken = machine.attention(work) if kind == "attention" else machine.dense(work)
        moved = parts[0].read + sum(part.weights for part in parts) + parts[-1].written
        row = {"layer": work.layer, "name": " + ".join(part.name for part in parts), "kind": kind}
        rows.append(row | {"multiply_adds": sum(p.multiply_adds for p in parts), "cycles": taken, "bytes": moved})
    table = pd.DataFrame(rows)
    table["kind"] = pd.Categorical(table["kind"], KINDS)
    table["bytes"] = table["bytes"] * machine.bits / 8
    return _rates(table, machine)


def by_layer(table: pd.DataFrame, accelerator: Accelerator | None = None) -> pd.DataFrame:
    """The rows of `cycles` added up by layer: layer, multiply_adds, cycles, bytes, and the rates of these."""
    sums = table.groupby("layer", sort=False)[["multiply_adds", "cycles", "bytes"]].sum().reset_index()
    return _rates(sums, accelerator or Accelerator())


def backbone(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that the published counts have: all but the classifier's."""
    return table[~table["layer"].isin(CLASSIFIER)]


def totals(table: pd.DataFrame, accelerator: Accelerator | None = None) -> dict[str, float]:
    """Of all rows of `cycles`: cycles, utilisation (0 to 1), milliseconds of an image, images_per_second."""
    machine, taken = accelerator or Accelerator(), int(table["cycles"].sum())
    return {
        "cycles": taken,
        "utilisation": float(table["multiply_adds"].sum() / (taken * machine.multiply_adds)),
        "milliseconds": 1000 * taken / machine.clock,
        "images_per_second": machine.clock / taken,
    }


def _rates(table: pd.DataFrame, machine: Accelerator) -> pd.DataFrame:
    utilisation = table["multiply_adds"] / (table["cycles"] * machine.multiply_adds)
    intensity = table["multiply_adds"] / table["bytes"]
    return table.assign(utilisation=utilisation, intensity=intensity, speed=utilisation * machine.peak)
