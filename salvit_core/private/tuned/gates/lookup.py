"""Functions of numbers in few bits by a table that the dealer deals once: one round, and 2^K words a number beforehand.

One-time tables (Ishai et al., "On the power of correlated randomness in secure computation", 2013), in one-hot form:
shares of the unit vector e_r, r uniform in Z_2^K. What is opened is c = x + r mod 2^K, and f(x) = sum over j of
e_r[j] f(c - j), which each party computes by itself, f being public.

From Z_2^64 to Z_2^K. Both parties drop the lowest t bits of a multiple of their shares and keep K of those that are
left. That costs nothing, and cannot fail: what a local truncation fails by, 2^(64-t) (`Share.to`), is zero mod 2^K. So
of numbers that fit K bits truncation is free *and* without failure. It is not deterministic: what lies between two
points becomes either, with the probability of what is cut off. To round to the nearest would take the borrow of t bits,
a comparison of two more rounds.

When it is worth it. With n numbers of K bits: one round, n K / 64 words and 2^K n words of the dealer's, where
hard-swish takes five (or four) rounds, some 2 n words and some 14 n of the dealer's. So it buys four rounds and nine
tenths of the online bytes for 2^K / 14 times the dealer's: at 9 bits 36 times, 4 KB a number. Where correlations are
dealt long before, or n is small, that may be cheap; on a link over which the dealer sends them it is not.
"""

import math

import torch

from ....models.operations import Lookup
from ...domains import Span, spans
from ..arithmetic.randomness import Dealing, correlation
from ..arithmetic.share import Share, Weight, session
from .curve import check
from .product import entered

PRECISION = 15  # bits of the public factor that takes x to its grid
ROWS = 1 << 22  # words of one-hot rows that are worked on at a time


@correlation("lookup")
def deal_lookup(deal: Dealing, count: int, size: int):
    """For a lookup: a mask, of which the lowest bits count, and shares of a row for every number, 1 in its place."""
    r = deal.mask(count)
    return r.mine, deal.share(lambda: unit_rows(r.clear, size), count, size)


def unit_rows(r: torch.Tensor, size: int) -> torch.Tensor:
    """(n,) -> (n, size), with 1 where r is mod `size`, a power of two."""
    rows = r.new_zeros(len(r), size)
    return rows.scatter_(1, (r & size - 1)[:, None], 1)


def packed(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers (n,) of so many bits, as many to a word as fit: ceil(n / floor(64 / bits)) words."""
    each = 64 // bits
    words = -(-len(x) // each)
    if x.device.type == "meta":
        return x.new_empty(words)
    parts = torch.nn.functional.pad(x, (0, words * each - len(x))).view(words, each)
    return (parts << bits * torch.arange(each, device=x.device)).sum(1)


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The numbers that `packed` packed."""
    if words.device.type == "meta":
        return words.new_empty(count)
    places = bits * torch.arange(64 // bits, device=words.device)
    return (words[:, None] >> places & (1 << bits) - 1).flatten()[:count]


def multiple(bits: int, step: float) -> tuple[int, int]:
    """A factor and a shift that take x of so many fractional bits to x / step: factor x / 2^shift, to 2^-15."""
    scale = 2.0**-bits / step
    shift = PRECISION - math.floor(math.log2(scale))
    return round(scale * 2.0**shift), shift


def lookup(module: Lookup, secret: dict, x: Share | Weight) -> Share:
    """The function at one of the two points of the grid next to x. One round; n numbers of K = bits + spare bits.

    They are packed, ceil(n / floor(64 / K)) words; and 2^K n of the dealer's.

    Functionality:
        Inputs: x shared, within the reach of the table.
        Output: f at the point below x or above it, with the probability of what is cut off, shared.
        Opened: x / step + r mod 2^K, to both.
        Simulator: uniform numbers of K bits.
        Failure: 0.
    """
    x = entered(x).settle()
    size = 1 << module.bits + module.spare
    factor, shift = multiple(x.bits, module.step)
    below = (size - (1 << module.bits)) // 2 + module.zero  # points of the table below zero
    if not 0 <= shift <= 64 - module.bits - module.spare:
        raise ValueError(f"step {module.step:g} is too far from 2^-{x.bits} for a table of {size} points")
    least, most = (round(number * module.step * 2.0**x.bits) for number in (-below, size - 1 - below))
    check(x.data, least, most)
    flat = x.data.reshape(-1)
    r, rows = session.correlation("lookup", len(flat), size)
    scaled = flat * factor
    if session.serving:
        ours = (scaled >> shift) + below
    else:
        ours = -(-scaled >> shift)
    ours = ours + r & size - 1
    words = packed(ours, module.bits + module.spare)
    (theirs,) = session.swap(words)
    opened = ours + unpacked(theirs, module.bits + module.spare, len(flat)) & size - 1
    if session.recording:
        return Share(torch.empty_like(x.data), session.bits)
    numbers = torch.arange(size, device=flat.device)
    table = module.points((numbers - (size - (1 << module.bits)) // 2).double())
    table = (table * 2.0**session.bits).round().long()
    some = max(1, ROWS // size)
    made = [
        (table[c[:, None] - numbers & size - 1] * part).sum(1)
        for c, part in zip(opened.split(some), rows.split(some), strict=True)
    ]
    return Share(torch.cat(made).view(x.shape), session.bits)


def lookup_domain(module: Lookup, x: torch.Tensor) -> list[Span]:
    """The reach of the table."""
    size = 1 << module.bits + module.spare
    below = (size - (1 << module.bits)) // 2 + module.zero
    return spans("inputs", x, (-below * module.step, (size - 1 - below) * module.step))
