"""Positive parts and maxima."""

import torch
from torch import nn

from ...domains import Span, spans
from ..arithmetic.polynomials import Polynomials
from ..arithmetic.randomness import Dealing, correlation, unpack
from ..arithmetic.share import Share, session
from .compare import DIGIT, WINDOW_DIGITS, not_below, open_bits, subset_products, subsets, tables, variables, wide
from .curve import check, piecewise

# Of four numbers: which differences are compared, and of each but the last, which must be so (False) or not so (True)
# for it to be the largest. The first of equal ones is.
PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
WINNERS = [
    [(0, False), (1, False), (2, False)],
    [(0, True), (3, False), (4, False)],
    [(1, True), (3, True), (5, False)],
]
_RELU = Polynomials([0.0], [(0.0, [0.0, 0.0]), (0.0, [0.0, 1.0])], 0, 0)


def positive_part(x: Share, resolution: int, digits: int = WINDOW_DIGITS) -> Share:
    """max(x, 0) for |x| below 2^(4 digits - 1 - resolution), within 2^-resolution.

    Three rounds; n words and (2 digits - 1) n bits.
    """
    low = max(0, x.bits - resolution)
    return Share(piecewise(Share(x.data, 0), _RELU, low, digits).data, x.bits)


def relu(module: nn.ReLU, secret: dict, x: Share) -> Share:
    """max(x, 0) for |x| below 64, within 2^-9. Three rounds; n words and 7 n bits.

    Functionality:
        Inputs: x shared.
        Output: x or 0, shared; which, for |x| below 2^-9, the lowest bits of the opened word decide.
        Opened: x - r and masked bits, to both.
        Simulator: uniform words and bits.
        Failure: 2^-37 a number.
    """
    return positive_part(x.settle().to(session.bits), 9)


def relu_domain(module: nn.ReLU, x: torch.Tensor) -> list[Span]:
    """The input's range."""
    return spans("inputs", x, (-64, 64))


def maximum(x: Share, y: Share, resolution: int, digits: int = WINDOW_DIGITS) -> Share:
    """The larger of two, within 2^-resolution, for |x - y| below 2^(4 digits - 1 - resolution). Three rounds."""
    return y + positive_part(x - y, resolution, digits)


def max_pool2d(module: nn.MaxPool2d, secret: dict, x: Share) -> Share:
    """The maximum of each window: along rows, then along columns, one comparison less than there are entries in each.

    Values differ by less than 64; within 2^-9 for each comparison. Three rounds per comparison.

    Functionality:
        Inputs: x shared.
        Output: An entry of each window, shared: the largest, or one within 2^-9 of it a comparison.
        Opened: Differences less r and masked bits, to both.
        Simulator: uniform words and bits.
        Failure: 2^-37 a number of x.
    """
    x = x.settle().to(session.bits)
    pairs = [p if isinstance(p, tuple) else (p, p) for p in (module.kernel_size, module.stride, module.padding)]
    for axis in (3, 2):
        kernel, stride, padding = (pair[axis - 2] for pair in pairs)
        size = x.shape[axis]
        starts = range(-padding, size + padding - kernel + 1, stride)
        best: Share | None = None
        for offset in range(kernel):
            # Outside the image stands the nearest pixel of the window: a maximum may count it twice.
            index = torch.tensor(
                [min(max(start + offset, max(start, 0)), min(start + kernel, size) - 1) for start in starts]
            )
            part = Share(x.data.index_select(axis, index.to(x.data.device)), x.bits)
            best = part if best is None else maximum(best, part, 9)
        assert best is not None  # a kernel has entries
        x = best
    return x


def max_pool2d_domain(module: nn.MaxPool2d, x: torch.Tensor) -> list[Span]:
    """The input's range: a difference stays below 64."""
    return spans("inputs", x, (-32, 32))


