"""Comparisons and curves on shares: piecewise polynomials with public knots, and powers of positive numbers.

A value is opened masked, once. The digits of the public result are looked up in secret truth tables (Ishai et al., "On
the power of correlated randomness in secure computation", 2013), joined to one bit per knot by products of several bits
in one round (ABY2.0, Patra et al., 2021, Section 3.2), and that bit and the powers of the mask give the polynomial of
the value's segment without opening anything else.

Letters in costs: n elements, J knots, k digits, p degree; a word is 64 bits, and words are counted as those a party
sends and receives, halved, like the bytes in a record. A round is one message or one exchange.
"""

import functools
import math
from fractions import Fraction

import numpy as np
import torch

from .dealing import DIGIT, chain, pack, subsets, unpack, variables
from .shares import Share, multiply, session, truncate

WINDOW_DIGITS = 4  # of a comparison: 16 bits


def _signed(value: int) -> int:
    """An integer mod 2^64 as int64 has it."""
    return (value + 2**63) % 2**64 - 2**63


class Polynomials:
    """Public knots and one integer polynomial per segment, in the raw units of its input.

    Args:
        knots: where segments meet, ascending, in units of the input's value.
        pieces: for every segment a centre and coefficients, lowest first, in powers of (x - centre).
        bits: fractional bits of the input.
        extra: fractional bits of the leading coefficients.
    """

    def __init__(self, knots: list[float], pieces: list[tuple[float, list[float]]], bits: int, extra: int):
        self.degree = len(pieces[0][1]) - 1
        self.knots = [round(knot * 2.0**bits) for knot in knots]
        self.bits = extra + bits * self.degree
        whole = []
        for centre, coefficients in pieces:
            # What multiplies x^m has all the fractional bits that x^m leaves: the leading coefficient the fewest.
            *lower, top = coefficients
            sums = [Fraction(0)] * (self.degree + 1)
            for i, c in enumerate([*lower, round(top * 2.0**extra) / 2.0**extra]):
                for m in range(i + 1):  # (x - centre)^i
                    sums[m] += Fraction(c) * math.comb(i, m) * Fraction(-centre) ** (i - m)
            whole.append([round(c * 2 ** (extra + bits * (self.degree - m))) for m, c in enumerate(sums)])
        self.base = [_signed(c) for c in whole[0]]
        self.steps = [[_signed(b - a) for a, b in zip(*pair, strict=True)] for pair in zip(whole, whole[1:])]


def fitted(function, edges: list[float], degree: int, extra: int = 52) -> list[tuple[float, list[float]]]:
    """Near-minimax polynomials between edges: interpolation at Chebyshev's nodes, as (centre, coefficients) each.

    The leading coefficients have `extra` fractional bits; those below take up most of what that rounds off.
    """

    def interpolated(function, half, degree):
        series = np.polynomial.Chebyshev.interpolate(function, degree, [-half, half])
        found = series.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1]).coef
        return np.pad(found, (0, degree + 1 - len(found)))

    pieces = []
    for low, high in zip(edges, edges[1:]):
        centre, half = (low + high) / 2, (high - low) / 2
        coefficients = interpolated(lambda x: function(x + centre), half, degree)  # noqa: B023  called at once
        lost = coefficients[-1] - round(coefficients[-1] * 2.0**extra) / 2.0**extra
        coefficients[:-1] += interpolated(lambda x: lost * x**degree, half, degree - 1)  # noqa: B023
        pieces.append((centre, [*coefficients[:-1], coefficients[-1] - lost]))
    return pieces


def _segments(x: torch.Tensor, knots: list[int], low: int, digits: int, supply: tuple):
    """For flat x and each knot: whether x is at or above it, as a masked public bit and the dealer's supply.

    Bits below `low` are ignored; x and its differences to the knots lie within 2^(low + 4 digits - 1). Three rounds:
    n words, then J (2 k - 2) n bits, two per digit but for the ends, then J n bits.
    """
    r, table, masks, products, bit, powers, chosen = supply
    count = x.numel()
    if session.recording:
        return x, r, powers, chosen, torch.empty(len(knots), count, dtype=torch.int64, device="meta")
    (e,) = session.reveal(x - r)
    table = table.view(torch.int32)[: digits * count].view(digits, 1, count)
    # int32 is enough for up to 8 digits, and half the memory of int64.
    window = (e >> low).int() - torch.tensor([_narrow(knot >> low) for knot in knots], dtype=torch.int32)[:, None]
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
    gamma = unpack(session.reveal_bits(result ^ bit), count)  # (J, n)
    return e, r, powers, chosen, gamma


