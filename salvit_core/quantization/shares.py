"""Networks in few bits as graphs that secret shares can run: what of a quantization a private inference keeps.

Weights on a grid are weights: they cost on shares what those in float cost. A quantizer of activations is an operation,
which can be left out, since fixed point is a finer grid already, or be a table that the dealer deals (`Lookup`). An
activation function whose input fits few bits can be a table as well, and take its quantizer's place.
"""

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..models.activations import TanhGELU
from ..models.efficientvit import EfficientViT
from ..models.foreign import read, unknown
from ..models.graph import TRACING
from ..models.operations import Gain, Lookup, ShiftDivide, of_kind
from ..models.vit import build
from . import layers
from .layers import QuantizedLayer, QuantizedProduct, folded, put
from .quantizers import LEAST, Quantizer

# The modules whose place a table may take, and the function in it.
FUNCTIONS: dict[type, str] = {
    nn.Hardswish: "hardswish",
    nn.ReLU: "relu",
    nn.GELU: "gelu",
    TanhGELU: "tanh gelu",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
}


class Evened(nn.Module):
    """What evens the ranges of a picture's channels out before a quantizer: x / factor - offset, (B, C, H, W)."""

    def __init__(self, factor: torch.Tensor | None, offset: torch.Tensor | None):
        super().__init__()
        self.gain = None
        if factor is not None:
            self.gain = Gain(tuple(factor.shape))
            self.gain.weight = nn.Parameter(1 / factor)
        self.offset = None if offset is None else nn.Parameter(-offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, height, width) -> the same shape."""
        x = x if self.gain is None else self.gain(x)
        return x if self.offset is None else x + self.offset


def table_of(quantizer: Quantizer) -> Lookup:
    """A quantizer of activations as a table."""
    step = float(quantizer.step.detach().clamp(min=LEAST))
    return Lookup("identity", quantizer.bits, step, int(quantizer.zero))


@torch.no_grad()
def on_shares(network: nn.Module, quantizers: bool = False) -> nn.Module:
    """A quantized EfficientViT of operations that a private protocol has, in evaluation mode.

    Weights stay on their grids, and the log2 divisor stays where activations were quantized with it.

    Args:
        network: from `engine.quantize`, or a file (`engine.load`).
        quantizers: keep those of activations, each as a table: in the clear the same function as the network; on shares
            a table rounds to either neighbour, not to the nearest. Otherwise they are left out, and migration and
            shift, which are for them, with them.

    Raises:
        ValueError: another network.
    """
    if not isinstance(network, EfficientViT):
        raise ValueError(f"network is {type(network).__name__}: give a quantized EfficientViT, as quantize returns it")
    plain = folded(build(network.config))
    theirs = network.state_dict()
    plain.load_state_dict({name: theirs[name] for name in plain.state_dict() if name in theirs}, strict=False)
    for name, module in network.named_modules():
        if isinstance(module, QuantizedLayer):
            _put_layer(plain, name, module, quantizers and module.activation.on)
        elif isinstance(module, QuantizedProduct) and quantizers and module.operands[0].on:
            tables = nn.ModuleList(table_of(each) for each in module.operands)
            made = QuantizedProduct(plain.get_submodule(name), *tables)
            put(plain, name, made)
        elif isinstance(module, layers.ShiftDivide) and module.numerator.on:
            divide = plain.get_submodule(name)
            if module.log2:
                ends = -6 - module.scale, 9 - module.scale
                divide = of_kind("normaliser", ShiftDivide(*ends, eps=module.divide.eps))
            if quantizers:
                divide = QuantizedProduct(divide, table_of(module.numerator), nn.Identity())
            put(plain, name, divide)
    return plain.eval().requires_grad_(False)


def _put_layer(plain: nn.Module, name: str, module: QuantizedLayer, quantizer: bool) -> None:
    """A layer with the weights on their grid, and what they read on its own, or as it comes."""
    layer = plain.get_submodule(name)
    weight, bias = module.quantized().clone(), module.bias
    if not quantizer and module.offset is not None:
        bias = bias - F.conv2d(module.offset[None], weight, groups=layer.groups).flatten()
    if not quantizer and module.factor is not None:
        own = module.factor.view(layer.groups, 1, -1).expand(-1, len(weight) // layer.groups, -1)
        weight = weight / own.reshape(len(weight), -1, *[1] * (weight.dim() - 2))
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias.clone())
    if quantizer:
        steps: list[nn.Module] = [table_of(module.activation), layer]
        if module.factor is not None or module.offset is not None:
            steps.insert(0, Evened(module.factor, module.offset))
        made = nn.Sequential(*steps)
        put(plain, name, of_kind(layer.kind, made) if hasattr(layer, "kind") else made)


class _Watching(fx.Interpreter):
    """Keeps what every module of some kinds reads: the least, the most, and how many numbers of one image."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.seen: dict[str, tuple[float, float, int]] = {}

    def call_module(self, target, args, kwargs):
        if type(self.fetch_attr(target)) in FUNCTIONS:
            x = args[0]
            low, high, _ = self.seen.get(target, (0.0, 0.0, 0))  # zero is in every range
            self.seen[target] = min(low, x.min().item()), max(high, x.max().item()), x[0].numel()
        return super().call_module(target, args, kwargs)


@torch.no_grad()
def tabulated(
    model: nn.Module, images: torch.Tensor, bits: int = 8, spare: int = 1, most: int | None = None
) -> fx.GraphModule:
    """A network's graph with a table in place of each activation function, whose input is rounded to `bits` for it.

    The grid reaches from the least to the most that the function reads of these images; what is beyond it is clamped.
    Its step and zero are part of the architecture, which the client is told: so it learns these two of every function's
    activations over the provider's images.

    Args:
        model: any that `foreign.adopt` reads; its batch norms are folded, it is not changed.
        images: (n, C, height, width), normalised, to find the ranges.
        bits: of what the functions read.
        spare: as in `operations.Lookup`.
        most: of the numbers of an image that a function reads: others stay, since a table costs 2^(bits + spare) words
            a number.

    Raises:
        ValueError: bits + spare above 16, or a network that cannot be read.
    """
    graph = read(model, images, unknown)
    watch = _Watching(graph)
    with TRACING:  # who traces elsewhere would see these calls
        watch.run(images)
    for name, (low, high, count) in watch.seen.items():
        if most is not None and count > most:
            continue
        module = graph.get_submodule(name)
        step = max(high - low, LEAST) / (2**bits - 1)
        table = Lookup(FUNCTIONS[type(module)], bits, step, round(-low / step), spare)
        if kind := getattr(module, "kind", None):
            of_kind(str(kind), table)
        graph.add_submodule(name, table)
    return graph
