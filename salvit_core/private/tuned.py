"""The functions of `stock`, several times cheaper and right where trained networks need them.

The model is stock's: two semi-honest parties with additive shares in Z_2^64 on CrypTen's communicator, and a dealer of
correlated randomness (`dealing`). Under provider "TFP" that dealer is the server, which could unmask everything: fit
for measuring only. Nothing is opened but values masked by fresh uniform randomness, and the logits to the client.

What differs from stock, and where it comes from:

- The server knows the weights, so a product with a weight needs one message of the client, x1 - r, and one product at
  each party; W - B is opened once per session (in the spirit of Delphi, Mishra et al., 2020, Section 4, and of
  MiniONN, Liu et al., 2017). An activation is opened masked once and used for all its monomials.
- Comparisons open 64 bits for the value and about 7 per knot: the masked value's digits are looked up in secret truth
  tables (Ishai et al., 2013, one-time truth tables) and joined by products of several bits at once
  (Damgard et al., 2006; ABY2.0, Patra et al., 2021, Section 3.2, for products of many inputs in one round).
- Everything curved is a piecewise polynomial: knots and coefficients are public, the segment is secret.
- Reciprocals and inverse roots scale their input to [1, 2) by a secret power of two and then evaluate one quadratic per
  quarter octave: no iteration, no starting value, a domain of many octaves.
- Inverses of matrices are iterations at 24 fractional bits whose products all end in an exact truncation; a matrix that
  is in several products is opened masked once.
- Sums are normalised after the product with the values; max-pooling is separable and comes before its ReLU;
  LayerNorm's scale and shift move into the linear maps that alone read it.
- Scales are bookkeeping: each share knows its fractional bits, so that powers of two cost nothing.

Not done: branches that run side by side (both attentions of a head-wise layer) open one after the other, not together.

Letters in costs: n elements of the value, J knots, k digits, p degree; a word is 64 bits, and words are counted as
those a party sends and receives, halved, like the bytes in a record. A round is one message or one exchange.
"""

import functools
import math
import operator
import time

import crypten
import crypten.communicator as comm
import numpy as np
import torch
import torch.distributed as dist
from torch import fx, nn

from ..activations import LearnedQuad, Quad
from ..attention.fused import Dropout
from ..attention.operations import (
    Divide,
    Exponential,
    Gain,
    HeadLinear,
    MatMul,
    Multiply,
    NewtonInverse,
    PseudoInverse,
    Reweight,
    SegmentMeans,
    SquaredNorm,
    Take,
    TokenConv,
    TokenSum,
)
from ..cct import StochasticDepth
from ..compat import without_compiler
from ..normalizers import L1, L2Q, Scaling, Softmax, TwoQuad, TwoReLU
from .dealing import CLIENT, SERVER, Dealing, new_key
from .inverses import RIDGED_SUM, newton_inverse, pseudo_inverse
from .ring import product
from .segments import Polynomials, fitted, largest, log2_above, maximum, piecewise, positive_part, power, reciprocal
from .shares import BITS, Share, Weight, by_weight, keep_memory, multiply, scaled, session, truncate
from .stock import OPTIONS, Span, identity, spans  # noqa: F401  OPTIONS is part of the table

# Octaves, and absolute bounds, that the protocols cover. `DOMAINS` says what leaves them.
VARIANCE = (-12, 8)
ROW_SUM = (-7, 11)
L2Q_SUM = (-10, 11)  # learnt c and d leave some rows with small scores only
L1_SUM = (-10, 6)
QUOTIENT = (-12, 6)  # of a denominator over its public scale


def linear(module: nn.Linear, secret: dict, x: Share) -> Share:
    """The affine map x W^T + b. One round; n / 2 words."""
    over = x.over if "bias" not in secret and x.over is not None and x.over.shape[-1] == 1 else None
    x = Share(x.data, x.bits) if over is not None else x.settle()
    x = x.to(min(x.bits, session.bits + 7) if over is not None else session.bits)
    y = by_weight(("linear",), secret["weight"].name, x, secret["weight"], (*x.shape[:-1], module.out_features))
    y = y + secret["bias"] if "bias" in secret else y
    return y if over is None else Share(y.to(session.bits).data, session.bits, over)


