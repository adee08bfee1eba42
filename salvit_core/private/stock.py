"""Each operation as CrypTen 0.4.1 ships it, in its default configuration: what the paper must have measured.

`MODULES` and `FUNCTIONS` map what a graph can contain to a function on secret shares. Where CrypTen's approximation
holds only on part of the real line, `DOMAINS` says what leaves it, from the clear activations: such an operation still
costs what it costs, but its answer is noise. The bounds are where the relative error (for erf the absolute error)
passes 1 %, found by running CrypTen against float64 (tests/test_private_stock.py repeats that).

Shapes are those of the clear operation. Letters: B batch, H heads, N tokens, K keys, M dimension of the model.
"""

import math
import operator
import time
from collections.abc import Callable

import torch
from torch import nn

from .. import compat
from ..models.activations import LearnedQuad, Quad, TanhGELU
from ..models.attention.fused import Dropout
from ..models.blocks import StochasticDepth
from ..models.normalizers import L1, L2Q, Scaling, Softmax, TwoQuad, TwoReLU
from ..models.operations import (
    LSTM,
    BlockLinear,
    Divide,
    Exponential,
    Gain,
    HeadLinear,
    LinearScan,
    Lookup,
    MatMul,
    Multiply,
    NewtonInverse,
    PseudoInverse,
    Repeat,
    Resample,
    Reweight,
    SegmentMeans,
    ShiftDivide,
    SquaredNorm,
    Sum,
    Take,
    TokenConv,
    TokenSum,
    views,
)
from .domains import Span, spans
from .links import Link
from .protocol import CLIENT, LAYOUT, LINEAR, SERVER, Protocol, Traffic, identity

compat.repair()  # before anything imports crypten
import crypten  # noqa: E402
import crypten.communicator as comm  # noqa: E402
from crypten.mpc import MPCTensor  # noqa: E402

# Where CrypTen's approximations hold to 1 %.
RECIPROCAL = (2.0**-9, 24.0)  # ten Newton steps from 3 exp(1 - 2x) + 0.003
INVERSE_ROOT = (0.1, 150.0)  # three Newton steps from 2.2 exp(-x/2 - 0.2) + 0.2 - x/1024
EXPONENT = (-500.0, 2.0)  # (1 + x/256)^256; towards -512 the base nears -1 and the result grows again
ERROR_FUNCTION = (-0.55, 1.1)  # Taylor series in which pow(x, 5) is x^6, pow(x, 7) is x^9, ...

Secrets = dict[str, MPCTensor]


# Linear operations


