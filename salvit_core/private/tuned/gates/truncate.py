"""Truncation without failure, by itself and on the way to a product.

It stands where a local one would too often lose the inference, which is where y is above some 2^40 (but not, so far, in
`share.scaled`). In CCT-7/3x1 with SAL-ViT B=3 `truncate` takes 37 rounds, 8.0 MB one way and 15.8 MB of the dealer's;
`times_rows` takes no round and no byte that a product would not, and 5.8 MB of the dealer's. To truncate exactly what
is truncated locally would take 241 rounds more, 29 MB one way and 57 MB of the dealer's. Rounds are those of one node
after the other; some are shared with what runs beside.
"""

import math

import torch

from ..arithmetic.randomness import CLIENT, SERVER, Dealing, Mask, correlation, pack, unpack
from ..arithmetic.share import Share, Waiting, session

FEW = 1 << 14  # numbers of which a truncation saves a round rather than half of their words


def cut(deal: Dealing, s: Mask, shape: tuple, shift: int):
    """For a mask s: shares of s without its lowest `shift` bits, and of its highest bit times 2^(64 - shift).

    What truncates c - s, c public: floor(c / 2^shift) less the first, and more the second where c has no highest bit.
    """
    whole = deal.share(lambda: above(s.clear, shift), *shape)
    return whole, deal.share(lambda: (s.clear >> 63 & 1) << (64 - shift), *shape)


def above(s: torch.Tensor, shift: int) -> torch.Tensor:
    """Without the lowest bits; what comes from above is zero."""
    return s >> shift & (1 << (64 - shift)) - 1


@correlation("opening")
def deal_opening(deal: Dealing, shape: tuple, shift: int):
    """For `truncate` in one round: a mask and what `cut` makes of it."""
    s = deal.mask(*shape)
    return s.mine, *cut(deal, s, shape, shift)


@correlation("truncation")
def deal_truncation(deal: Dealing, shape: tuple):
    """For `truncate`: a mask s of the client's share, a bit of the server's, and their product."""
    count = math.prod(shape)
    s = deal.own(CLIENT, count)
    bit = deal.own(SERVER, -(-count // 64))
    share = deal.share(lambda: unpack(bit.clear, count) * (1 - (s.clear >> 63 & 1)), count)
    return s.mine, bit.mine, share


def truncate(x: Share, bits: int, multiple: bool = False) -> Share:
    """The same value with fewer fractional bits, within one unit and without failure for |x| below 2^62 units.

    Few numbers: both open c = x + 2^62 + s. Many: the client masks its part by s and sends it, the server alone adds up
    c = x + 2^62 - s. Then x is (c >> t) less (or more) (s >> t), corrected by 2^(64-t) where the sum passed 2^64, which
    the highest bits of c and s tell. One round and n words; where there are many, two rounds and n / 2 + n / 128 words.
    What is a multiple of 2^t, and said to be one, takes the way of few numbers, which never rounds one up.

    Functionality:
        Inputs: x shared, below 2^62 units.
        Output: x / 2^t, shared, rounded down, or up where the lowest t bits of c are fewer than x's: with the
            probability of what is cut off. Where there are many: or as few as x's, 2^-t oftener.
        Opened: c, to both where there are few; else to the server, and to the client c's sign under a mask.
        Simulator: uniform words and bits.
        Failure: 0.
    """
    shift = x.bits - bits
    if multiple or x.data.numel() <= FEW:
        s, whole, high = session.correlation("opening", tuple(x.shape), shift)
        (c,) = session.reveal(x.data + s)
        public, high = unmasked(c, shift, high)
        return Share((public if session.serving else 0) - whole + high, bits)
    flat = x.data.reshape(-1)
    count = flat.numel()
    s, bit, share = session.correlation("truncation", tuple(x.shape))
    mask = (1 << (64 - shift)) - 1
    if session.rank == CLIENT:
        session.send(flat - s)
        (masked,) = session.receive(torch.Size((-(-count // 64),)))
        masked = unpack(masked, count)
        high = masked * (1 - (s >> 63 & 1)) + (1 - 2 * masked) * share
        y = (s >> shift & mask) + (high << (64 - shift))
    else:
        (masked,) = session.receive(torch.Size((count,)))
        c = flat + masked + (1 << 62)
        masked = pack((c >= 0).to(torch.uint8)) ^ bit
        session.send(masked)
        masked = unpack(masked, count)
        high = (1 - 2 * masked) * share - 1
        y = (c >> shift & mask) - (1 << (62 - shift)) + 1 + (high << (64 - shift))
    return Share(y.view(x.shape), bits)


def unmasked(c: torch.Tensor, shift: int, *high: torch.Tensor) -> list[torch.Tensor]:
    """Of an opened x + s: what is public of the truncated x, and each of the corrections where it is due."""
    c = c + (1 << 62)
    public = (c >> shift & (1 << (64 - shift)) - 1) - (1 << (62 - shift))
    return [public, *(torch.where(c >= 0, part, 0) for part in high)]


def rows_supply(deal: Dealing, r: Mask, shape: tuple, rows: tuple, shift: int):
    """For x masked by r and a truncated factor per row: the factor's mask, what `cut` makes of it, r times each."""
    s = deal.mask(*rows)
    whole, high = cut(deal, s, rows, shift)
    first = deal.share(lambda: r.clear * above(s.clear, shift), *shape)
    return s.mine, whole, high, first, deal.share(lambda: r.clear * ((s.clear >> 63 & 1) << (64 - shift)), *shape)


@correlation("rows")
def deal_rows(deal: Dealing, shape: tuple, factors: tuple, shift: int):
    """For `times_rows`: a mask of the values, and of their factors."""
    r = deal.mask(*shape)
    return r.mine, *rows_supply(deal, r, shape, factors, shift)


def times_rows(x: Share, factor: Waiting) -> Share:
    """X times a factor per row, which is truncated on the way, exactly. One round; the words of both.

    Functionality:
        Inputs: x and a factor per row shared, the factor below 2^62 units.
        Output: x times the factor, shared, the factor truncated as by `truncate`.
        Opened: x - a and the factor + s, to both.
        Simulator: uniform words.
        Failure: 0.
    """
    shift = factor.share.bits - factor.bits
    a, *supply = session.correlation("rows", tuple(x.shape), tuple(factor.shape), shift)
    e, c = session.reveal(x.data - a, factor.share.data + supply[0])
    return Share(rows_product(e, a, c, shift, supply), x.bits + factor.bits)


def rows_product(e: torch.Tensor, a: torch.Tensor, c: torch.Tensor, shift: int, supply) -> torch.Tensor:
    """(e + a) times the factor whose masked value c was opened, less its lowest `shift` bits; e is public. Local."""
    _, whole, high, first, second = supply
    public, high, second = unmasked(c, shift, high, second)
    ours = high - whole
    return e * (ours + public if session.serving else ours) + (a * public - first + second)
