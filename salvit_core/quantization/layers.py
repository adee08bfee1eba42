"""What a network's layers become: BatchNorm folded in, weights and what they read in few bits, ranges evened out.

Every convolution, linear map and product of activations quantizes what it *reads*. In ReLU linear attention these are,
besides queries, keys and values, K^T V and the sum of K (read by the products with the queries), the numerator (read by
the division) and the output (read by the projection); the divisor becomes a power of two. Not quantized: activation
functions, LayerNorm, softmax, residual additions.

Letters in the shape comments: B batch, C channels.
"""

import math
from collections.abc import Iterator
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ..models.efficientvit import LiteMSA
from ..models.operations import MatMul
from .quantizers import Quantizer, Rounding, log2_divisor, sampled, searched

LEAST, MOST = 0.1, 64.0  # of the factors of channel-wise migration
QUANTILE = 0.99
# Entries of which torch finds a quantile at most.
ENTRIES = 2**23


class QuantizedLayer(nn.Module):
    """A convolution or a linear map with its weights on a grid, and what it reads.

    What it reads it first divides by `factor` and moves by `offset`, of each input channel: in float both change
    nothing, because the weights are multiplied by the one and the bias holds what the other takes away.

    Args:
        layer: the layer; it is not changed.
        bits_weights: of the grid of its weights.
        bits_activations: of what it reads.
        per_channel: a grid for each output channel, or one for all.
        factor: (C,), of channel-wise migration.
        offset: (C,), of filter-wise shift.

    Attributes:
        codes: the weights as whole numbers, the points of the grid.
        weights_on: whether the weights are these, or as they were.
        rounding: while it is learnt.
    """

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        bits_weights: int,
        bits_activations: int,
        per_channel: bool = True,
        factor: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
    ):
        super().__init__()
        convolves = isinstance(layer, nn.Conv2d)
        if offset is not None and (not convolves or any(layer.padding)):
            raise ValueError("filter-wise shift is of point-wise convolutions: what pads a picture would not be moved")
        self.convolution = (layer.stride, layer.padding, layer.dilation, layer.groups) if convolves else None
        self.bits, self.weights_on = bits_weights, True
        self.rounding: Rounding | None = None
        weight = layer.weight.detach().clone()  # (C after, C before / groups, ...)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        if factor is not None:
            own = factor.view(layer.groups, 1, -1).expand(
                -1, len(weight) // layer.groups, -1
            )  # (groups, after, before)
            weight = weight * own.reshape(len(weight), -1, *[1] * (weight.dim() - 2))
        if offset is not None:
            moved = F.conv2d(offset.view(1, -1, 1, 1), weight, groups=layer.groups).flatten()
            bias = moved if bias is None else bias + moved
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias)
        self.register_buffer("factor", None if factor is None else factor.view(-1, 1, 1))
        self.register_buffer("offset", None if offset is None else offset.view(-1, 1, 1))
        rows = weight.reshape(len(weight) if per_channel else 1, -1)
        step, zero = (found.view(-1, *[1] * (weight.dim() - 1)) for found in searched(rows, bits_weights))
        self.register_buffer("step", step)
        self.register_buffer("zero", zero)
        top = 2**bits_weights - 1
        codes = torch.clamp((weight / step).round() + zero, 0, top)
        self.register_buffer("codes", codes.to(torch.uint8 if bits_weights <= 8 else torch.int32))
        self.activation = Quantizer(bits_activations)

    def begin(self) -> Rounding:
        """Let the rounding be learnt."""
        self.rounding = Rounding(self.weight, self.step, self.zero, 2**self.bits - 1)
        return self.rounding

    def harden(self) -> None:
        """Keep the rounding that was learnt, as whole numbers."""
        if self.rounding is not None:
            self.codes.copy_(self.rounding.codes())
            self.rounding = None

    def quantized(self) -> torch.Tensor:
        """The weights that it computes with."""
        if not self.weights_on:
            return self.weight
        return (self.codes - self.zero) * self.step if self.rounding is None else self.rounding()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer that it was made of."""
        x = x if self.factor is None else x / self.factor
        x = self.activation(x if self.offset is None else x - self.offset)
        if self.convolution is None:
            return F.linear(x, self.quantized(), self.bias)
        return F.conv2d(x, self.quantized(), self.bias, *self.convolution)


class QuantizedProduct(nn.Module):
    """A product or sum of activations, each of which it reads in few bits.

    Args:
        operation: what computes it.
        operands: a quantizer for each of what it reads; the same one twice where two operations read the same.
    """

    def __init__(self, operation: nn.Module, *operands: Quantizer):
        super().__init__()
        self.operation, self.operands = operation, nn.ModuleList(operands)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """As the operation."""
        return self.operation(*(operand(x) for operand, x in zip(self.operands, inputs, strict=True)))


class ShiftDivide(nn.Module):
    """Numerator in few bits, over a divisor that is a power of two of 4 bits (`quantizers.log2_divisor`).

    Args:
        divide: what is divided by.
        numerator: quantizer of what is divided.
        tokens: N, by which our keys are divided and the published ones are not: their exponents, from -6 to 9, are of
            sums where ours are of means.
        log2: the divisor is a power of two; otherwise it stays as it is.
    """

    def __init__(self, divide: nn.Module, numerator: Quantizer, tokens: int, log2: bool):
        super().__init__()
        self.divide, self.numerator, self.log2 = divide, numerator, log2
        self.scale = round(math.log2(tokens))

    def forward(self, numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
        """As `operations.Divide`."""
        if not (self.log2 and self.numerator.on):
            return self.divide(self.numerator(numerator), denominator)
        divisor = log2_divisor(denominator + self.divide.eps, -6 - self.scale, 9 - self.scale)
        return self.numerator(numerator) / divisor


def folded(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose batch norms are part of the convolutions or linear maps right before them.

    "Right before" is what stands before it in an nn.Sequential, as in all networks of this project; of those that
    others wrote `models.foreign.adopt` folds them.

    Raises:
        ValueError: a batch norm that stands elsewhere.
    """
    model = deepcopy(model).eval()
    for module in list(model.modules()):
        if not isinstance(module, nn.Sequential):
            continue
        children = list(module.named_children())
        for (name, before), (norm, after) in zip(children, children[1:], strict=False):
            if isinstance(before, nn.Conv2d) and isinstance(after, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(before, after))
            elif isinstance(before, nn.Linear) and isinstance(after, nn.BatchNorm1d):
                setattr(module, name, fuse_linear_bn_eval(before, after))
            else:
                continue
            setattr(module, norm, nn.Identity())
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name} is a batch norm that follows no layer: adopt the network first (salvit_core.adopt)"
            )
    return model.requires_grad_(False)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a module is a convolution of every channel for itself."""
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a linear map of the channels of every pixel."""
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.kernel_size == (1, 1)
        and not any(module.padding)
    )


