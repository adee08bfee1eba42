"""Comparisons of a secret with public knots.

A value is opened masked, once. The digits of the public result are looked up in secret truth tables (Ishai et al., "On
the power of correlated randomness in secure computation", 2013), joined to one bit per knot by products of several bits
in one round (ABY2.0, Patra et al., 2021, Section 3.2).

Letters in costs as in `tuned`.
"""

import functools
import operator
from collections.abc import Sequence

import torch

from ..arithmetic.randomness import Dealing, pack, unpack
from ..arithmetic.share import session

DIGIT = 4  # bits of a comparison's digit: its truth tables have 2^DIGIT entries
WINDOW_DIGITS = 4  # of a comparison: 16 bits


def chain(digits: int) -> list[list[tuple]]:
    """The products of a comparison's borrow: one list of variables per term.

    Variables are ("equal", i) and ("less", i), i a digit, the highest digit last: x < y if x is less in digit i and
    equal in all above it, for some i. The highest digit's own "less" stands alone and is not among the terms.
    """
    return [[("equal", above) for above in range(digits - 1, i, -1)] + [("less", i)] for i in range(digits - 2, -1, -1)]


def subsets(digits: int) -> list[tuple]:
    """All sets of two or more variables that stand together in a term of `chain`, in a fixed order."""
    found: dict[tuple, None] = {}
    for term in chain(digits):
        for chosen in range(1, 1 << len(term)):
            if chosen & (chosen - 1):
                found.setdefault(tuple(v for i, v in enumerate(term) if chosen >> i & 1))
    return list(found)


def variables(digits: int) -> list[tuple]:
    """The variables of `chain`, in a fixed order."""
    return list(dict.fromkeys(v for term in chain(digits) for v in term))


def tables(window: torch.Tensor, digits: int) -> torch.Tensor:
    """Truth tables (digits, n), int32, of a comparison of secret windows with anything public.

    Entry v of digit i: bit v says whether v is less than the secret's digit, bit 16 + v whether it is equal. The
    highest digit holds the sign above DIGIT - 1 bits: its "less" is the sign of public minus secret with no borrow yet.
    """
    made = []
    for i in range(digits):
        value = (window >> (DIGIT * i) & (2**DIGIT - 1)).int()
        one = torch.ones_like(value)
        if i < digits - 1:
            equal = one << value
            made.append(equal - 1 | equal << 16)
        else:
            low, sign = value & 7, value >> 3
            equal = one << low
            less = equal - 1 ^ -sign & 0xFF  # public sign 0: the secret's sign, flipped by a borrow
            made.append(less | (less ^ 0xFF) << 8 | equal << 16 | equal << 24)
    return torch.stack(made)


def wide(narrow: torch.Tensor) -> torch.Tensor:
    """int32 to half as many int64."""
    flat = narrow.flatten()
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat.view(torch.int64)


def subset_products(masks: torch.Tensor, names: list[tuple], sets: list[tuple]) -> torch.Tensor:
    """The products of each set of `subsets`, from the masks of `variables`."""
    made: dict[tuple, torch.Tensor] = {(name,): masks[i] for i, name in enumerate(names)}
    for chosen in sorted(sets, key=len):  # but for its last variable, a set is a set too
        made[chosen] = made[chosen[:-1]] & made[chosen[-1:]]
    return torch.stack([made[chosen] for chosen in sets])


