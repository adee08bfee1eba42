"""Inverses of matrices on shares, by iterations at 24 fractional bits whose products all end in an exact truncation.

A matrix that is in several products is opened masked once. Letters in costs as in `tuned`, n the matrix's entries.
"""

import functools

import torch

from ....models.operations import EPS, NewtonInverse, PseudoInverse
from ...domains import Span, within_octaves
from ..arithmetic.randomness import Dealing, Mask, correlation
from ..arithmetic.ring import log2_above, product
from ..arithmetic.share import Share, session
from .maximum import largest
from .power import power
from .product import multiply
from .truncate import truncate

FINE = 24  # fractional bits of a matrix's inverse while it is found
RIDGED_SUM = -4  # the least row sum of a matrix that NewtonInverse inverts, as an octave


@correlation("products")
def deal_products(deal: Dealing, shape: tuple, count: int, pairs: tuple):
    """For matrices that each are in several products: masks of `count` square matrices, and the products of pairs."""
    masks = [deal.mask(*shape) for _ in range(count)]
    made = {}
    for i, j in pairs:
        made[i, j] = deal.share(functools.partial(_product, masks[i], masks[j]), *shape)
    return [mask.mine for mask in masks], made


def _product(a: Mask, b: Mask) -> torch.Tensor:
    return product(a.clear, b.clear)


class _Powers:
    """Products of square matrices, each opened masked once for all that it is in.

    The mask of a matrix stays with it, as that of a weight does: what is opened is that one masked value.

    Args:
        shape: of every matrix, (..., m, m).
        count: how many there will be.
        pairs: the products that will be asked for, matrices counted from zero in the order of `open`.
    """

    def __init__(self, shape: tuple, count: int, pairs: list[tuple[int, int]]):
        self.masks, self.products = session.correlation("products", tuple(shape), count, tuple(pairs))
        self.shares: list[Share] = []
        self.opened: list[torch.Tensor] = []

    def open(self, x: Share) -> int:
        """Take in a matrix; its number. One round; its words."""
        self.shares.append(x)
        self.opened += session.reveal(x.data - self.masks[len(self.opened)])
        return len(self.opened) - 1

    def product(self, i: int, j: int, less: int = 0, halvings: int = 0) -> Share:
        """X_i X_j, or X_i (less I - X_j) / 2^halvings, to FINE bits, below 2^(62 - 2 FINE). Two rounds; n / 2 words."""
        e, f, mask = self.opened[i], self.opened[j], self.masks[j]
        y = product(e, f + mask if session.serving else mask) + product(self.masks[i], f) + self.products[i, j]
        if less:
            y = (self.shares[i].data * less << FINE) - y
        return truncate(Share(y, 2 * FINE + halvings), FINE)


def _largest_sum(a: Share, dim: int) -> Share:
    """The largest sum along a dimension, (..., 1), to 2^-16."""
    sums = Share(a.data.sum(dim), a.bits).to(16)
    return largest(sums, -1, 16, -(-(18 + log2_above(a.shape[-1])) // 4))


def _matrix_domain(what: str, sums: torch.Tensor, low: int) -> list[Span]:
    return within_octaves(what, sums.amax(-1), (low, log2_above(sums.shape[-1]) + 1))


def newton_inverse(module: NewtonInverse, secret: dict, a: Share) -> Share:
    """(A + ridge I)^-1 by Newton's iteration, as the module defines it, for row sums from 2^-4 to 2 m.

    Of an error d of Z a step that has converged leaves d A d, so that only the last step's rounding remains, about
    sqrt(m) |Z| 2^-24, and the ridge's, |Z|^2 2^-25. The starting value is right to 1e-2, which the iteration forgets.

    6 rounds per iteration, 4 for few numbers, and 5 and those of `largest` before; with n = m^2 entries (1 +
    3 iterations) n words.

    Functionality:
        Inputs: A shared.
        Output: The iterate, shared, every product truncated exactly.
        Opened: A, each Z and A Z less their masks, to both; by `largest`, `power` and `truncate`, masked words and
            bits.
        Simulator: uniform words and bits.
        Failure: 2^-38 a number of A's row sums; of all products 0.
    """
    steps, size = module.iterations, a.shape[-1]
    one = torch.eye(size, dtype=torch.int64, device=a.data.device)
    a = a.settle().to(FINE).plus(one * round(module.ridge * 2.0**FINE))
    start = truncate(power(_largest_sum(a, -1), -1.0, (RIDGED_SUM, log2_above(size) + 1), factor=1.5), FINE)
    z = Share(start.data[..., None] * one, FINE)
    # Matrices: A, then Z and A Z of each step.
    places = [(2 * i + 1, 2 * i + 2) for i in range(steps)]
    powers = _Powers(a.shape, 1 + 2 * steps, [pair for now, az in places for pair in ((0, now), (now, az))])
    powers.open(a)
    for now, az in places:
        powers.open(z)
        powers.open(powers.product(0, now))
        z = powers.product(now, az, less=2)
    return z


def newton_inverse_domain(module: NewtonInverse, a: torch.Tensor) -> list[Span]:
    """The range of the row sums."""
    return _matrix_domain("row sums", a.sum(-1) + module.ridge, RIDGED_SUM)


def pseudo_inverse(module: PseudoInverse, secret: dict, a: Share) -> Share:
    """Nystromformer's iteration, as the module defines it, for column sums that are at most 2 m.

    A step takes four products: A Z, then A Z (7 - A Z), A Z (15 - ...) and Z (13 - ...) / 4. Where A is nearly singular
    the result has not converged and depends on the starting value, whose reciprocal therefore takes one Newton step,
    and each step enlarges a rounding error by 13/4: at the end it is about sqrt(m) 2^-24 (13/4)^iterations.

    12 rounds per iteration, 8 for few numbers, and 11 and those of `largest` before; with n = m^2 entries
    (3 + 6 iterations) n words.

    Functionality:
        Inputs: A shared.
        Output: The iterate, shared, every product truncated exactly.
        Opened: A, each Z and what it multiplies less their masks, to both; by `largest`, `power` and `truncate`,
            masked words and bits.
        Simulator: uniform words and bits.
        Failure: 2^-31 a number of A and of its column sums; of all products 0.
    """
    steps, size = module.iterations, a.shape[-1]
    a = a.settle().to(FINE)
    most = _largest_sum(a, -2) + EPS
    inverse = truncate(power(most, -1.0, (-1, log2_above(size) + 1)), FINE)
    off = truncate(multiply(most, inverse), FINE)
    inverse = truncate(multiply(inverse, 2 - off), FINE)
    z = truncate(multiply(Share(a.data.mT, FINE), inverse[..., None]), FINE)
    # Matrices: A, then Z, A Z and the two brackets of each step.
    places = [range(4 * i + 1, 4 * i + 5) for i in range(steps)]
    pairs = [pair for now, az, b, c in places for pair in ((0, now), (az, az), (az, b), (now, c))]
    powers = _Powers(a.shape, 1 + 4 * steps, pairs)
    powers.open(a)
    for now, az, b, c in places:
        powers.open(z)
        powers.open(powers.product(0, now))
        powers.open(powers.product(az, az, less=7))
        powers.open(powers.product(az, b, less=15))
        z = powers.product(now, c, less=13, halvings=2)
    return z


def pseudo_inverse_domain(module: PseudoInverse, a: torch.Tensor) -> list[Span]:
    """The range of the column sums."""
    return _matrix_domain("column sums", a.sum(-2), -1)