def linear(module: nn.Linear, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """The affine map x W^T + b as one Beaver product. One round."""
    y = x.matmul(secret["weight"].t())
    return y + secret["bias"] if "bias" in secret else y


def conv2d(module: nn.Conv2d, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """Convolution as one Beaver product of images and kernels. One round."""
    more = (
        {}
        if (module.dilation, module.groups) == ((1, 1), 1)
        else {"dilation": module.dilation, "groups": module.groups}
    )
    y = x.conv2d(secret["weight"], stride=module.stride, padding=module.padding, **more)
    return y + secret["bias"].reshape(1, -1, 1, 1) if "bias" in secret else y


def matmul(module: MatMul, secret: Secrets, left: MPCTensor, right: MPCTensor) -> MPCTensor:
    """Product of two activations. One round."""
    return left.matmul(right)


# Non-linear operations


def relu(module: nn.ReLU, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """A comparison by binary addition circuit, then a product. Nine rounds."""
    return x.relu()


def max_pool2d(module: nn.MaxPool2d, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """The maximum of each window by pairwise comparisons, with the one-hot argmax that CrypTen computes beside it."""
    return x.max_pool2d(module.kernel_size, padding=module.padding, stride=module.stride)


def clip(module: nn.Hardtanh, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """CrypTen's hardtanh: two comparisons."""
    return x.hardtanh(module.min_val, module.max_val)


def leaky_relu(module: nn.LeakyReLU, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """A slope times x, and the rest of it where x is positive, by CrypTen's comparison."""
    return x * module.negative_slope + x.relu() * (1 - module.negative_slope)


def hardswish(module: nn.Hardswish, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """X relu6(x + 3) / 6: two comparisons and a product; CrypTen has none."""
    return x * hardsigmoid(module, secret, x)


def hardsigmoid(module: nn.Module, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """relu6(x + 3) / 6: two comparisons."""
    return (x + 3).hardtanh(0, 6) / 6


def sigmoid(module: nn.Sigmoid, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """CrypTen's sigmoid: the exponential of -|x|, and the reciprocal of one more."""
    return x.sigmoid()


def silu(module: nn.SiLU, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """X times CrypTen's sigmoid."""
    return x * x.sigmoid()


def tanh(module: nn.Tanh, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """CrypTen's tanh, 2 sigmoid(2 x) - 1."""
    return x.tanh()


def tanh_gelu(module: TanhGELU, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """X / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), with CrypTen's tanh."""
    inner = (x.square() * 0.044715 + 1) * x * math.sqrt(2 / math.pi)
    return x * (inner.tanh() + 1) * 0.5


def gelu(module: nn.GELU, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """x/2 (1 + erf(x / sqrt 2)) with CrypTen's erf, a Taylor series of eight terms."""
    return x * (x.mul(math.sqrt(0.5)).erf() + 1).mul(0.5)


def quad(module: Quad, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """The quadratic with public coefficients: one square."""
    a, b, c = module.coefficients
    return x.square() * a + x * b + c


def learned_quad(module: LearnedQuad, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """The quadratic with the server's coefficients, after Horner: two products."""
    return (x * secret["a"] + secret["b"]) * x + secret["c"]


def layer_norm(module: nn.LayerNorm, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """(x - mean) / sqrt(var + eps), scaled and shifted. CrypTen has none; this is its batch norm's recipe per token.

    In fixed point eps is as good as zero: 1e-5 is below 2^-16.
    """
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    y = centred * (variance + module.eps).inv_sqrt()
    y = y * secret["weight"] if "weight" in secret else y
    return y + secret["bias"] if "bias" in secret else y


# Normalisers


def softmax(module: Softmax, secret: Secrets, scores: MPCTensor) -> MPCTensor:
    """CrypTen's softmax: maximum by comparisons, exponential by repeated squaring, reciprocal by Newton steps."""
    return scores.softmax(module.dim)


def two_quad(module: TwoQuad, secret: Secrets, scores: MPCTensor) -> MPCTensor:
    """(a + c)^2 over its sum, by CrypTen's division: a sign test, then the reciprocal."""
    squares = (scores + module.c).square()
    return squares / squares.sum(module.dim, keepdim=True)


def two_relu(module: TwoReLU, secret: Secrets, scores: MPCTensor) -> MPCTensor:
    """relu(a) over its sum plus eps, by CrypTen's division."""
    positive = scores.relu()
    return positive / (positive.sum(module.dim, keepdim=True) + module.eps)


def l2q(module: L2Q, secret: Secrets, scores: MPCTensor) -> MPCTensor:
    """(d a + c)^2 over its sum plus eps; c and d are the server's secrets, so d a is a Beaver product."""
    d, c = secret.get("d", module.d), secret.get("c", module.c)
    squares = (scores * d + c).square()
    return squares / (squares.sum(module.dim, keepdim=True) + module.eps)


def scaling(module: Scaling, secret: Secrets, scores: MPCTensor) -> MPCTensor:
    """Scores over n, a public number: local."""
    return scores / scores.size(module.dim)


def l1(module: L1, secret: Secrets, weights: MPCTensor) -> MPCTensor:
    """Weights over their sum, by CrypTen's division; eps = 1e-9 vanishes in fixed point."""
    return weights / weights.sum(module.dim, keepdim=True)


_TABLES: dict[str, Callable] = {
    "identity": lambda secret, x: x,
    "relu": lambda secret, x: relu(nn.ReLU(), secret, x),
    "hardswish": lambda secret, x: hardswish(nn.Hardswish(), secret, x),
    "gelu": lambda secret, x: gelu(nn.GELU(), secret, x),
    "tanh gelu": lambda secret, x: tanh_gelu(TanhGELU(), secret, x),
    "sigmoid": lambda secret, x: sigmoid(nn.Sigmoid(), secret, x),
    "silu": lambda secret, x: silu(nn.SiLU(), secret, x),
    "tanh": lambda secret, x: tanh(nn.Tanh(), secret, x),
}


# What attention mechanisms compute besides


def times(module: Multiply, secret: Secrets, left: MPCTensor, right: MPCTensor) -> MPCTensor:
    """Product of two activations, entry by entry. One round."""
    return left * right


def divide(module: Divide, secret: Secrets, numerator: MPCTensor, denominator: MPCTensor) -> MPCTensor:
    """Quotients a / (b + eps) by CrypTen's division: a sign test, then the reciprocal."""
    return numerator / (denominator + module.eps)


def shift_divide(module: ShiftDivide, secret: Secrets, numerator: MPCTensor, denominator: MPCTensor) -> MPCTensor:
    """Quotients a / 2^y: a comparison with the knot between every two exponents, all at once, then a product."""
    exponents = torch.arange(module.least, module.most, dtype=torch.float32)
    # In 2^-most, by which 2^-y falls at each knot: whole, since what a comparison gives has no fractional bits.
    steps = torch.exp2(module.most - exponents - 1).long()
    divisor = denominator.unsqueeze(-1).expand(*denominator.size(), len(exponents))  # else one share alone would grow
    above = (divisor + (module.eps - torch.exp2(exponents + 0.5))).ge(0)
    return numerator * (-(above * steps).sum(-1) + 2 ** (module.most - module.least)) * 2.0**-module.most


def lookup(module: Lookup, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """The function of x, clamped to the grid by two comparisons; not rounded to it, which CrypTen has no way to."""
    low, high = ((number - module.zero) * module.step for number in (0, 2**module.bits - 1))
    return _TABLES[module.function](secret, x.hardtanh(low, high))


def exponential(module: Exponential, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """CrypTen's exponential by repeated squaring, after its maximum with the one-hot argmax that comes with it."""
    if module.dims:
        best = x.flatten(-module.dims).max(-1, keepdim=True)[0]
        x = x - best.reshape(*best.size()[:-1], *[1] * module.dims)
    return x.exp()


def squared_norm(module: SquaredNorm, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """Sum of squares of each row. One round."""
    return x.square().sum(-1, keepdim=True)


def head_linear(module: HeadLinear, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """A matrix per head times the tokens, as one Beaver product. One round."""
    return secret["weight"].matmul(x)


def token_conv(module: TokenConv, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """A grouped convolution as one Beaver product. One round."""
    heads, kernel = module.weight.shape
    return x.conv2d(secret["weight"].reshape(heads, 1, kernel, 1), padding=(kernel // 2, 0), groups=heads)


def gain(module: Gain, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """A factor of the server's, entry by entry. One round."""
    return x * secret["weight"]


def block_linear(module: BlockLinear, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """A matrix per block of features: one Beaver product where blocks are alike, else one for each."""
    rows = x.reshape(math.prod(x.size()[:-1]), x.size(-1))  # which may be no features
    if module.alike:
        weight = _on_share(secret["weight"], torch.Tensor.view, -1, module.outputs[0], module.inputs[0])
        rows = _on_share(rows, lambda part: part.view(len(part), -1, module.inputs[0]).transpose(0, 1))
        made = rows.matmul(weight.transpose(-2, -1))  # (blocks, rows, outputs)
        made = _on_share(made, lambda part: part.transpose(0, 1).flatten(1))
    else:
        shapes = list(zip(module.outputs, module.inputs))
        weights = _on_share(secret["weight"], lambda part: tuple(views(part, shapes)))
        parts, made = _on_share(rows, torch.Tensor.split, module.inputs, -1), []
        for part, weight, (outputs, inputs) in zip(parts, weights, shapes):
            nothing = _on_share(rows, lambda x, outputs=outputs: x.new_zeros(len(x), outputs))
            made.append(part.matmul(weight.t()) if outputs and inputs else nothing)
        made = crypten.cat(made, -1)
    return made.reshape(*x.size()[:-1], made.size(-1)) + secret["bias"]


def lstm(module: LSTM, secret: Secrets, z: MPCTensor) -> MPCTensor:
    """A step after the other by Beaver products, CrypTen's sigmoid and CrypTen's tanh, all cells side by side."""
    if not sum(module.cells):
        return z
    rows, weight = _on_share(z + secret["bias"], module.steps), _on_share(secret["weight"], module.factors)
    states: list[MPCTensor] = []
    c = None
    for t in range(rows.size(1)):
        read = rows[:, t] + states[-1].matmul(weight) if states else rows[:, t]  # (C, B, 4 K)
        i, f, g, o = _on_share(read, torch.Tensor.chunk, 4, -1)
        i, f, o = _on_share(crypten.cat([i, f, o], -1).sigmoid(), torch.Tensor.chunk, 3, -1)
        entered = i * g.tanh()
        c = entered if c is None else f * c + entered
        states.append(o * c.tanh())
    return _on_share(crypten.stack(states, 1), module.tokens, z.size()[:-2])


def scan(module: LinearScan, secret: Secrets, f: MPCTensor, i: MPCTensor) -> MPCTensor:
    """The steps of the clear operation by Beaver products: two for each doubling of the distance."""
    f, h = _on_share(f, module.turned), _on_share(i, module.turned)
    distance = 1
    while distance < h.size(-2):
        h = h + f * _on_share(h, module.before, distance)
        f = f * _on_share(f, module.before, distance)
        distance *= 2
    return _on_share(h, module.turned)


def moved(module: nn.Module, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """What only takes and adds up entries, the same on integers. Local."""
    return _on_share(x, module)


def segment_means(module: SegmentMeans, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """Product with a public matrix: local."""
    return x.transpose(-2, -1).matmul(module.matrix().t()).transpose(-2, -1)


def resample(module: Resample, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """Products with public matrices: local."""
    rows, columns = (matrix.float() for matrix in module.matrices())
    return x.matmul(columns.t()).transpose(-2, -1).matmul(rows.t()).transpose(-2, -1)


def repeat(module: Repeat, secret: Secrets, images: MPCTensor) -> MPCTensor:
    """The server's tensor for every image: local."""
    return _on_share(secret["weight"], torch.Tensor.expand, images.size(0), *module.weight.shape[1:])


def reweight(module: Reweight, secret: Secrets, x: MPCTensor) -> MPCTensor:
    """Product with public cosines and sines: local."""
    return (x.unsqueeze(-2) * module.factors().T[:, :, None].float()).flatten(-2)


def newton_inverse(module: NewtonInverse, secret: Secrets, a: MPCTensor) -> MPCTensor:
    """Newton's iteration by Beaver products, the starting value by CrypTen's maximum and reciprocal."""
    one = torch.eye(a.size(-1))
    a = a + module.ridge * one
    largest = a.sum(-1).max(-1, keepdim=True)[0]
    z = (1.5 * largest.reciprocal()).unsqueeze(-1) * one
    for _ in range(module.iterations):
        z = z.matmul(-a.matmul(z) + 2 * one)
    return z


def pseudo_inverse(module: PseudoInverse, secret: Secrets, a: MPCTensor) -> MPCTensor:
    """Nystromformer's iteration by Beaver products, the starting value as in `newton_inverse`."""
    one = torch.eye(a.size(-1))
    largest = a.sum(-2).max(-1, keepdim=True)[0]
    z = a.transpose(-2, -1) * largest.reciprocal().unsqueeze(-1)
    for _ in range(module.iterations):
        az = a.matmul(z)
        bracket = -az.matmul(-az + 7 * one) + 15 * one
        z = z.matmul(-az.matmul(bracket) + 13 * one) / 4
    return z


MODULES: dict[type, Callable] = {
    nn.Linear: linear,
    nn.Conv2d: conv2d,
    MatMul: matmul,
    Multiply: times,
    Divide: divide,
    ShiftDivide: shift_divide,
    Lookup: lookup,
    Exponential: exponential,
    SquaredNorm: squared_norm,
    HeadLinear: head_linear,
    TokenConv: token_conv,
    Gain: gain,
    BlockLinear: block_linear,
    LSTM: lstm,
    LinearScan: scan,
    Take: moved,
    TokenSum: moved,
    SegmentMeans: segment_means,
    Reweight: reweight,
    NewtonInverse: newton_inverse,
    PseudoInverse: pseudo_inverse,
    nn.ReLU: relu,
    nn.ReLU6: clip,
    nn.Hardtanh: clip,
    nn.LeakyReLU: leaky_relu,
    nn.Hardswish: hardswish,
    nn.Hardsigmoid: hardsigmoid,
    nn.SiLU: silu,
    nn.Sigmoid: sigmoid,
    nn.Tanh: tanh,
    TanhGELU: tanh_gelu,
    Sum: moved,
    Resample: resample,
    Repeat: repeat,
    nn.MaxPool2d: max_pool2d,
    nn.GELU: gelu,
    Quad: quad,
    LearnedQuad: learned_quad,
    nn.LayerNorm: layer_norm,
    Softmax: softmax,
    TwoQuad: two_quad,
    TwoReLU: two_relu,
    L2Q: l2q,
    Scaling: scaling,
    L1: l1,
    nn.Dropout: identity,
    Dropout: identity,
    nn.Identity: identity,
    StochasticDepth: identity,
}


def _on_share(x: MPCTensor, function, *args, **kwargs):
    """A function that only moves or adds numbers, applied to the share."""
    made = function(x.share, *args, **kwargs)
    results = []
    for part in made if isinstance(made, tuple) else (made,):
        result = x.shallow_copy()
        result._tensor = x._tensor.shallow_copy()
        result.share = part
        results.append(result)
    return tuple(results) if isinstance(made, tuple) else results[0]


def _layout(name: str):
    """A method that only moves numbers about, applied to the share."""
    return lambda x, *args, **kwargs: _on_share(x, getattr(torch.Tensor, name), *args, **kwargs)


FUNCTIONS: dict[object, Callable] = {
    **{name: _layout(name) for name in LAYOUT},
    operator.add: operator.add,
    operator.sub: operator.sub,
    operator.mul: operator.mul,
    operator.truediv: operator.truediv,
    operator.neg: operator.neg,
    operator.getitem: operator.getitem,
    torch.add: operator.add,
    torch.cat: crypten.cat,
    torch.nn.functional.pad: lambda x, widths, **_: _on_share(x, torch.nn.functional.pad, widths),
}


# What leaves its domain


def _softmax_domain(module: Softmax, scores: torch.Tensor) -> list[Span]:
    shifted = scores - scores.amax(module.dim, keepdim=True)
    return spans("exponents", shifted, EXPONENT) + spans(
        "reciprocals of row sums", shifted.exp().sum(module.dim), RECIPROCAL
    )


def _two_quad_domain(module: TwoQuad, scores: torch.Tensor) -> list[Span]:
    return spans("reciprocals of row sums", (scores + module.c).square().sum(module.dim), RECIPROCAL)


def _two_relu_domain(module: TwoReLU, scores: torch.Tensor) -> list[Span]:
    return spans("reciprocals of row sums", scores.relu().sum(module.dim) + module.eps, RECIPROCAL)


def _l2q_domain(module: L2Q, scores: torch.Tensor) -> list[Span]:
    sums = (module.d * scores + module.c).square().sum(module.dim) + module.eps
    return spans("reciprocals of row sums", sums, RECIPROCAL)


def _l1_domain(module: L1, weights: torch.Tensor) -> list[Span]:
    return spans("reciprocals of row sums", weights.sum(module.dim), RECIPROCAL)


def _layer_norm_domain(module: nn.LayerNorm, x: torch.Tensor) -> list[Span]:
    return spans("inverse roots of variances", x.var(-1, unbiased=False) + module.eps, INVERSE_ROOT)


def _gelu_domain(module: nn.GELU, x: torch.Tensor) -> list[Span]:
    return spans("error functions of", x * math.sqrt(0.5), ERROR_FUNCTION)


def _divide_domain(module: Divide, numerator: torch.Tensor, denominator: torch.Tensor) -> list[Span]:
    return spans("reciprocals of denominators", denominator + module.eps, RECIPROCAL)


def _lstm_domain(module: LSTM, z: torch.Tensor) -> list[Span]:
    """Of CrypTen's exponentials, whose exponent is -|x| for a sigmoid and -2 |x| for a tanh."""
    seen: list[torch.Tensor] = []

    def watch(read: torch.Tensor, c: torch.Tensor) -> None:
        seen.append(-torch.stack([read.abs().amax(), 2 * read.chunk(4, -1)[2].abs().amax(), 2 * c.abs().amax()]))

    if sum(module.cells):
        module.run(z, watch)
    return spans("exponents", torch.cat(seen), EXPONENT) if seen else []


def _sigmoid_domain(module: nn.Module, x: torch.Tensor) -> list[Span]:
    return spans("exponents", -x.abs(), EXPONENT)


def _tanh_domain(module: nn.Tanh, x: torch.Tensor) -> list[Span]:
    return spans("exponents", -2 * x.abs(), EXPONENT)


def _tanh_gelu_domain(module: TanhGELU, x: torch.Tensor) -> list[Span]:
    return _tanh_domain(nn.Tanh(), math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def _exponential_domain(module: Exponential, a: torch.Tensor) -> list[Span]:
    if module.dims:
        a = a - a.amax(tuple(range(-module.dims, 0)), keepdim=True)
    return spans("exponents", a, EXPONENT)


_TABLE_DOMAINS: dict[str, Callable] = {
    "gelu": lambda x: _gelu_domain(nn.GELU(), x),
    "tanh gelu": lambda x: _tanh_gelu_domain(TanhGELU(), x),
    "sigmoid": lambda x: _sigmoid_domain(nn.Sigmoid(), x),
    "silu": lambda x: _sigmoid_domain(nn.SiLU(), x),
    "tanh": lambda x: _tanh_domain(nn.Tanh(), x),
}


def _lookup_domain(module: Lookup, x: torch.Tensor) -> list[Span]:
    low, high = ((number - module.zero) * module.step for number in (0, 2**module.bits - 1))
    return _TABLE_DOMAINS.get(module.function, lambda x: [])(x.clamp(low, high))


DOMAINS: dict[type, Callable[..., list[Span]]] = {
    Lookup: _lookup_domain,
    Softmax: _softmax_domain,
    TwoQuad: _two_quad_domain,
    TwoReLU: _two_relu_domain,
    L2Q: _l2q_domain,
    L1: _l1_domain,
    nn.LayerNorm: _layer_norm_domain,
    nn.GELU: _gelu_domain,
    nn.Sigmoid: _sigmoid_domain,
    nn.SiLU: _sigmoid_domain,
    nn.Tanh: _tanh_domain,
    TanhGELU: _tanh_gelu_domain,
    Divide: _divide_domain,
    Exponential: _exponential_domain,
    LSTM: _lstm_domain,
    NewtonInverse: lambda m, a: spans("reciprocals of row sums", a.sum(-1).amax(-1) + m.ridge, RECIPROCAL),
    PseudoInverse: lambda m, a: spans("reciprocals of column sums", a.sum(-2).amax(-1), RECIPROCAL),
}


# CrypTen compares exactly, whatever the numbers.
EVERYWHERE = LINEAR | {
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.Hardswish, nn.Hardsigmoid, nn.MaxPool2d, ShiftDivide),
}


def _delayed(function: Callable, link: Link) -> Callable:
    def call(tensor, *args, **kwargs):
        received = function(tensor, *args, **kwargs)
        parts = tensor if isinstance(tensor, (list, tuple)) else [tensor]
        link.wait(sum(part.nelement() * 8 for part in parts))
        return received

    return call


class Stock(Protocol):
    """CrypTen's functions as they are shipped."""

    name, bits = "stock", crypten.cfg.encoder.precision_bits
    modules, functions, domains, everywhere = MODULES, FUNCTIONS, DOMAINS, EVERYWHERE

    def __init__(self):
        self.dealing = 0.0  # seconds in the provider since `supply`
        self.dealt = 0  # bytes of corrections since `supply`

    def secret(self, name: str, tensor: torch.Tensor, rank: int) -> MPCTensor:
        """A weight as shares. No bytes travel: the server masks it with shared randomness."""
        return crypten.cryptensor(tensor if rank == SERVER else torch.empty(tensor.shape), src=SERVER)

    def prepare(self, network, shape: tuple, queries: int, rank: int, options, peers) -> None:
        """Time the provider; CrypTen makes its triples when they are needed, so there is nothing to prepare.

        Args:
            network: the interpreter.
            shape: of a query's images.
            queries: how many there will be.
            rank: of this party.
            options: the party's command line.
            peers: nobody; the parties met in CrypTen's process group.
        """
        if options.link is not None:
            link = options.link
            for name in ("all_reduce", "recv"):  # what CrypTen opens values with, and the logits' way
                setattr(comm.get(), name, _delayed(getattr(comm.get(), name), link))
        source = crypten.mpc.get_default_provider()
        for name in ("generate_additive_triple", "square", "generate_binary_triple", "wrap_rng", "B2A_rng"):
            setattr(source, name, self._timed(getattr(source, name)))

    def reset(self) -> None:
        """A query begins, once both parties are here."""
        comm.get().barrier()
        comm.get().reset_communication_stats()

    def traffic(self) -> Traffic:
        """Of this query so far. CrypTen counts what a party sends and receives; exchanges go both ways at once."""
        stats = comm.get().get_communication_stats()
        return Traffic(stats["rounds"], stats["bytes"] / 2, stats["bytes"] / 2)

    def to_client(self, numbers: torch.Tensor, rank: int) -> torch.Tensor:
        """The server's numbers at the client."""
        if rank == SERVER:
            comm.get().send(numbers, CLIENT)
            return numbers
        return comm.get().recv(torch.empty_like(numbers), SERVER)

    def leave(self) -> None:
        """Part from the other party, once both are done."""
        comm.get().barrier()
        crypten.uninit()

    def parts(self, value) -> list[tuple] | None:
        """This party's share of an activation with its fractional bits, as a list of factors."""
        return [(value.share, crypten.cfg.encoder.precision_bits)] if isinstance(value, MPCTensor) else None

    def supply(self, index: int, place: str) -> None:
        """Nothing is dealt ahead: the provider's clock and its count start anew."""
        self.dealing, self.dealt = 0.0, 0

    def supplied(self) -> tuple[float, int]:
        """Seconds in the provider since `supply`, and the bytes that a third party sends, or would send."""
        return self.dealing, self.dealt

    def share_images(self, images: torch.Tensor | None, shape: tuple) -> MPCTensor:
        """The client's images as shares, without a byte sent: both parties draw the mask from a common seed."""
        return crypten.cryptensor(torch.empty(shape) if images is None else images, src=CLIENT)

    def reveal_to_client(self, logits: MPCTensor) -> torch.Tensor | None:
        """The logits, at the client alone. Not a reduce: gloo's would let the server add up a part of them."""
        self.supply(-1, "answer")
        if comm.get().get_rank() == SERVER:
            return comm.get().send(logits.share, CLIENT)
        return logits.encoder.decode(logits.share + comm.get().recv(logits.share, SERVER))

    def _timed(self, function: Callable) -> Callable:
        def call(*args, **kwargs):
            start = time.perf_counter()
            made = function(*args, **kwargs)
            self.dealing += time.perf_counter() - start
            # All but one tensor are random at both parties, from seeds that they share with the dealer. The last has
            # the size of the one that travels, from the dealer to the server alone (TTPServer).
            self.dealt += 8 * made[-1].nelement()
            return made

        return call


PROTOCOL = Stock()
