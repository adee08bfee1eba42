"""Layer normalisation."""

import math

import torch
from torch import nn

from ...domains import Span, within_octaves
from ..arithmetic.randomness import Dealing, correlation
from ..arithmetic.share import Share, scaled, session
from .linear import by_weight
from .power import inverse_bits, power
from .truncate import rows_product, rows_supply

# Octaves, and absolute bounds, that the protocols cover. `DOMAINS` says what leaves them.
VARIANCE = (-12, 8)


@correlation("layer_norm")
def deal_layer_norm(deal: Dealing, shape: tuple, shift: int):
    """For rows x: a mask r, the sum of r^2 in each row, and what `rows_supply` makes for the inverse deviations."""
    r = deal.mask(*shape)
    squares = deal.share(lambda: (r.clear * r.clear).sum(-1, keepdim=True), *shape[:-1], 1)
    return r.mine, squares, rows_supply(deal, r, shape, (*shape[:-1], 1), shift)


def layer_norm(module: nn.LayerNorm, secret: dict, x: Share) -> Share:
    """(x - mean) / sqrt(variance + eps), scaled and shifted, for a variance from 2^-12 to 2^8.

    One opening of x - mean serves the variance and the result. Five rounds, and one for the scale; n words and, per
    row, those of `power` and one more; n / 2 for the scale.

    Functionality:
        Inputs: x shared; scale and shift, where there are any, of the server.
        Output: (x - mean) / deviation, scaled and shifted, shared.
        Opened: x - mean - r, the masked variance and inverse deviation, masked bits, to both; y1 - r, to the
            server.
        Simulator: uniform words and bits.
        Failure: 2^-36 a number, of x, of its row's variance, and of the result before its scale.
    """
    size = module.normalized_shape[-1]
    x = x.settle().to(min(session.bits, (59 - 3 * int(math.log2(size))) // 2))
    total = Share(x.data.sum(-1, keepdim=True), x.bits)
    mean = scaled(total, 1 / size).to(x.bits)
    centred = x - mean
    whole = math.ceil(math.log2(size))
    factor = math.sqrt(size / 2.0**whole)
    bits = session.bits + 1
    shift = inverse_bits(-0.5, VARIANCE, factor) - bits
    r, squares, supply = session.correlation("layer_norm", tuple(x.shape), shift)
    (e,) = session.reveal(centred.data - r)
    variance = 2 * (e * r).sum(-1, keepdim=True) + squares
    if session.serving:
        variance += (e * e).sum(-1, keepdim=True)
    # The sum of squares is `size` times the variance; eps joins in its own units.
    units = 2 * x.bits
    variance = Share(variance, units).plus(round(module.eps * size * 2.0**units))
    inverse = power(Share(variance.data, units + whole), -0.5, VARIANCE, factor)
    (c,) = session.reveal(inverse.data + supply[0])
    y = Share(rows_product(e, r, c, shift, supply), x.bits + bits).to(session.bits)
    if "weight" in secret:
        weight = secret["weight"]
        y = by_weight(("multiply",), weight.name, y, weight, tuple(y.shape))
    return y + secret["bias"] if "bias" in secret else y


def layer_norm_domain(module: nn.LayerNorm, x: torch.Tensor) -> list[Span]:
    """The range of a row's variance."""
    return within_octaves("variances", x.var(-1, unbiased=False) + module.eps, VARIANCE)