def _narrow(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


@functools.cache
def _terms(digits: int) -> list[tuple[torch.Tensor, list[int]]]:
    """For every term of `chain`: where the products of its variables' subsets are, and the variables to fold, in turn.

    Subsets are in the order of binary numbers whose highest bit is the first variable to fold.
    """
    names = variables(digits)
    place = {(): 0, **{(name,): 1 + i for i, name in enumerate(names)}}
    place |= {chosen: 1 + len(names) + i for i, chosen in enumerate(subsets(digits))}
    terms = []
    for term in chain(digits):
        every = [tuple(v for i, v in enumerate(term) if chosen >> i & 1) for chosen in range(1 << len(term))]
        terms.append((torch.tensor([place[chosen] for chosen in every]), [names.index(v) for v in reversed(term)]))
    return terms


def _evaluate(pieces: Polynomials, e: torch.Tensor, r: torch.Tensor, powers: list, chosen: list, gamma: torch.Tensor):
    """The piecewise polynomial of x = e + r, e public: sum over i of e^i times shares that are linear in the supply."""
    if session.recording:
        return torch.empty_like(e)
    sign = 1 - 2 * gamma
    degree = pieces.degree
    shares = [None, r, *powers]  # of r^m; r^0 is public
    steps = []
    for m in range(degree + 1):  # shares of (x at or above the knot) r^m
        plain = gamma if m == 0 else gamma * shares[m]
        step = sign * chosen[m]
        steps.append(step + plain if m > 0 or session.serving else step)
    weights = torch.tensor(pieces.steps).t() if len(pieces.steps) > 16 else None
    y = None
    for k in range(degree, -1, -1):
        inner = torch.zeros_like(e)
        for m in range(degree - k + 1):
            times = math.comb(k + m, m)
            if base := _signed(pieces.base[k + m] * times):
                if m > 0:
                    inner.add_(shares[m], alpha=base)
                elif session.serving:
                    inner.add_(base)
            if weights is not None:  # many knots, few elements: one large operation instead of many small ones
                inner += (steps[m] * (weights[k + m] * times)[:, None]).sum(0)
                continue
            for j, step in enumerate(pieces.steps):
                if alpha := _signed(step[k + m] * times):
                    inner.add_(steps[m][j], alpha=alpha)
        y = inner if y is None else y.mul_(e).add_(inner)
    return y


def piecewise(x: Share, pieces: Polynomials, low: int, digits: int = WINDOW_DIGITS) -> Share:
    """A piecewise polynomial of every element. Three rounds; n words and J (2 k - 1) n bits."""
    count, room = x.data.numel(), 1 << (low + DIGIT * digits - 1)
    # A difference to a knot, too, must stay within the window.
    _check(x.data, max(pieces.knots) - room, min(pieces.knots) + room)
    supply = session.correlation("comparison", count, len(pieces.knots), pieces.degree, digits, low)
    found = _segments(x.data.reshape(-1), pieces.knots, low, digits, supply)
    return Share(_evaluate(pieces, *found).view(x.shape), pieces.bits)


_RELU = Polynomials([0.0], [(0.0, [0.0, 0.0]), (0.0, [0.0, 1.0])], 0, 0)


def _check(x: torch.Tensor, low: int, high: int) -> None:
    """In checked mode: note this node if some entry of x, in raw units, is outside [low, high).

    Opens one number, the sum of a random number for each entry that is outside: zero if there is none, uniform else,
    however many there are. Two windows of 32 bits look: the wide one sees entries beyond the range by a factor of about
    2^10, what is farther off may pass unseen; the narrow one sees what is beyond a bound by 2^-22 of the larger of the
    two.
    """
    if not session.check:
        return
    flat = x.reshape(-1)
    pieces = Polynomials([float(low), float(high)], [(0.0, [1.0]), (0.0, [0.0]), (0.0, [1.0])], 0, 0)
    found = []
    for step in {max(0, max(abs(low), abs(high)).bit_length() - bits): None for bits in (21, 23)}:
        supply = session.correlation("comparison", flat.numel(), 2, 0, 8, step)
        found.append(_evaluate(pieces, *_segments(flat, pieces.knots, step, 8, supply)))
    beyond = torch.cat(found)  # 0 or 1 each, so that a random number times it is 0 or uniform
    shape = tuple(beyond.shape)
    a, b, share = session.correlation("multiply", shape, shape, shape)
    random = b if session.recording else session.dealing.uniform(len(beyond))
    e, f = session.reveal(beyond - a, random - b)
    (flag,) = session.reveal((e * (b + f if session.serving else b) + a * f + share).sum().reshape(1))
    if not session.recording and flag.item() != 0:
        session.violations[session.place] = True


def positive_part(x: Share, resolution: int, digits: int = WINDOW_DIGITS) -> Share:
    """max(x, 0) for |x| below 2^(4 digits - 1 - resolution), within 2^-resolution.

    Three rounds; n words and (2 digits - 1) n bits.
    """
    low = max(0, x.bits - resolution)
    return Share(piecewise(Share(x.data, 0), _RELU, low, digits).data, x.bits)


def maximum(x: Share, y: Share, resolution: int, digits: int = WINDOW_DIGITS) -> Share:
    """The larger of two, within 2^-resolution, for |x - y| below 2^(4 digits - 1 - resolution). Three rounds."""
    return y + positive_part(x - y, resolution, digits)


def largest(x: Share, dim: int, resolution: int, digits: int = WINDOW_DIGITS) -> Share:
    """The largest entry along a dimension, which stays: a tournament of comparisons, without an argmax.

    3 ceil(log2 K) rounds for K entries; n words.
    """
    while (size := x.shape[dim]) > 1:
        half = size // 2
        parts = x.data.split([half, half, size - 2 * half], dim)
        most = maximum(Share(parts[0], x.bits), Share(parts[1], x.bits), resolution, digits)
        x = Share(torch.cat([most.data, parts[2]], dim), x.bits) if size % 2 else most
    return x


# Powers of positive numbers


def log2_above(count: int) -> int:
    """The exponent of the least power of two that is no smaller than a count."""
    return (count - 1).bit_length()


@functools.cache
def _scaling(octaves: tuple[int, int], bits: int) -> Polynomials:
    """X times the power of two that takes it to [2^(high - 1), 2^high), knots at every quarter octave."""
    low, high = octaves
    knots = [2.0 ** (low + j / 4 + bits) for j in range(1, 4 * (high - low))]
    pieces = [(0.0, [0.0, 2.0 ** (high - low - 1 - j // 4)]) for j in range(4 * (high - low))]
    return Polynomials(knots, pieces, 0, 0)


@functools.cache
def _curves(octaves: tuple[int, int], exponent: float, factor: float, bits: int, extra: int) -> Polynomials:
    """Factor x^exponent from the scaled v, one quadratic per quarter octave."""
    low, high = octaves
    pieces = []
    for j in range(4 * (high - low)):
        scale = factor * 2.0 ** (exponent * (low + j // 4))
        edges = [2.0 ** (j % 4 / 4), 2.0 ** ((j % 4 + 1) / 4)]
        pieces += fitted(lambda v: scale * v**exponent, edges, 2)  # noqa: B023  called at once
    return Polynomials([0.0] * (len(pieces) - 1), pieces, bits, extra)


def _window(x: Share, octaves: tuple[int, int]) -> tuple[Share, int, int]:
    """What is compared to tell x's octaves apart: x with bits enough, the lowest bit that counts, how many digits."""
    low, high = octaves
    if x.bits + low < 4:
        x = x.to(4 - low)
    lowest = x.bits + low - 4
    return x, lowest, -(-(high + x.bits + 2 - lowest) // DIGIT)


def power(
    x: Share, exponent: float, octaves: tuple[int, int], factor: float = 1.0, extra: int = 0, nonzero: bool = True
) -> Share:
    """Factor x^exponent for x from 2^low to 2^high, to about 5e-4 of its value; below 2^low it follows the last curve.

    Three rounds find x's quarter octave and multiply x by a secret power of two into [1, 2), two truncate, one
    evaluates the quarter's quadratic. With J = 4 (high - low) - 1 and k digits: 2.5 n words and J (2 k - 1) n bits. The
    idea of scaling by a secret power of two is that of Catrina and Saxena (2010, Section 3.4).

    Args:
        x: positive.
        exponent: -1 or -0.5.
        octaves: low and high.
        factor: a public number.
        extra: fractional bits of the result beyond `session.bits` + 1.
        nonzero: whether a value below 2^low is out of range; zeros may be meant.
    """
    low, high = octaves
    x, lowest, digits = _window(x, octaves)
    count = x.data.numel()
    _check(x.data, round(2.0 ** (low + x.bits)) if nonzero else 0, round(2.0 ** (high + x.bits)))
    scaling = _scaling(octaves, x.bits)
    first, (r2, powers2, chosen2) = session.correlation("power", count, len(scaling.knots), digits, lowest, 2)
    *found, gamma = _segments(x.data.reshape(-1), scaling.knots, lowest, digits, first)
    v = Share(_evaluate(scaling, *found, gamma), high - 1 + x.bits)
    bits = min(session.bits - 2, 14)
    v = truncate(v, bits)
    (e,) = session.reveal(v.data - r2)
    curves = _curves(octaves, exponent, factor, bits, session.bits + 1 + extra)
    y = Share(_evaluate(curves, e, r2, powers2, chosen2, gamma).view(x.shape), curves.bits)
    return y.to(session.bits + 1 + extra)


# Reciprocals of many numbers: one knot per octave, and one polynomial for all

INVERSE_BITS = 11  # of v, whose fifth power must fit


@functools.cache
def _octaves(octaves: tuple[int, int], bits: int) -> tuple[Polynomials, Polynomials]:
    """X times the power of two that takes it to [2^(high - 1), 2^high), and that power, of high - 1 fractional bits."""
    count = octaves[1] - octaves[0]
    knots = [2.0 ** (octaves[0] + j + bits) for j in range(1, count)]
    shifts = [2.0 ** (count - 1 - j) for j in range(count)]
    scaled = Polynomials(knots, [(0.0, [0.0, shift]) for shift in shifts], 0, 0)
    return scaled, Polynomials(knots, [(0.0, [shift]) for shift in shifts], 0, 0)


@functools.cache
def _inverse(bits: int, extra: int) -> Polynomials:
    """1 / v for v in [1, 2), within 1.4e-4; below 4.4 for v from zero to one."""
    return Polynomials([], fitted(lambda v: 1 / v, [1.0, 2.0], 5, extra), bits, extra)


def reciprocal(x: Share, octaves: tuple[int, int], bits: int) -> Share:
    """1 / x for x from 2^low to 2^high, to 7e-4 of its value; below 2^low, zero included, less than 5 * 2^-low.

    `power` for many numbers: its J is a quarter, for three rounds more. Three rounds find x's octave and with it a
    secret power of two that takes x to v in [1, 2), two truncate v, one opens it masked for a quintic, two truncate
    that, one multiplies by the power of two. With J = high - low - 1 and k digits: 5 n words and J (2 k - 1) n bits.

    Args:
        x: not negative.
        octaves: low and high.
        bits: fractional bits of 1 / v; those of the result are high - 1 more.
    """
    low, high = octaves
    x, lowest, digits = _window(x, octaves)
    count = x.data.numel()
    _check(x.data, 0, round(2.0 ** (high + x.bits)))
    scaling, shift = _octaves(octaves, x.bits)
    supply = session.correlation("comparison", count, len(scaling.knots), 1, digits, lowest)
    found = _segments(x.data.reshape(-1), scaling.knots, lowest, digits, supply)
    v = truncate(Share(_evaluate(scaling, *found), high - 1 + x.bits), INVERSE_BITS)
    r, raised = session.correlation("powers", count, 5)
    (e,) = session.reveal(v.data - r)
    nothing = torch.empty(0, count, dtype=torch.int64, device=e.device)
    curve = _inverse(INVERSE_BITS, 59 - 5 * INVERSE_BITS)  # below 4.4, it stays within what `truncate` takes
    y = truncate(Share(_evaluate(curve, e, r, raised, [nothing] * 6, nothing), curve.bits), bits)
    y = multiply(y, Share(_evaluate(shift, *found), high - 1))
    return Share(y.data.view(x.shape), y.bits)
