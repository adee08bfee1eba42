"""Positive parts and maxima."""

import functools
import itertools

import torch
from torch import nn

from ...domains import Span, spans
from ..arithmetic.polynomials import Polynomials
from ..arithmetic.randomness import Dealing, correlation, unpack
from ..arithmetic.share import Share, session
from .compare import DIGIT, WINDOW_DIGITS, not_below, open_bits, subset_products, subsets, tables, variables, wide
from .curve import check, piecewise

FEW, GROUP, WIDE = 1 << 14, 4, 8  # numbers that are worth a wider tournament; entries in a group of it


@functools.cache
def pairs(size: int) -> list[tuple[int, int]]:
    """Which differences of so many numbers are compared."""
    return list(itertools.combinations(range(size), 2))


@functools.cache
def winners(size: int) -> list[list[tuple[int, bool]]]:
    """Of each number but the last, which differences must be so (False) or not so (True) for it to be the largest.

    The first of equal ones is.
    """
    place = {pair: i for i, pair in enumerate(pairs(size))}
    return [[(place[min(i, j), max(i, j)], j < i) for j in range(size) if j != i] for i in range(size - 1)]


def several(size: int) -> list[int]:
    """The sets of two or more of a winner's differences, as binary numbers."""
    return [chosen for chosen in range(1 << (size - 1)) if chosen & (chosen - 1)]


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


@correlation("group")
def deal_group(deal: Dealing, count: int, size: int, digits: int):
    """For `_largest_of`: masks of a group's numbers, what compares their differences, and a bit of all but one.

    Of the masks of what the comparisons say, the products that tell whether each of these numbers wins; of its bit the
    product with the difference of its mask and the last one's.
    """
    packed, names, sets = -(-count // 64), variables(digits), subsets(digits)
    one, other = zip(*pairs(size))
    r = deal.mask(size, count)

    def differences() -> torch.Tensor:
        return wide(tables(r.clear[list(other)] - r.clear[list(one)] & (1 << DIGIT * digits) - 1, digits))

    table = deal.share(differences, -(-digits * len(one) * count // 2), binary=True)
    masks = deal.bits(len(names), len(one), packed)
    shape = (len(sets), len(one), packed)
    products = deal.share(lambda: subset_products(masks.clear, names, sets), *shape, binary=True)
    places = deal.bits(len(one), packed)

    def joined() -> torch.Tensor:
        made = []
        for factors in winners(size):
            known = [torch.full_like(places.clear[0], -1)]
            for pair, _ in factors:
                known += [part & places.clear[pair] for part in known]
            made.append(torch.stack([known[chosen] for chosen in several(size)]))
        return torch.stack(made)

    joint = deal.share(joined, size - 1, len(several(size)), packed, binary=True)
    bit = deal.bits(size - 1, packed)
    chosen = deal.share(lambda: unpack(bit.clear, count), size - 1, count)
    with_r = deal.share(lambda: unpack(bit.clear, count) * (r.clear[:-1] - r.clear[-1]), size - 1, count)
    return r.mine, (table, masks.mine, products), (places.mine, joint), bit.mine, (chosen, with_r)


def largest(x: Share, dim: int, resolution: int, digits: int = WINDOW_DIGITS) -> Share:
    """The largest entry along a dimension, which stays, rounded to a resolution: a tournament, without argmax.

    Differences are below 2^(4 digits - 1 - resolution). Four rounds for a factor of four, three for a last one of two;
    4 n / 3 words for n entries. Of few numbers four rounds for a factor of eight.
    """
    best, bits = x.to(resolution), x.bits
    while (size := best.shape[dim]) > 1:
        most = WIDE if best.data.numel() <= FEW else GROUP
        parts = min(size, most) if size != 3 or most == WIDE else 2
        group = size // parts
        *entries, rest = best.data.split([group] * parts + [size - parts * group], dim)
        if parts > 2:
            found = _largest_of(torch.stack(entries), digits)
        else:
            found = maximum(Share(entries[0], resolution), Share(entries[1], resolution), resolution, digits).data
        best = Share(torch.cat([found, rest], dim), resolution)
    return best.to(bits)


def _largest_of(x: torch.Tensor, digits: int) -> torch.Tensor:
    """The largest of x[0], x[1], ..., entry by entry, exactly, in raw units. Four rounds; the words of x.

    Every entry is opened masked once, whose differences are public then. What their comparisons say is masked and
    opened; a product of these bits says of each entry whether it is the largest, masked and opened too.
    """
    size, room = len(x), 1 << (DIGIT * digits - 1)
    flat = x.flatten(1)
    one, other = map(list, zip(*pairs(size)))
    check(flat[one] - flat[other], -room, room)
    r, (table, masks, products), (places, joint), bit, (chosen, with_r) = session.correlation(
        "group", flat.shape[1], size, digits
    )
    (e,) = session.reveal(flat - r)
    window = e if session.recording else (e[one] - e[other]).int()
    result = not_below(window, digits, table, masks, products)
    public = session.reveal_bits(places if session.recording else result ^ places)
    won = bit
    if not session.recording:
        ones = torch.full_like(places[0], -1 if session.serving else 0)
        rows = []
        for factors, products in zip(winners(size), joint):
            known = dict(zip(several(size), products)) | {1 << i: places[pair] for i, (pair, _) in enumerate(factors)}
            part = torch.stack([ones, *(known[chosen] for chosen in range(1, 1 << len(factors)))])
            for pair, negated in reversed(factors):
                half = len(part) // 2
                part = part[half:] ^ (part[:half] & (~public[pair] if negated else public[pair]))
            rows.append(part[0])
        won = torch.stack(rows)
    gamma = open_bits(won, bit, flat.shape[1])
    if session.recording:
        return torch.empty_like(x[0])
    # The last, and for the one of the others that is the largest its difference to that.
    sign, rest = 1 - 2 * gamma, r[:-1] - r[-1]
    wins = sign * chosen + gamma if session.serving else sign * chosen
    y = flat[-1] + ((e[:-1] - e[-1]) * wins + sign * with_r + gamma * rest).sum(0)
    return y.view(x.shape[1:])