def conv2d(module: nn.Conv2d, secret: dict, x: Share) -> Share:
    """Convolution; the image is masked before its windows overlap. One round; n / 2 words."""
    kernel, stride, padding = module.kernel_size, module.stride, module.padding
    side = [(x.shape[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1)]
    operation = ("conv", kernel, stride, padding)
    out = (x.shape[0], side[0] * side[1], module.out_channels)
    y = by_weight(operation, secret["weight"].name, x.settle().to(session.bits), secret["weight"], out)
    y = y + secret["bias"] if "bias" in secret else y
    return Share(y.data.transpose(1, 2).unflatten(2, side), y.bits)


def _entered(x: Share | Weight) -> Share:
    """An operand: a weight that the graph uses directly becomes a share."""
    return x.enter(session.bits) if isinstance(x, Weight) else x


def matmul(module: MatMul, secret: dict, left: Share | Weight, right: Share | Weight) -> Share:
    """Product of two activations (Beaver). One round; the words of both. A factor of left's rows waits."""
    left, right = _entered(left), _entered(right)
    over = left.over if left.over is not None and left.over.shape[-1] == 1 else None
    left = Share(left.data, left.bits) if over is not None else left.settle()
    left = left.to(min(left.bits, session.bits + 7) if over is not None else session.bits)
    right = right.settle().to(min(session.bits, 2 * session.bits + 4 - left.bits))
    out = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]) + (left.shape[-2], right.shape[-1])
    a, b, share = session.correlation("matmul", tuple(left.shape), tuple(right.shape), tuple(out))
    e, f = session.reveal(left.data - a, right.data - b)
    y = product(e, b + f if session.serving else b).add_(product(a, f)).add_(share)
    y = Share(y, left.bits + right.bits)
    return y if over is None else multiply(y.to(session.bits), over)


def relu(module: nn.ReLU, secret: dict, x: Share) -> Share:
    """max(x, 0) for |x| below 64, within 2^-9. Three rounds; n words and 7 n bits."""
    return positive_part(x.settle().to(session.bits), 9)


def max_pool2d(module: nn.MaxPool2d, secret: dict, x: Share) -> Share:
    """The maximum of each window: along rows, then along columns, one comparison less than there are entries in each.

    Values differ by less than 64; within 2^-9 for each comparison. Three rounds per comparison.
    """
    x = x.settle().to(session.bits)
    pairs = [p if isinstance(p, tuple) else (p, p) for p in (module.kernel_size, module.stride, module.padding)]
    for axis in (3, 2):
        kernel, stride, padding = (pair[axis - 2] for pair in pairs)
        size = x.shape[axis]
        starts = range(-padding, size + padding - kernel + 1, stride)
        best = None
        for offset in range(kernel):
            # Outside the image stands the nearest pixel of the window: a maximum may count it twice.
            index = torch.tensor(
                [min(max(start + offset, max(start, 0)), min(start + kernel, size) - 1) for start in starts]
            )
            part = Share(x.data.index_select(axis, index.to(x.data.device)), x.bits)
            best = part if best is None else maximum(best, part, 9)
        x = best
    return x


_GELU_KNOTS = [-3.45, -1.1, 1.1, 3.45]


@functools.cache
def _gelu(bits: int) -> Polynomials:
    def exact(x):
        return x / 2 * (1 + torch.erf(torch.as_tensor(x) / math.sqrt(2)).numpy())

    nothing, itself = (0.0, [0.0] * 5), (0.0, [0.0, 1.0, 0.0, 0.0, 0.0])
    return Polynomials(_GELU_KNOTS, [nothing, *fitted(exact, _GELU_KNOTS, 4, 12), itself], bits, 12)


def gelu(module: nn.GELU, secret: dict, x: Share) -> Share:
    """GELU as a quartic on each of three segments, zero to their left and x to their right.

    Within 2e-3 for |x| below 28. Five rounds; 1.5 n words and 29 n bits.
    """
    bits = min(session.bits - 2, 11)
    x = x.settle().to(bits)
    return truncate(piecewise(x, _gelu(bits), max(0, bits - 10)), session.bits)