@correlation("fours")
def deal_fours(deal: Dealing, count: int, digits: int):
    """For `_largest_of_four`: masks of four numbers, what compares their six differences, and three bits.

    Of the masks of what the comparisons say, the products that tell whether each of three numbers wins; of its bit the
    product with the difference of its mask and the last one's.
    """
    packed, names, sets = -(-count // 64), variables(digits), subsets(digits)
    r = deal.mask(4, count)

    def differences() -> torch.Tensor:
        pairs = torch.stack([r.clear[j] - r.clear[i] for i, j in PAIRS]) & (1 << DIGIT * digits) - 1
        return wide(tables(pairs, digits))

    table = deal.share(differences, -(-digits * len(PAIRS) * count // 2), binary=True)
    masks = deal.bits(len(names), len(PAIRS), packed)
    shape = (len(sets), len(PAIRS), packed)
    products = deal.share(lambda: subset_products(masks.clear, names, sets), *shape, binary=True)
    places = deal.bits(len(PAIRS), packed)

    def triples() -> torch.Tensor:
        made = []
        for factors in WINNERS:
            a, b, c = (places.clear[pair] for pair, _ in factors)
            made.append(torch.stack([a & b, a & c, b & c, a & b & c]))
        return torch.stack(made)

    joint = deal.share(triples, len(WINNERS), 4, packed, binary=True)
    bit = deal.bits(len(WINNERS), packed)
    chosen = deal.share(lambda: unpack(bit.clear, count), len(WINNERS), count)
    with_r = deal.share(lambda: unpack(bit.clear, count) * (r.clear[:3] - r.clear[3]), len(WINNERS), count)
    return r.mine, (table, masks.mine, products), (places.mine, joint), bit.mine, (chosen, with_r)


def largest(x: Share, dim: int, resolution: int, digits: int = WINDOW_DIGITS) -> Share:
    """The largest entry along a dimension, which stays, rounded to a resolution: a tournament of fours, without argmax.

    Differences are below 2^(4 digits - 1 - resolution). Four rounds for a factor of four, three for a last one of two;
    4 n / 3 words for n entries.
    """
    best, bits = x.to(resolution), x.bits
    while (size := best.shape[dim]) > 1:
        parts = 4 if size > 3 else 2
        group = size // parts
        *entries, rest = best.data.split([group] * parts + [size - parts * group], dim)
        if parts == 4:
            most = _largest_of_four(torch.stack(entries), digits)
        else:
            most = maximum(Share(entries[0], resolution), Share(entries[1], resolution), resolution, digits).data
        best = Share(torch.cat([most, rest], dim), resolution)
    return best.to(bits)


def _largest_of_four(x: torch.Tensor, digits: int) -> torch.Tensor:
    """The largest of x[0] to x[3], entry by entry, exactly, in raw units. Four rounds; the words of x.

    Every entry is opened masked once, whose differences are public then. What six comparisons say is masked and opened;
    a product of three bits says of each entry whether it is the largest, masked and opened too.
    """
    room = 1 << (DIGIT * digits - 1)
    flat = x.flatten(1)
    one, other = ([pair[side] for pair in PAIRS] for side in (0, 1))
    check(flat[one] - flat[other], -room, room)
    r, (table, masks, products), (places, joint), bit, (chosen, with_r) = session.correlation(
        "fours", flat.shape[1], digits
    )
    (e,) = session.reveal(flat - r)
    window = e if session.recording else (e[one] - e[other]).int()
    result = not_below(window, digits, table, masks, products)
    public = session.reveal_bits(places if session.recording else result ^ places)
    won = bit
    if not session.recording:
        ones = torch.full_like(places[0], -1 if session.serving else 0)
        rows = []
        for factors, products in zip(WINNERS, joint):
            a, b, c = (places[pair] for pair, _ in factors)
            part = torch.stack([ones, a, b, products[0], c, products[1], products[2], products[3]])
            for pair, negated in reversed(factors):
                half = len(part) // 2
                part = part[half:] ^ (part[:half] & (~public[pair] if negated else public[pair]))
            rows.append(part[0])
        won = torch.stack(rows)
    gamma = open_bits(won, bit, flat.shape[1])
    if session.recording:
        return torch.empty_like(x[0])
    # x[3], and for the one of the others that is the largest its difference to that.
    sign, rest = 1 - 2 * gamma, r[:3] - r[3]
    wins = sign * chosen + gamma if session.serving else sign * chosen
    y = flat[3] + ((e[:3] - e[3]) * wins + sign * with_r + gamma * rest).sum(0)
    return y.view(x.shape[1:])