def compared(deal: Dealing, count: int, knots: int, bits: int, digits: int, low: int):
    """For a comparison: mask r of x, tables of -r's digits, masks of the digits' bits, and uniform bits for the result.

    Such a bit masks what a comparison says and is known both bit by bit and, by `chosen_supply`, as a number.
    """
    packed = -(-count // 64)
    r = deal.mask(count)
    table = deal.share(
        lambda: wide(tables(-r.clear >> low & (1 << DIGIT * digits) - 1, digits)), -(-digits * count // 2), binary=True
    )
    names = variables(digits)
    masks = deal.bits(len(names), knots, packed)
    sets = subsets(digits)
    products = deal.share(lambda: subset_products(masks.clear, names, sets), len(sets), knots, packed, binary=True)
    bit = deal.bits(bits, packed)
    return (r.mine, table, masks.mine, products, bit.mine), r, bit


def segments(
    x: torch.Tensor,
    knots: list[int],
    joined: Sequence[list[int]],
    low: int,
    digits: int,
    supply: tuple,
    more=(),
    curves=(),
):
    """For flat x the public e = x - r, and for each bit of `joined` a masked public bit (bits, n).

    What is in `more` is opened with x, masked by what the curves after the first supply; then e is a list.

    Bits below `low` are ignored; x and its differences to the knots lie within 2^(low + 4 digits - 1). Three rounds:
    n words, then J (2 k - 2) n bits, two per digit but for the ends, then n for every bit of `joined`.
    """
    r, table, masks, products, bit = supply
    opened = session.reveal(x - r, *(y - curve[0] for y, curve in zip(more, curves[1:])))
    e = opened[0]
    window = e
    if not session.recording:
        # int32 is enough for up to 8 digits, and half the memory of int64.
        places = torch.tensor([_narrow(knot >> low) for knot in knots], dtype=torch.int32, device=e.device)
        window = (e >> low).int() - places[:, None]
    result = not_below(window, digits, table, masks, products)
    if any(len(chosen) > 1 for chosen in joined) and not session.recording:
        result = torch.stack([functools.reduce(operator.xor, result[chosen]) for chosen in joined])
    return (opened if curves else e), open_bits(result, bit, x.numel())


def open_bits(result: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """Words of bits, shared bit by bit, opened under a mask: (..., count). One round."""
    return unpack(session.reveal_bits(mask if session.recording else result ^ mask), count)


def not_below(window: torch.Tensor, digits: int, table: torch.Tensor, masks: torch.Tensor, products: torch.Tensor):
    """Whether public windows (J, n), each less a secret of the tables, are not negative: words of shared bits (J, w).

    One round; two bits per digit but for the ends.
    """
    if session.recording:
        return session.reveal_bits(masks)[0]
    count = window.shape[-1]
    table = table.view(torch.int32)
    table = table[: table.numel() // (digits * count) * digits * count].view(digits, -1, count)
    found = [table[i] >> (window >> (DIGIT * i) & (2**DIGIT - 1)) for i in range(digits)]  # bit 0 less, bit 16 equal
    local = torch.stack(
        [(found[i] if kind == "less" else found[i] >> 16).to(torch.uint8) for kind, i in variables(digits)]
    )
    public = session.reveal_bits(pack(local.bitwise_and_(1)) ^ masks)
    # At least the knot: not below, so the sign flipped.
    result = pack(found[-1].to(torch.uint8).bitwise_and_(1))
    ones = torch.full_like(masks[:1], -1 if session.serving else 0)
    result = ~result if session.serving else result
    known = torch.cat([ones, masks, products])  # shares of the products of no mask, of one and of several
    for places, names in _terms(digits):
        # The product of (public + mask) over the term's variables, one variable after another: a product of masks with
        # the variable, and one without it times what is public.
        part = known[places]
        for name in names:
            half = len(part) // 2
            part = part[half:] ^ (part[:half] & public[name])
        result = result ^ part[0]
    return result


def _narrow(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


@functools.cache
def _terms(digits: int) -> list[tuple[torch.Tensor, list[int]]]:
    """For every term of `chain`: where the products of its variables' subsets are, and the variables to fold, in turn.

    Subsets are in the order of binary numbers whose highest bit is the first variable to fold.
    """
    names = variables(digits)
    place: dict[tuple, int] = {(): 0, **{(name,): 1 + i for i, name in enumerate(names)}}
    place |= {chosen: 1 + len(names) + i for i, chosen in enumerate(subsets(digits))}
    terms = []
    for term in chain(digits):
        every = [tuple(v for i, v in enumerate(term) if chosen >> i & 1) for chosen in range(1 << len(term))]
        terms.append((torch.tensor([place[chosen] for chosen in every]), [names.index(v) for v in reversed(term)]))
    return terms