def evened(layers: dict[str, nn.Module]) -> tuple[list[str], list[str]]:
    """Names of the layers whose input's ranges are evened out: all depth-wise ones, and point-wise ones that read one.

    Args:
        layers: by name, in the order in which they compute. MBConv's third is what follows its second.
    """
    names = list(layers)
    migrated = [name for name in names if is_depthwise(layers[name])]
    shifted = [
        name
        for before, name in zip(names, names[1:], strict=False)
        if is_depthwise(layers[before])
        and is_pointwise(layers[name])
        and layers[before].out_channels == layers[name].in_channels
    ]
    return migrated, shifted


def migration(x: torch.Tensor) -> torch.Tensor:
    """Factors s_c of channel-wise migration: max_c / max(Q_0.99(x), mean of max_c), from 0.1 to 64.

    max_c is that of |x|; channels larger than the others become as large as them, the weights larger instead.

    Args:
        x: (B, C, height, width), what a depth-wise convolution reads.

    Returns:
        (C,)
    """
    most = x.abs().amax((0, 2, 3))  # (C,)
    quantile = torch.quantile(sampled(x.reshape(1, -1), ENTRIES), QUANTILE)
    scale = torch.maximum(quantile, most.mean()).clamp(min=torch.finfo(x.dtype).tiny)
    return (most / scale).clamp(LEAST, MOST)


def shift(x: torch.Tensor) -> torch.Tensor:
    """Offsets z_c of filter-wise shift: (max_c + min_c) / 2, the middle of every channel.

    Args:
        x: (B, C, height, width), what a point-wise convolution reads.

    Returns:
        (C,)
    """
    return (x.amax((0, 2, 3)) + x.amin((0, 2, 3))) / 2


def computing(model: nn.Module, images: torch.Tensor) -> dict[str, nn.Module]:
    """Convolutions and linear maps by name, in the order in which they first compute.

    Raises:
        ValueError: there are none.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    found: dict[str, nn.Module] = {}

    def keep(module, inputs):
        found.setdefault(names[module], module)

    hooks = [module.register_forward_pre_hook(keep) for module in names]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError(f"{type(model).__name__} has no convolution and no linear map to quantize")
    return found


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def put_products(model: nn.Module, bits: int, log2: bool) -> None:
    """Put quantized products in the place of those of activations, in all attention."""
    attention = [module for module in model.modules() if isinstance(module, LiteMSA)]
    for module in attention:
        query, key, value, context, total = (Quantizer(bits) for _ in range(5))
        module.scores = QuantizedProduct(module.scores, key, value)
        module.sum = QuantizedProduct(module.sum, key)
        module.denominator = QuantizedProduct(module.denominator, query, total)
        module.values = QuantizedProduct(module.values, query, context)
        module.normalizer = ShiftDivide(module.normalizer, Quantizer(bits), module.side**2, log2)
    done = {id(part) for module in attention for part in module.modules()}
    others = [name for name, part in model.named_modules() if isinstance(part, MatMul) and id(part) not in done]
    for name in others:
        put(model, name, QuantizedProduct(model.get_submodule(name), Quantizer(bits), Quantizer(bits)))


def switch(model: nn.Module, weights: bool, activations: bool) -> None:
    """Compute with quantized weights, quantized activations, both or neither."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module.weights_on = weights
        elif isinstance(module, Quantizer):
            module.on = activations


def layers_of(model: nn.Module) -> Iterator[QuantizedLayer]:
    """The quantized layers in a network or a block of one."""
    return (module for module in model.modules() if isinstance(module, QuantizedLayer))


def quantizers_of(model: nn.Module) -> Iterator[Quantizer]:
    """The quantizers of activations in a network or a block of one, each once."""
    return (module for module in model.modules() if isinstance(module, Quantizer))