def _square(x: Share) -> Share:
    """x^2. One round; n words."""
    r, share = session.correlation("square", tuple(x.shape))
    (e,) = session.reveal(x.data - r)
    y = 2 * e * r + share
    return Share(y + e * e if session.serving else y, 2 * x.bits)


def quad(module: Quad, secret: dict, x: Share) -> Share:
    """(x^2 + 2 x + 1) / 8 + 3 / 8, for |x| below 2^8. One round; n words."""
    a, b, c = module.coefficients
    shift = b / (2 * a)
    y = scaled(_square(x.settle().to(session.bits - 2) + shift), a).to(session.bits)
    return y + (c - a * shift * shift)


def learned_quad(module: LearnedQuad, secret: dict, x: Share) -> Share:
    """The quadratic with the server's coefficients. Three rounds; 1.5 n words."""
    x = x.settle().to(session.bits - 1)
    values = [secret[name] for name in "abc"]
    y = _quadratic(values[0].name, x, values[0].shape, lambda: [value.value for value in values], session.bits)
    return truncate(y, session.bits)


def layer_norm(module: nn.LayerNorm, secret: dict, x: Share) -> Share:
    """(x - mean) / sqrt(variance + eps), scaled and shifted, for a variance from 2^-12 to 2^8.

    One opening of x - mean serves the variance and the result. Eight rounds, and one for the scale; n words and, per
    row, those of `power` and one more; n / 2 for the scale.
    """
    size = module.normalized_shape[-1]
    x = x.settle().to(min(session.bits, (59 - 3 * int(math.log2(size))) // 2))
    total = Share(x.data.sum(-1, keepdim=True), x.bits)
    mean = scaled(total, 1 / size).to(x.bits)
    centred = x - mean
    r, b, squares, share = session.correlation("layer_norm", tuple(x.shape))
    (e,) = session.reveal(centred.data - r)
    variance = 2 * (e * r).sum(-1, keepdim=True) + squares
    if session.serving:
        variance += (e * e).sum(-1, keepdim=True)
    # The sum of squares is `size` times the variance; eps joins in its own units.
    units = 2 * x.bits
    variance = Share(variance, units).plus(round(module.eps * size * 2.0**units))
    whole = math.ceil(math.log2(size))
    inverse = power(Share(variance.data, units + whole), -0.5, VARIANCE, math.sqrt(size / 2.0**whole))
    (f,) = session.reveal(inverse.data - b)
    y = Share(e * (b + f if session.serving else b) + r * f + share, x.bits + inverse.bits).to(session.bits)
    if "weight" in secret:
        weight = secret["weight"]
        y = by_weight(("multiply",), weight.name, y, weight, tuple(y.shape))
    return y + secret["bias"] if "bias" in secret else y


# Normalisers


def _normalised(weights: Share, dim: int, octaves: tuple[int, int], extra: int = 0, nonzero: bool = True) -> Share:
    """Weights that still wait for the reciprocal of their sum."""
    total = Share(weights.data.sum(dim, keepdim=True), weights.bits)
    return Share(weights.data, weights.bits, power(total, -1.0, octaves, extra=extra, nonzero=nonzero))


@functools.cache
def _exp(bits: int) -> Polynomials:
    knots = [-21.33, -9.93, -6.21, -3.9, -1.91]
    extra = min(20, 61 - 4 * bits)
    return Polynomials(knots, [(0.0, [0.0] * 5), *fitted(np.exp, [*knots, 0.05], 4, extra)], bits, extra)


def _exponentials(x: Share) -> Share:
    """exp(x) for x from -118 to 0, as a quartic on each of five segments and zero below -21. Five rounds; 1.5 n words.

    Within 1e-3 of the value, of which x's rounding to 11 bits is half, and 2^-13.
    """
    bits = min(session.bits - 1, 11)
    return truncate(piecewise(x.to(bits), _exp(bits), max(0, bits - 8)), session.bits + 1)


def softmax(module: Softmax, secret: dict, scores: Share) -> Share:
    """exp(a - max a) over its sum, weights to 1e-3, for scores that differ by less than 128.

    To 4e-3 where one weight stands beside hundreds that are small and alike: their errors are alike too, and add up.
    3 ceil(log2 K) + 11 rounds; 1.5 n words for exp, n for the maximum.
    """
    scores = scores.settle().to(session.bits)
    dim = module.dim % len(scores.shape)
    exponentials = _exponentials(scores - largest(scores, dim, 8))
    count = scores.shape[dim]
    # The sum lies between 1 and K: its reciprocal needs the more bits, the smaller it can become.
    return _normalised(exponentials, dim, (-1, log2_above(count) + 1), extra=log2_above(count) // 2)


def two_quad(module: TwoQuad, secret: dict, scores: Share) -> Share:
    """(a + c)^2 over its sum; squares are scaled by 1 / (32 K), so that sums stay near one. n words and one per row."""
    y = _square(scores.settle().to(session.bits - 2) + module.c)
    down = 5 + log2_above(scores.shape[module.dim])
    return _normalised(Share(y.data, y.bits + down).to(session.bits + 7), module.dim, ROW_SUM)


def two_relu(module: TwoReLU, secret: dict, scores: Share) -> Share:
    """relu(a) over its sum; a row without a positive score gives zeros. Sums are scaled by about 1 / sqrt K."""
    positive = positive_part(scores.settle().to(session.bits), 9)
    down = log2_above(scores.shape[module.dim]) // 2
    return _normalised(
        Share(positive.data, positive.bits + down).to(session.bits + 7), module.dim, ROW_SUM, nonzero=False
    )


def l2q(module: L2Q, secret: dict, scores: Share) -> Share:
    """(d a + c)^2 over its sum, from one opening of a and without a truncation in between.

    With P = d^2, Q = 2 d c and R = c^2, all the server's, the square is P a^2 + Q a + R. One round and n words, and
    those of the sums' reciprocals. The server scales (d, c) so that the sum is near one where a is near one: L2Q does
    not change when both are scaled. Its eps, 2^-14, is left out: it would move a weight by that part of itself. Scores
    are rounded to 9 bits, which moves a weight by up to 2^-7 over the root of its row's sum of squares.
    """
    # The square has P's bits and twice these: with more, too few of the 64 would be left to truncate it safely.
    x = scores.settle().to(min(session.bits - 4, 11))
    down = log2_above(scores.shape[module.dim])
    pair = [secret.get(name) for name in "dc"]
    shape = torch.broadcast_shapes(*(value.shape for value in pair if value is not None), ())
    name = next((value.name for value in pair if value is not None), "").rpartition(".")[0] or "fixed"
    name = f"{module.d}, {module.c} of {'x'.join(map(str, scores.shape[1:]))}" if name == "fixed" else name

    def coefficients() -> list[torch.Tensor]:
        d, c = (
            torch.as_tensor(fixed if value is None else value.value, dtype=torch.float64)
            for value, fixed in zip(pair, (module.d, module.c), strict=True)
        )
        scale = 1 / (d.square().mean() + c.square().mean())
        return [d * d * scale, 2 * d * c * scale, c * c * scale]

    y = _quadratic(name, x, shape, coefficients, session.bits - 1)
    # The sum of K such squares is near one once they are divided by K.
    # As many bits more as the sum may be smaller than other normalisers'.
    return _normalised(Share(y.data, y.bits + down).to(session.bits + 10), module.dim, L2Q_SUM)


def _quadratic(name: str, x: Share, shape: tuple, coefficients, bits: int) -> Share:
    """P x^2 + Q x + R with P, Q and R known to the server. One round; n words.

    Args:
        name: of the weights, unique in the network.
        x: (..., *shape) or broadcast with it.
        shape: of P, Q and R.
        coefficients: gives P, Q and R; called at the server only.
        bits: fractional bits of P.
    """

    def integers(which: int) -> torch.Tensor:
        return (coefficients()[which].expand(shape) * 2.0 ** (bits + which * x.bits)).round().long()

    p, q = (
        session.known(f"{name}.{letter}", tuple(shape), functools.partial(integers, which))
        for which, letter in enumerate("pq")
    )
    r, pr, rest = session.correlation("quadratic", name, tuple(x.shape), tuple(shape))
    (e,) = session.reveal(x.data - r)
    y = 2 * e * pr + rest
    if session.serving and not session.recording:
        y += (p * e + q) * e + integers(2)
    return Share(y, bits + 2 * x.bits)


def scaling(module: Scaling, secret: dict, scores: Share) -> Share:
    """Scores over n, a public number: local."""
    return scaled(scores, 1 / scores.shape[module.dim])


def l1(module: L1, secret: dict, weights: Share) -> Share:
    """Weights over their sum."""
    return _normalised(weights.settle().to(session.bits + 7), module.dim, L1_SUM)


# What attention mechanisms compute besides


def times(module: Multiply, secret: dict, left: Share | Weight, right: Share | Weight) -> Share:
    """Product of two activations, entry by entry (Beaver). One round; the words of both.

    Errs by what the operands' rounding to `session.bits` does.
    """
    left, right = (_entered(x).settle().to(session.bits) for x in (left, right))
    return multiply(left, right)


def divide(module: Divide, secret: dict, numerator: Share | Weight, denominator: Share | Weight) -> Share:
    """Quotients a / (b + eps) for b / scale from 2^-12 to 2^6 and quotients below 2^8; of a zero a, zero whatever b is.

    Such a b is a sum of many terms >= 0, of which `scale`, rounded to a power of two, is the usual size: few sums are
    64 times larger, but where most terms are near zero it can be small, down to eps, 2^-14. The reciprocal of b / scale
    has 23 fractional bits, 18 of them of its own, and a keeps the bits it comes with. Below 2^-12 scale the
    reciprocal stays below 5 * 2^12 / scale.

    Within 1e-3 of the value (3e-3 for b / scale below 2^-11) and a step, and what a and b err by themselves. Twelve
    rounds; n + n / 2 words for n quotients, those of `reciprocal` and one more per denominator.
    """
    down = round(math.log2(module.scale))  # a power of two is free
    b = _entered(denominator).settle()
    b = b.to(max(b.bits, session.bits + 4)) + module.eps
    b = Share(b.data, b.bits + down)
    inverse = reciprocal(b, QUOTIENT, 18)
    a = _entered(numerator).settle()
    # Quotients below 2^8 leave 54 bits to the product.
    a = a.to(min(a.bits, 54 - inverse.bits - down))
    y = multiply(a, inverse)
    return truncate(Share(y.data, y.bits + down), session.bits)


def exponential(module: Exponential, secret: dict, x: Share) -> Share:
    """exp(a - max a) for entries that differ by less than 118, as `softmax` finds it; without a maximum, a <= 0.

    The maximum to 2^-12 per comparison, since here no sum makes up for a common factor. Within 1e-3 of the value, 2^-12
    ceil(log2 K) of it and 2^-13. 3 ceil(log2 K) + 5 rounds for the largest of K; 1.5 n words, n for the maximum.
    """
    x = x.settle().to(session.bits)
    if module.dims:
        best = largest(Share(x.data.flatten(-module.dims), x.bits), -1, 12, 5)
        x = x - best[(..., *[None] * (module.dims - 1))]
    return _exponentials(x)


def squared_norm(module: SquaredNorm, secret: dict, x: Share) -> Share:
    """Sum of squares of each row, from one opening. One round; n words."""
    y = _square(x.settle().to(session.bits))
    return Share(y.data.sum(-1, keepdim=True), y.bits)


def head_linear(module: HeadLinear, secret: dict, x: Share) -> Share:
    """A matrix per head times the tokens, known to the server. One round; n / 2 words."""
    weight = secret["weight"]
    out = (*x.shape[:-2], weight.shape[-2], x.shape[-1])
    return by_weight(("heads",), weight.name, x.settle().to(session.bits), weight, out)


def token_conv(module: TokenConv, secret: dict, x: Share) -> Share:
    """A kernel per head along the tokens, known to the server; masked before shifts overlap. One round; n / 2 words."""
    weight = secret["weight"]
    return by_weight(("taps",), weight.name, x.settle().to(session.bits), weight, tuple(x.shape))


def gain(module: Gain, secret: dict, x: Share) -> Share:
    """A factor that the server knows, entry by entry. One round; n / 2 words."""
    weight = secret["weight"]
    out = tuple(torch.broadcast_shapes(x.shape, weight.shape))
    return by_weight(("multiply",), weight.name, x.settle().to(session.bits), weight, out)


def moved(module: nn.Module, secret: dict, x: Share) -> Share:
    """What only takes and adds up entries, the same on integers. Local."""
    x = x.settle()
    return Share(module(x.data), x.bits)


def segment_means(module: SegmentMeans, secret: dict, x: Share) -> Share:
    """Sums over segments, times the public 1 / size, right to 2^-(`session.bits` + 1) of the mean. Local."""
    x = x.settle().to(session.bits)
    segment = torch.tensor(module.assignment())
    sizes = segment.bincount()[:, None]
    sums = x.data.new_zeros(*x.shape[:-2], module.segments, x.shape[-1])
    sums.index_add_(-2, segment.to(x.data.device), x.data)
    bits = session.bits + log2_above(int(sizes.max()))
    factors = (2.0**bits / sizes).round().long().to(x.data.device)
    return Share(sums * factors, x.bits + bits).to(session.bits)


def reweight(module: Reweight, secret: dict, x: Share) -> Share:
    """Rows times public cosines and sines, rounded to `session.bits`. Local."""
    x = x.settle().to(session.bits)
    factors = (module.factors().T[:, :, None] * 2.0**session.bits).round().long().to(x.data.device)  # (N, F, 1)
    return Share((x.data.unsqueeze(-2) * factors).flatten(-2), x.bits + session.bits).to(session.bits)


MODULES = {
    nn.Linear: linear,
    nn.Conv2d: conv2d,
    MatMul: matmul,
    Multiply: times,
    Divide: divide,
    Exponential: exponential,
    SquaredNorm: squared_norm,
    HeadLinear: head_linear,
    TokenConv: token_conv,
    Gain: gain,
    Take: moved,
    TokenSum: moved,
    SegmentMeans: segment_means,
    Reweight: reweight,
    NewtonInverse: newton_inverse,
    PseudoInverse: pseudo_inverse,
    nn.ReLU: relu,
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


def _layout(name: str):
    """A method that only moves numbers about."""

    def apply_to(x: Share | Weight, *args, **kwargs):
        x = _entered(x).settle()
        moved = getattr(x.data, name)(*args, **kwargs)
        if isinstance(moved, tuple):
            return tuple(Share(part, x.bits) for part in moved)
        return Share(moved, x.bits)

    return apply_to


def _cat(parts: list[Share], dim: int = 0) -> Share:
    parts = [_entered(part).settle() for part in parts]
    bits = max(part.bits for part in parts)
    return Share(torch.cat([part.to(bits).data for part in parts], dim), bits)


LAYOUT = ("flatten", "unflatten", "reshape", "transpose", "permute", "unbind", "squeeze", "unsqueeze")

FUNCTIONS = {
    **{name: _layout(name) for name in LAYOUT},
    operator.add: operator.add,
    operator.sub: operator.sub,
    operator.mul: operator.mul,
    operator.truediv: operator.truediv,
    operator.neg: operator.neg,
    operator.getitem: operator.getitem,
    torch.add: operator.add,
    torch.cat: _cat,
}


# What the interpreter asks of a table of protocols


def rewrite(graph: fx.GraphModule) -> fx.GraphModule:
    """The same function in a cheaper order, found from the architecture alone: both parties do it by themselves.

    A max-pool goes before the ReLU that only it reads: a quarter of the comparisons. A LayerNorm that only linear maps
    read hands its scale and shift to them.
    """
    modules = dict(graph.named_modules())
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    for node in calls:
        readers = list(node.users)
        kinds = {type(modules.get(reader.target)) if reader.op == "call_module" else None for reader in readers}
        module = modules[node.target]
        if isinstance(module, nn.ReLU) and len(readers) == 1 and kinds == {nn.MaxPool2d}:
            pool = readers[0]
            pool.replace_all_uses_with(node)
            pool.args, node.args = node.args, (pool,)
            pool.append(node)
        elif isinstance(module, nn.LayerNorm) and module.weight is not None and kinds == {nn.Linear}:
            targets = [reader.target for reader in readers]
            if all(sum(call.target == target for call in calls) == 1 for target in [node.target, *targets]):
                for target in targets:
                    graph.add_submodule(target, _absorbing(modules[target], module))
                graph.add_submodule(node.target, nn.LayerNorm(module.normalized_shape, module.eps, False))
    graph.recompile()
    return graph


def _absorbing(reader: nn.Linear, norm: nn.LayerNorm) -> nn.Linear:
    """The linear map that reads what the norm would have scaled and shifted."""
    whole = nn.Linear(reader.in_features, reader.out_features, device="meta")
    bias = 0 if norm.bias is None else reader.weight @ norm.bias
    bias = bias + (torch.zeros_like(reader.weight[:, 0]) if reader.bias is None else reader.bias)
    whole.weight, whole.bias = nn.Parameter((reader.weight * norm.weight).detach()), nn.Parameter(bias.detach())
    return whole


def secret(name: str, tensor: torch.Tensor, rank: int) -> Weight:
    """A weight: the server keeps it, the client knows its shape."""
    return Weight(name, tensor, rank == SERVER)


def prepare(network, shape: tuple, rank: int, options) -> None:
    """Begin a session: find what the dealer must supply, agree on keys, open the masked weights.

    Args:
        network: the interpreter, its secrets in place.
        shape: of a query's images.
        rank: SERVER or CLIENT.
        options: the party's command line.
    """
    keep_memory()
    session.begin(rank, BITS if options.bits is None else options.bits)
    session.check, session.link = options.check, options.link
    session.audit = None if options.audit is None else []
    session.recording = True
    with without_compiler():
        logits = network.record(Share(torch.empty(shape, dtype=torch.int64, device="meta"), session.bits))
        logits.settle()  # as `reveal_to_client` will
    session.recording = False
    keys = [None, None]
    if options.provider == "TTP":
        key = torch.empty(2, dtype=torch.int64)
        dist.recv(key, 2, comm.get().ttp_group)
        keys[rank] = key.numpy().tobytes()
    elif rank == SERVER:
        keys = [new_key(), new_key()]
        session.send(torch.from_numpy(np.frombuffer(keys[CLIENT], np.int64).copy()))
    else:
        keys[CLIENT] = session.receive(torch.Size((2,)))[0].numpy().tobytes()
    session.dealing = Dealing(rank, tuple(keys))
    if options.provider == "TTP" and rank == SERVER:
        _ask("mask_weights", session.tape.weights)
    session.open_weights()


def _ask(what: str, *arguments) -> torch.Tensor:
    return crypten.mpc.provider.ttp_provider.TTPClient.get().ttp_request(what, "cpu", *arguments)


def note(index: int) -> None:
    """While recording: what follows belongs to the node of this index."""
    session.tape.calls.append([])


def reset() -> None:
    """A query begins."""
    session.serial = 0


def serial_bytes(stats: dict) -> float:
    """Bytes that follow one another on the way: each message's, whichever way it went."""
    return session.serial


def violations() -> list[str]:
    """Where values left a protocol's range, if that was checked on shares."""
    return list(session.violations)


def parts(value) -> list[tuple] | None:
    """This party's share of an activation with its fractional bits, as a list of factors."""
    if not isinstance(value, Share):
        return None
    return [(share.data, share.bits) for share in (value, value.over) if share is not None]


def supply(index: int, node: fx.Node) -> None:
    """Deal for one node. Both parties wait for each other, so that what follows is online alone."""
    session.supplied, session.place = (0.0, 0), str(node.target)
    if not session.tape.calls[index]:
        return
    start, before = time.perf_counter(), session.dealing.corrected
    if session.rank == SERVER and not session.dealing.deals:
        session.dealing.inbox = _ask("correct", session.tape.calls[index])
    session.ready = session.tape.deal(session.dealing, index)
    dist.barrier(comm.get().main_group)
    session.supplied = time.perf_counter() - start, 8 * (session.dealing.corrected - before)


def supplied() -> tuple[float, int]:
    """Seconds that dealing for the last node took, and bytes of corrections, which only a third party would send."""
    return session.supplied


def share_images(images: torch.Tensor | None, shape: tuple) -> Share:
    """The client's images. Nothing is sent: the server's part is zero, and a first product masks the client's."""
    if images is None:
        return Share(torch.zeros(shape, dtype=torch.int64), session.bits)
    return Share((images.double() * 2.0**session.bits).round().long(), session.bits)


def reveal_to_client(logits: Share) -> torch.Tensor | None:
    """The logits, at the client alone."""
    logits = logits.settle()
    if session.rank == SERVER:
        return session.send(logits.data)
    return ((logits.data + session.receive(logits.shape)[0]).double() / 2.0**logits.bits).float()


# What leaves its domain, seen in the clear


def _sums(what: str, sums: torch.Tensor, octaves: tuple[int, int], zeros: bool = False) -> list[Span]:
    sums = sums[sums != 0] if zeros else sums
    return spans(what, sums, (2.0 ** octaves[0], 2.0 ** octaves[1])) if sums.numel() else []


def _spread(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.amax(dim) - x.amin(dim)


def _l2q_domain(module: L2Q, a: torch.Tensor) -> list[Span]:
    d, c = torch.as_tensor(module.d), torch.as_tensor(module.c)
    scale = (d.square().mean() + c.square().mean()) * 2 ** log2_above(a.shape[module.dim])
    return _sums("scaled sums of squares", (d * a + c).square().sum(module.dim) / scale, L2Q_SUM)


def _two_quad_domain(module: TwoQuad, a: torch.Tensor) -> list[Span]:
    scale = 2 ** (5 + log2_above(a.shape[module.dim]))
    return _sums("scaled sums of squares", (a + module.c).square().sum(module.dim) / scale, ROW_SUM)


def _two_relu_domain(module: TwoReLU, a: torch.Tensor) -> list[Span]:
    sums = a.relu().sum(module.dim) / 2 ** (log2_above(a.shape[module.dim]) // 2)
    return spans("scores", a, (-64, 64)) + _sums("scaled sums", sums, ROW_SUM, zeros=True)


def _divide_domain(module: Divide, a: torch.Tensor, b: torch.Tensor) -> list[Span]:
    a, b = torch.broadcast_tensors(a, b + module.eps)
    units = b / 2.0 ** round(math.log2(module.scale))
    # Below the range a quotient may come out three times as large: that is nothing where it is next to nothing.
    small = (a / b).abs() < 2.0**-11
    return (
        spans("scaled denominators", units, (0, 2.0 ** QUOTIENT[1]))
        + spans("quotients", a / b, (-(2.0**8), 2.0**8))
        + _sums("scaled denominators that count", units.masked_fill(small, 0), QUOTIENT, zeros=True)
    )


def _exponential_domain(module: Exponential, a: torch.Tensor) -> list[Span]:
    if not module.dims:
        return spans("exponents", a, (-118, 0.05))
    return spans("spreads", _spread(a.flatten(-module.dims), -1), (0, 118))


def _matrix(what: str, sums: torch.Tensor, low: int) -> list[Span]:
    return _sums(what, sums.amax(-1), (low, log2_above(sums.shape[-1]) + 1))


DOMAINS = {
    nn.ReLU: lambda m, x: spans("inputs", x, (-64, 64)),
    nn.MaxPool2d: lambda m, x: spans("inputs", x, (-32, 32)),
    nn.GELU: lambda m, x: spans("inputs", x, (-28, 28)),
    nn.LayerNorm: lambda m, x: _sums("variances", x.var(-1, unbiased=False) + m.eps, VARIANCE),
    Softmax: lambda m, x: spans("spreads of scores", _spread(x, m.dim), (0, 118)),
    TwoQuad: _two_quad_domain,
    TwoReLU: _two_relu_domain,
    L2Q: _l2q_domain,
    L1: lambda m, x: _sums("sums", x.sum(m.dim), L1_SUM),
    Divide: _divide_domain,
    Exponential: _exponential_domain,
    NewtonInverse: lambda m, a: _matrix("row sums", a.sum(-1) + m.ridge, RIDGED_SUM),
    PseudoInverse: lambda m, a: _matrix("column sums", a.sum(-2), -1),
}
